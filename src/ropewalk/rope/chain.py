"""Chains of position methods as data: parsed, printed, hashed, ordered."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ropewalk.errors import UserError
from ropewalk.files import sha256_of_json
from ropewalk.rope.registry import LENGTHS, get_method
from ropewalk.rope.spectrum import Spectrum, base_of

Steps = Sequence[Mapping[str, Any]]

_PRINTED = 8  # numbers of a list; a longer list is printed for people to see, not to be read back
_SHORTENED = re.compile(r"\[\d+ numbers\]")


@dataclass(frozen=True)
class Step:
    """One method of a chain with its canonical arguments."""

    method: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        defaults = get_method(self.method).defaults
        printed = {k: v for k, v in self.arguments.items() if k not in defaults or v != defaults[k]}
        return f"{self.method}({', '.join(f'{k}={print_value(v)}' for k, v in printed.items())})"


def print_value(value: Any) -> str:
    """A value as people write it, exactly: 1e7, 5e5, 0.25; of a long list, only its length, ``[64 numbers]``."""
    if isinstance(value, list) and len(value) > _PRINTED:
        return f"[{len(value)} numbers]"
    if isinstance(value, list):
        return f"[{', '.join(map(print_value, value))}]"
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    if abs(value) >= 1e4:
        mantissa, exponent = f"{value:e}".split("e")
        short = f"{float(mantissa):g}e{int(exponent)}"
    return short if float(short) == value else repr(value).removesuffix(".0")


class RopeChain:
    """Methods applied in order to RoPE's spectrum: ``abf(theta=1e7) > cope(clip=20)``.

    Args:
        methods: mappings with ``method`` and that method's arguments, as they stand in YAML and config.json.

    Raises:
        UserError: for an unknown method or argument, a value of the wrong type, or a method that would undo those
            that stand earlier. Ranges and contradicting scalings are checked where the chain meets a model.
    """

    def __init__(self, methods: Steps) -> None:
        if isinstance(methods, (str, Mapping)) or not isinstance(methods, Iterable):
            raise UserError(
                f"{methods!r} is not a list of steps; write [{{method: NAME, ...}}], or use RopeChain.parse"
            )
        self.steps = tuple(_step(entry) for entry in methods)
        check_order(self.steps)

    @classmethod
    def parse(cls, text: str) -> RopeChain:
        """The chain that ``text`` prints: ``abf(theta=1e7) > cope(clip=20)``, ``rope`` for none."""
        return cls(parse_steps(text))

    @classmethod
    def of(cls, group: Any) -> RopeChain:
        """The chain of a configuration's rope group (ropewalk.config.groups.RopeConfig)."""
        return cls(group.chain)

    def extended(self, methods: Steps) -> RopeChain:
        """This chain with more methods after it; a structural step among them takes the place of its own.

        Raises:
            UserError: where the two have different structural steps, which no stock class carries together.
        """
        added = RopeChain(methods)
        replaced = {step.method for step in added.structure().steps}
        kept = [step for step in self.structure().to_list() if step["method"] not in replaced]
        first = [*kept, *added.structure().to_list()]
        return RopeChain([*first, *self.frequencies().to_list(), *added.frequencies().to_list()])

    def after(self, own: RopeChain) -> RopeChain:
        """This chain on a model that has ``own``: it follows that chain, or replaces it if it rebuilds the spectrum.

        The axes of the model's pairs stay, the layers that rotate and the factor on queries, unless this chain has some
        itself.
        """
        return (own.structure() if self.rebuilds else own).extended(self.to_list())

    def structure(self) -> RopeChain:
        """The step that says what stands beside the frequencies (axes, layers, temperature), or an empty chain."""
        return RopeChain([step for step in self.to_list() if get_method(step["method"]).structural])

    def frequencies(self) -> RopeChain:
        """The steps that act on frequencies."""
        return RopeChain([step for step in self.to_list() if not get_method(step["method"]).structural])

    def resolved(self, spectrum: Spectrum) -> tuple[RopeChain, Spectrum]:
        """The chain with every word (``auto``, ``trained_length``) replaced by its value, and the spectrum it gives."""
        steps = []
        for step in self.steps:
            method = get_method(step.method)
            arguments = method.resolved(step.arguments, spectrum)
            steps.append({"method": step.method, **arguments})
            spectrum = method.function(spectrum, **arguments)
        return RopeChain(steps), spectrum

    def run(self, spectrum: Spectrum) -> Spectrum:
        """The spectrum that a resolved chain gives."""
        for step in self.steps:
            spectrum = get_method(step.method).function(spectrum, **step.arguments)
        return spectrum

    def to_list(self) -> list[dict[str, Any]]:
        """The canonical form: every argument named; what YAML, config.json and the hash hold."""
        return [{"method": step.method, **deepcopy(step.arguments)} for step in self.steps]

    @property
    def rebuilds(self) -> bool:
        """True if the chain lays the spectrum out anew, so that a checkpoint's own chain does not matter."""
        steps = self.frequencies().steps
        return bool(steps) and get_method(steps[0].method).rebuilds

    @property
    def sha256(self) -> str:
        """Hash of the canonical form: equal for equal methods and arguments, however they were written."""
        return sha256_of_json(self.to_list(), compact=True)

    def __str__(self) -> str:
        return " > ".join(map(str, self.steps)) or "rope"

    def __repr__(self) -> str:
        return f"RopeChain({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RopeChain) and self.to_list() == other.to_list()

    def __hash__(self) -> int:
        return hash(self.sha256)

    # The calls below are short forms of a Position's, which stands above this module and puts itself here.
    position_type: ClassVar[type[Any]]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RopeChain:
        """The chain of a checkpoint: a directory, its config.json, or a hub id; see Position.from_pretrained."""
        return cls.position_type.from_pretrained(directory).chain

    def spectrum(
        self,
        *,
        head_dim: int,
        theta: float,
        pretrained_length: int,
        trained_length: int,
        length: int | None = None,
    ) -> Spectrum:
        """The chain's spectrum for a model.

        Args:
            head_dim: channels of a head that rotate, even.
            theta: RoPE base of the pretrained model.
            pretrained_length: tokens the pretrained model was trained at.
            trained_length: tokens this run trains at.
            length: tokens of the present input, for length-dependent methods; None: ``trained_length``.

        Raises:
            UserError: for inputs or arguments that do not fit, naming the value, the rule and the fix.
        """
        return self.position_type("unnamed", self, theta, head_dim, pretrained_length, trained_length).spectrum(length)

    def rope_parameters(
        self,
        *,
        head_dim: int,
        theta: float,
        pretrained_length: int,
        trained_length: int,
        max_position_embeddings: int,
        length: int | None = None,
    ) -> dict[str, Any]:
        """The chain as a stock transformers ``rope_parameters`` entry; see Position.rope_parameters.

        A stock entry holds one spectrum, so a chain that depends on the input's length is compiled at ``length``.
        Layers without rotation are not in it: a model class says them (docs/position.md).
        """
        position = self.position_type("unnamed", self, theta, head_dim, pretrained_length, trained_length)
        return position.rope_parameters(max_position_embeddings, length)

    def apply(
        self,
        inv_freq: Any,
        *,
        pretrained_length: int | None = None,
        trained_length: int | None = None,
        length: int | None = None,
    ) -> Any:
        """The same transforms on a caller's own vector (d/2,), numpy or torch; returned in its type and dtype.

        The base is read off the ratio of the first two frequencies, which holds for any RoPE vector. The attention
        scaling, which YaRN and others multiply cos and sin by, is not in a vector: ``spectrum`` has it.

        Args:
            inv_freq: RoPE's own inverse frequencies, highest first, radians per token.
            pretrained_length: tokens; needed where the chain refers to it.
            trained_length: tokens; needed where the chain refers to it.
            length: tokens of the present input; None: ``trained_length``.

        Raises:
            UserError: where the vector is too short for that, or does not fall from its first entry, or where the
                chain refers to a length that is not given.
        """
        is_torch = hasattr(inv_freq, "detach")
        values = inv_freq.detach().double().cpu().numpy() if is_torch else np.asarray(inv_freq, dtype=np.float64)
        theta = base_of(values) if values.ndim == 1 else None
        if theta is None:
            raise UserError(
                f"inv_freq of shape {values.shape} must be one row of two or more frequencies that starts falling; "
                "give RoPE's own, before any other transform"
            )
        check_lengths(pretrained_length=pretrained_length, trained_length=trained_length, length=length)
        start = WatchedSpectrum(values, theta, pretrained_length, trained_length)  # type: ignore[arg-type]
        # Words stand for values of training, so they resolve at the trained length, whatever the present input's.
        resolved, spectrum = self.resolved(start if trained_length else start.at_length(length))
        reached_length(resolved.steps, spectrum)
        if trained_length and length is not None:
            spectrum = resolved.run(start.at_length(length))
        result = spectrum.inv_freq
        return inv_freq.new_tensor(result) if is_torch else result.astype(np.asarray(inv_freq).dtype)


