"""Ordered chains of position methods."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ropewalk.rope.registry import get_method, resolve_arguments
from ropewalk.rope.spectrum import Spectrum, geometric


@dataclass(frozen=True)
class Step:
    """One method of a chain with its resolved arguments."""

    method: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        shown = {k: v for k, v in self.arguments.items() if v != _defaults(self.method).get(k)}
        return f"{self.method}({', '.join(f'{k}={_short(v)}' for k, v in shown.items())})"


class RopeChain:
    """Methods applied in order to RoPE's spectrum: ``abf(theta=1e7) > cope(clip=20)``.

    Args:
        methods: mappings with ``method`` and that method's arguments, as they stand in YAML and config.json.

    Raises:
        ValueError: for an unknown method or argument, a wrong value, or abf anywhere but first.
    """

    def __init__(self, methods: Sequence[Mapping[str, Any]]) -> None:
        self.steps = tuple(_step(entry) for entry in methods)
        for position, step in enumerate(self.steps):
            if step.method == "abf" and position > 0:
                raise ValueError(
                    f"abf stands at place {position + 1} of the chain, after {self.steps[position - 1]}; it rebuilds "
                    "the spectrum and would undo what stands before it: put it first"
                )

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
            head_dim: channels of a head, even.
            theta: RoPE base of the pretrained model.
            pretrained_length: tokens the pretrained model was trained at.
            trained_length: tokens this run trains at.
            length: tokens of the present input, for length-dependent methods.
        """
        if head_dim <= 0 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be positive and even: channels rotate in pairs")
        start = Spectrum(geometric(theta, head_dim), theta, pretrained_length, trained_length, length)
        return self._run(start)

    def apply(self, inv_freq: Any, *, pretrained_length: int = 0, trained_length: int = 0) -> Any:
        """The same transforms on a caller's own vector (d/2,), numpy or torch; returned in its type and dtype.

        The base is read off the ratio of the first two frequencies, which holds for any RoPE vector.
        """
        is_torch = hasattr(inv_freq, "detach")
        values = inv_freq.detach().double().cpu().numpy() if is_torch else np.asarray(inv_freq, dtype=np.float64)
        theta = float((values[0] / values[1]) ** values.size)
        result = self._run(Spectrum(values, theta, pretrained_length, trained_length)).inv_freq
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
        """The chain as a stock transformers ``rope_parameters`` entry; see :mod:`ropewalk.rope.stock`."""
        from ropewalk.rope.stock import compile_to_stock

        spectrum = self.spectrum(
            head_dim=head_dim,
            theta=theta,
            pretrained_length=pretrained_length,
            trained_length=trained_length,
            length=length,
        )
        return compile_to_stock(self, spectrum, max_position_embeddings)

    def extended(self, methods: Sequence[Mapping[str, Any]]) -> RopeChain:
        """This chain with more methods after it."""
        return RopeChain([*self.to_list(), *methods])

    def to_list(self) -> list[dict[str, Any]]:
        """The canonical form: every argument resolved; what YAML, config.json and the hash hold."""
        return [{"method": step.method, **step.arguments} for step in self.steps]

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


def _step(entry: Mapping[str, Any]) -> Step:
    arguments = dict(entry)
    name = arguments.pop("method", None)
    if name is None:
        raise ValueError(f"{dict(entry)} names no method; write {{method: NAME, ...}}")
    return Step(name, resolve_arguments(name, arguments))


def _defaults(method: str) -> dict[str, Any]:
    return getattr(get_method(method), "__kwdefaults__", None) or {}


def _short(value: Any) -> str:
    """As people write it: 1e7, 5e5, 0.25."""
    if isinstance(value, float) and abs(value) >= 1e4:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)
