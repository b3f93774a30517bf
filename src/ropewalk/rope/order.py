"""What may stand where in a chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ropewalk.rope.registry import get_method

if TYPE_CHECKING:
    from ropewalk.rope.chain import Step
    from ropewalk.rope.spectrum import Spectrum


def check_order(steps: Sequence[Step]) -> None:
    """A method that lays the spectrum out anew may follow nothing but abf, whose base it may use.

    Raises:
        ValueError: naming the method and what it would undo.
    """
    for place, step in enumerate(steps):
        follows_abf = place == 1 and steps[0].method == "abf" and step.method != "abf"
        if place > 0 and get_method(step.method).rebuilds and not follows_abf:
            where = "first" if step.method == "abf" else "first, or right after abf"
            raise ValueError(
                f"{step.method} stands at place {place + 1} of the chain, after {steps[place - 1]}; it rebuilds "
                f"the spectrum and would undo what stands before it: put it {where}"
            )


def check_scalings(steps: Sequence[Step], spectrum: Spectrum | None = None) -> None:
    """A second scaling must start from the length that the one before it has reached, or a longer one.

    A scaling stretches L = original_max_position_embeddings tokens, or the pretrained length where it names none and
    is the first, to L x factor. Without ``spectrum`` only the lengths that the steps name themselves are compared.

    Raises:
        ValueError: naming both, and how to put it right.
    """
    before: Step | None = None
    reached: float | None = None
    for step in steps:
        if not get_method(step.method).scaling:
            continue
        named = _tokens(step.arguments.get("original_max_position_embeddings"), spectrum)
        if before is not None and reached is not None and named is not None and named < reached:
            raise ValueError(
                f"{before} already stretches the model to {reached:g} tokens, and {step} starts from {named:g} again; "
                f"drop one of the two, or set original_max_position_embeddings={reached:g} in the second"
            )
        start = named if named is not None else reached
        if start is None and spectrum is not None:
            start = float(spectrum.pretrained_length)
        reached = None if start is None else start * float(step.arguments.get("factor") or 1.0)
        before = step


def _tokens(value: Any, spectrum: Spectrum | None) -> float | None:
    if isinstance(value, str):
        return None if spectrum is None else float(getattr(spectrum, value))
    return None if value is None else float(value)
