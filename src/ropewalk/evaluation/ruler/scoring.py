"""RULER's two scores as its authors compute them (eval/synthetic/constants.py of github.com/NVIDIA/RULER).

lm-eval 0.4.13 agrees on the first and takes the mean over the references in place of the second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(answer: str) -> str:
    """An answer without white space at its ends, each control character in it a new line."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Percent of the references that the answer holds, letter case ignored."""
    return 100.0 * sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """100 where the answer holds any of the references, letter case ignored, else 0."""
    return 100.0 * any(reference.lower() in answer.lower() for reference in references)


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}
