"""Errors of users: one line on the terminal, no traceback; and warnings."""

from __future__ import annotations

import os
import sys
from functools import cache


class UserError(ValueError):
    """A user's input is wrong: a configuration, a file, a checkpoint, a path, the environment of a command.

    The message names the value, the rule and the fix. Commands print it as one line and exit with 2. Every other
    exception, a plain ValueError among them, is a fault of the program and keeps its traceback.
    """


def in_one_line(error: BaseException) -> str:
    """A library's message as one line, cut where it is long; the name of its class where it has none."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):  # its message is the key alone
        text = f"{type(error).__name__}: {text}"
    return f"{text[:300]}..." if len(text) > 300 else text or type(error).__name__


@cache
def warn_once(text: str) -> None:
    """Print a warning on stderr, once a process and by the first of several."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)