def clip_of(chain: RopeChain) -> Step | None:
    """The clip of a chain, which has one at most; None: it has none."""
    return next((step for step in chain.steps if get_method(step.method).clips), None)


def learned_step(chain: RopeChain) -> Step | None:
    """The step whose alpha a run of this chain trains; None: it trains none."""
    return next((step for step in chain.steps if _is_trained(step)), None)


def learned_as(chain: RopeChain, alpha: Sequence[float]) -> RopeChain:
    """A chain whose last step was trained, with the (d/2,) values that it has now."""
    *steps, trained = chain.to_list()
    return RopeChain([*steps, {**trained, "alpha": alpha}])


def check_trained(chain: RopeChain) -> None:
    """Raise UserError for a chain with frequencies that only training gives it."""
    if (step := learned_step(chain)) is not None:
        raise UserError(
            f"{step} has no alpha: training gives it, and without training it changes nothing; evaluate or export the "
            "run that learned it, or give alpha, a number for each pair"
        )


def _is_trained(step: Step) -> bool:
    return step.method == "learned" and step.arguments["alpha"] is None


def in_words(chain: RopeChain) -> str:
    """The printed chain, for people: ``rope``, which an empty one prints as, is also an arm's name, at another base."""
    return str(chain) if chain.steps else "plain RoPE"


