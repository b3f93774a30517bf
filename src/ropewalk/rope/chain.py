"""Ordered chains of position methods."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.rope.notation import parse_steps, print_value
from ropewalk.rope.order import check_order, reached_length
from ropewalk.rope.registry import LENGTHS, get_method
from ropewalk.rope.spectrum import Spectrum, base_of, geometric

_LONGEST = 2**40  # tokens, beyond any input


@dataclass(frozen=True)
class Step:
    """One method of a chain with its canonical arguments."""

    method: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        defaults = get_method(self.method).defaults
        shown = {k: v for k, v in self.arguments.items() if k not in defaults or v != defaults[k]}
        return f"{self.method}({', '.join(f'{k}={print_value(v)}' for k, v in shown.items())})"


class RopeChain:
    """Methods applied in order to RoPE's spectrum: ``abf(theta=1e7) > cope(clip=20)``.

    Args:
        methods: mappings with ``method`` and that method's arguments, as they stand in YAML and config.json.

    Raises:
        UserError: for an unknown method or argument, a value of the wrong type, or a method that would undo those
            before it. Ranges and contradicting scalings are checked where the chain meets a model.
    """

    def __init__(self, methods: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(methods, (str, Mapping)) or not isinstance(methods, Iterable):
            raise UserError(f"{methods!r} is no list of steps; write [{{method: NAME, ...}}], or use RopeChain.parse")
        self.steps = tuple(_step(entry) for entry in methods)
        check_order(self.steps)

    @classmethod
    def parse(cls, text: str) -> RopeChain:
        """The chain that ``text`` prints: ``abf(theta=1e7) > cope(clip=20)``, ``rope`` for none."""
        return cls(parse_steps(text))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RopeChain:
        """The chain of a checkpoint: a directory, its config.json, or a hub id; see Position.from_pretrained."""
        from ropewalk.rope.position import Position

        return Position.from_pretrained(directory).chain

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
            UserError: for inputs or arguments that do not fit, naming the value, the rule and the mend.
        """
        _check_lengths(length=length)
        start = _start(head_dim, theta, pretrained_length, trained_length)
        return self._resolved(start)._run(start.at_length(length))

    def resolved(self, *, head_dim: int, theta: float, pretrained_length: int, trained_length: int) -> RopeChain:
        """The chain with every word (``auto``, ``trained_length``) replaced by its value for this model."""
        return self._resolved(_start(head_dim, theta, pretrained_length, trained_length))

    def _resolved(self, spectrum: Spectrum) -> RopeChain:
        """Words stand for values of training, so they resolve at the trained length, whatever the present input's."""
        steps = []
        for step in self.steps:
            arguments = get_method(step.method).resolved(step.arguments, spectrum)
            steps.append({"method": step.method, **arguments})
            spectrum = get_method(step.method)(spectrum, **arguments)
        chain = RopeChain(steps)
        reached_length(chain.steps, spectrum)  # refuses scalings that contradict
        return chain

    def depends_on_length(self, *, head_dim: int, theta: float, pretrained_length: int, trained_length: int) -> bool:
        """Whether the spectrum for an input of one token is not that for the longest one."""
        start = _start(head_dim, theta, pretrained_length, trained_length)
        chain = self._resolved(start)
        short, long = (chain._run(start.at_length(length)) for length in (1, _LONGEST))
        same = np.array_equal(short.inv_freq, long.inv_freq) and short.attention_scaling == long.attention_scaling
        return not same

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
        _check_lengths(pretrained_length=pretrained_length, trained_length=trained_length, length=length)
        start = _Unstated(values, theta, pretrained_length, trained_length)  # type: ignore[arg-type]
        start = start if trained_length else start.at_length(length)  # type: ignore[assignment]
        result = self._resolved(start)._run(start.at_length(length)).inv_freq
        return inv_freq.new_tensor(result) if is_torch else result.astype(np.asarray(inv_freq).dtype)

    def _run(self, spectrum: Spectrum) -> Spectrum:
        for step in self.steps:
            spectrum = get_method(step.method)(spectrum, **step.arguments)
        return spectrum

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
        """The chain as a stock transformers ``rope_parameters`` entry; see :mod:`ropewalk.rope.stock`.

        A stock entry holds one spectrum, so a chain that depends on the input's length is compiled at ``length``.
        """
        from ropewalk.rope.stock import compile_to_stock

        inputs = {
            "head_dim": head_dim,
            "theta": theta,
            "pretrained_length": pretrained_length,
            "trained_length": trained_length,
        }
        return compile_to_stock(
            self.resolved(**inputs),  # type: ignore[arg-type]
            self.spectrum(**inputs, length=length),  # type: ignore[arg-type]
            max_position_embeddings,
        )

    def extended(self, methods: Sequence[Mapping[str, Any]]) -> RopeChain:
        """This chain with more methods after it."""
        return RopeChain([*self.to_list(), *methods])

    def to_list(self) -> list[dict[str, Any]]:
        """The canonical form: every argument named; what YAML, config.json and the hash hold."""
        return [{"method": step.method, **deepcopy(step.arguments)} for step in self.steps]

    @property
    def rebuilds(self) -> bool:
        """Whether the chain lays the spectrum out anew, so that what a checkpoint had before does not matter."""
        return bool(self.steps) and get_method(self.steps[0].method).rebuilds

    @property
    def sha256(self) -> str:
        """Hash of the canonical form: equal for equal methods and arguments, however they were written."""
        canonical = json.dumps(self.to_list(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __str__(self) -> str:
        return " > ".join(map(str, self.steps)) or "rope"

    def __repr__(self) -> str:
        return f"RopeChain({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RopeChain) and self.to_list() == other.to_list()

    def __hash__(self) -> int:
        return hash(self.sha256)


class _Unstated(Spectrum):
    """A caller's own vector, of a model whose lengths may not have been told: reading one of those is an error."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if value is None and name in LENGTHS:
            raise UserError(f"the chain refers to {name}, which is not given; pass {name}=TOKENS to apply()")
        return value


def _start(head_dim: int, theta: float, pretrained_length: int, trained_length: int) -> Spectrum:
    if not isinstance(head_dim, Integral) or head_dim <= 0 or head_dim % 2:
        raise UserError(f"head_dim={head_dim!r} must be positive and even: channels rotate in pairs")
    if not isinstance(theta, Real) or not 1 < theta < math.inf:
        raise UserError(f"theta={theta!r} must be a number above 1; it is the model's rope_theta, 10000 in RoFormer")
    _check_lengths(pretrained_length=pretrained_length, trained_length=trained_length)
    return Spectrum(geometric(theta, head_dim), float(theta), pretrained_length, trained_length)


def _check_lengths(**lengths: int | None) -> None:
    for name, value in lengths.items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise UserError(f"{name}={value!r} must be a whole number of tokens, 1 or more")


def _step(entry: Mapping[str, Any]) -> Step:
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{entry!r} is no step of a chain; write {{method: NAME, ...}}, or give text to RopeChain.parse"
        )
    arguments = dict(entry)
    name = arguments.pop("method", None)
    if not isinstance(name, str):
        raise UserError(f"{dict(entry)} names no method; write {{method: NAME, ...}}")
    return Step(name, get_method(name).arguments(arguments))
