"""Numbers and lists as words, the same in the page and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def tokens(count: float) -> str:
    """A count in full: ``2,048``."""
    return f"{int(count):,}"


def amount(count: float) -> str:
    """A large count in three digits: ``1.57M``, ``21B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def interval(low: float, high: float, *, signed: bool = False) -> str:
    """``[3.381, 3.443]``; a difference, ``signed``, with a digit more; nothing where an end is unknown."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{low:+.4f}, {high:+.4f}]" if signed else f"[{low:.3f}, {high:.3f}]"


def listed(items: Iterable[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "none"


def ranked(values: Iterable[tuple[float, str]], form: str = ".3f", most: int = 4) -> str:
    """Names with their values, ascending: ``a 1.000, b 1.200 and c 1.300``; of more than ``most`` the two ends."""
    ordered = sorted(values)
    words = [f"{name} {value:{form}}" for value, name in ordered]
    return listed(words) if len(words) <= most else f"{words[0]} to {words[-1]}, {len(words) - 2} between"


def counted(count: int, noun: str) -> str:
    """``1 run``, ``3 runs``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines whose columns start in the same place, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