def _step(entry: Mapping[str, Any]) -> Step:
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{entry!r} is not a step of a chain; write {{method: NAME, ...}}, or give text to RopeChain.parse"
        )
    arguments = dict(entry)
    name = arguments.pop("method", None)
    if not isinstance(name, str):
        raise UserError(f"{dict(entry)} names no method; write {{method: NAME, ...}}")
    return Step(name, get_method(name).arguments(arguments))


def parse_steps(text: str) -> list[dict[str, Any]]:
    """The steps of a printed chain; ``rope``, or nothing, is the chain without any.

    Raises:
        UserError: for text of another form, or a list of which only the length was printed.
    """
    if shortened := _SHORTENED.search(text):
        raise UserError(
            f"{shortened[0]} in the chain {text!r} is a list that was shortened when printed; write its numbers out, "
            "or take the chain from where it is whole: RopeChain.to_list(), YAML, or RopeChain.from_pretrained(DIR)"
        )
    if text.strip() in ("", "rope"):
        return []
    return [_parse_step(part.strip(), text) for part in text.split(">")]


def _parse_step(part: str, text: str) -> dict[str, Any]:
    rule = "write NAME(argument=value, ...), joined by '>': abf(theta=1e7) > cope(clip=20)"
    try:
        call = ast.parse(part if "(" in part else f"{part}()", mode="eval").body
    except SyntaxError:
        raise UserError(f"{part!r} in the chain {text!r} is not a method; {rule}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise UserError(f"{part!r} in the chain {text!r} is not a method; {rule}")
    names = [str(keyword.arg) for keyword in call.keywords]
    for name in names:
        if names.count(name) > 1 or name == "method":
            raise UserError(f"{part!r} in the chain {text!r} gives {name} twice; keep one")
    return {"method": call.func.id, **{str(k.arg): _literal(k.value, part) for k in call.keywords}}


def _literal(node: ast.expr, part: str) -> Any:
    """A number, true, false, null, a list, or a bare word."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None, "none": None}.get(node.id.lower(), node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(f"{part!r}: {ast.unparse(node)} is not a value; give a number, true, false or a word") from None


def check_order(steps: Sequence[Step]) -> None:
    """A method that lays the spectrum out anew follows nothing but abf, and abf only if it uses the base.

    A chain clips once: a second clip, as when a run's clip meets that of the checkpoint it starts from, would stop
    pairs that training turned. What stands beside the frequencies (axes, layers, temperature) is said once, and first;
    frequencies that a run trains stand last.

    Raises:
        UserError: naming the method and what it would undo.
    """
    for step, after in pairwise(steps):
        if _is_trained(step):
            raise UserError(
                f"{step} has no alpha, so a run trains it, and {after} stands after it; put it last, or give alpha"
            )
    structural = [step.method for step in steps if get_method(step.method).structural]
    if len(set(structural)) > 1:
        raise UserError(f"a chain has {' and '.join(structural)}, and no stock model class carries both; keep one")
    if any(step.method in structural for step in steps[1:]):
        raise UserError(
            f"{structural[0]} stands once in a chain, before every other method; move it to the front, or keep one"
        )
    steps = [step for step in steps if step.method not in structural]
    clips = [step for step in steps if get_method(step.method).clips]
    if len(clips) > 1:
        raise UserError(
            f"{clips[1]} follows {clips[0]}, and a chain clips once; leave one of them out: rope=default goes on with "
            "a checkpoint's own clip, and a chain that begins with abf replaces it"
        )
    for index, step in enumerate(steps):
        method = get_method(step.method)
        follows_abf = index == 1 and steps[0].method == "abf" and method.uses_base
        if index > 0 and method.rebuilds and not follows_abf:
            where = "first, or right after abf" if method.uses_base else "first"
            raise UserError(
                f"{step.method} stands at place {index + 1} of the chain, after {steps[index - 1]}; it rebuilds "
                f"the spectrum and would undo what stands before it: put it {where}"
            )


def reached_length(steps: Sequence[Step], spectrum: Spectrum) -> int | None:
    """Tokens to which the scalings of a chain stretch the model; None without a scaling.

    A second scaling must start from the length that the first one has reached, or a longer one.

    Args:
        steps: of a chain whose words are resolved.
        spectrum: with the lengths that a scaling may follow.

    Raises:
        UserError: naming both scalings and the fix.
    """
    scaling: Step | None = None
    reached = 0.0
    for step in steps:
        reaches = get_method(step.method).reaches
        if reaches is None:
            continue
        start = step.arguments["original_max_position_embeddings"]
        if scaling is not None and start is not None and start < reached:
            raise UserError(
                f"{scaling} already stretches the model to {reached:,.0f} tokens, and {step} starts from {start:,} "
                "again; drop one of the two (test_time=none, where it is an evaluation's), or set "
                f"original_max_position_embeddings={math.ceil(reached)} in the second"
            )
        scaling, reached = step, reaches(step.arguments, spectrum)
    return None if scaling is None else math.ceil(reached)


@dataclass(frozen=True, eq=False)
class WatchedSpectrum(Spectrum):
    """A spectrum that notes the lengths a chain refers to; one that is not given is an error."""

    lengths_read: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in LENGTHS and value is None:
            raise UserError(f"the chain refers to {name}, which is not given; pass {name}=TOKENS to apply()")
        if name in (*LENGTHS, "length"):
            self.lengths_read.add(name)
        return value


def unwatched(spectrum: Spectrum) -> Spectrum:
    """The spectrum alone."""
    return Spectrum(**{item.name: vars(spectrum)[item.name] for item in fields(Spectrum)})


def check_lengths(**lengths: int | None) -> None:
    """Raise UserError unless each length that is given is a whole number of tokens, 1 or more."""
    for name, value in lengths.items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise UserError(f"{name}={value!r} must be a whole number of tokens, 1 or more")
