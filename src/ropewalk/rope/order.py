"""Order of methods in a chain, and the length that its scalings reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ropewalk.errors import UserError
from ropewalk.rope.notation import Step
from ropewalk.rope.registry import get_method
from ropewalk.rope.spectrum import Spectrum


def check_order(steps: Sequence[Step]) -> None:
    """A method that lays the spectrum out anew follows nothing but abf, and abf only if it uses the base.

    A chain clips once: a second clip, as when a run's clip meets that of the checkpoint it starts from, would stop
    pairs that training turned.

    Raises:
        UserError: naming the method and what it would undo.
    """
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


def stretched(arguments: Mapping[str, Any], spectrum: Spectrum) -> float:
    """Tokens that a scaling reaches: L x factor, L the original_max_position_embeddings that it starts from.

    0 where L is not known (a caller's own vector).
    """
    return float((arguments["original_max_position_embeddings"] or 0) * arguments["factor"])


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
                "again; drop one of the two, or set "
                f"original_max_position_embeddings={math.ceil(reached)} in the second"
            )
        scaling, reached = step, reaches(step.arguments, spectrum)
    return None if scaling is None else math.ceil(reached)
