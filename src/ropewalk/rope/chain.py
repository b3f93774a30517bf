"""Chains of position methods as data: parsed, printed, hashed, ordered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

from ropewalk.errors import UserError
from ropewalk.files import sha256_of_json
from ropewalk.rope.notation import Step, parse_steps
from ropewalk.rope.order import check_order
from ropewalk.rope.registry import get_method
from ropewalk.rope.spectrum import Spectrum

Steps = Sequence[Mapping[str, Any]]


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

    def extended(self, methods: Steps) -> RopeChain:
        """This chain with more methods after it."""
        return RopeChain([*self.to_list(), *methods])

    def after(self, own: RopeChain) -> RopeChain:
        """This chain on a model that has ``own``: it follows that chain, or replaces it if it rebuilds the spectrum."""
        return self if self.rebuilds else own.extended(self.to_list())

    def to_list(self) -> list[dict[str, Any]]:
        """The canonical form: every argument named; what YAML, config.json and the hash hold."""
        return [{"method": step.method, **deepcopy(step.arguments)} for step in self.steps]

    @property
    def rebuilds(self) -> bool:
        """True if the chain lays the spectrum out anew, so that a checkpoint's own chain does not matter."""
        return bool(self.steps) and get_method(self.steps[0].method).rebuilds

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
        """The chain as a stock transformers ``rope_parameters`` entry; see :mod:`ropewalk.rope.stock`.

        A stock entry holds one spectrum, so a chain that depends on the input's length is compiled at ``length``.
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
        return self.position_type.apply_chain(self, inv_freq, pretrained_length, trained_length, length)


def clip_of(chain: RopeChain) -> Step | None:
    """The clip of a chain, which has one at most; None: it has none."""
    return next((step for step in chain.steps if get_method(step.method).clips), None)


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
