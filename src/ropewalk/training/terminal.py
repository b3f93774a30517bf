"""Lines for the person who watches."""

from __future__ import annotations

from contextlib import suppress


def tell(line: str) -> None:
    """Print a line. That the log's disk is full, or its reader gone, is no reason for a rank to leave the others."""
    with suppress(OSError):  # nowhere to say so; what was not printed is still in Python's buffer
        print(line, flush=True)
