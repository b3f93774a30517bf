"""Errors of users: one line on the terminal, no traceback; warnings; and an output that nobody reads."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from select import POLLERR, poll


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


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """End a command whose output nobody reads any more (``| head``) without a word, with exit code 141."""
    try:
        yield
    except BrokenPipeError:
        if not _output_is_closed():
            raise  # of another pipe
        sys.exit(128 + signal.SIGPIPE)
    finally:
        _output_is_closed()  # at the end Python writes what it has held back


def _output_is_closed() -> bool:
    """True if stdout is a pipe whose reader has gone; what is still to be written to it then goes nowhere."""
    output = poll()
    try:
        output.register(sys.stdout.fileno(), 0)
    except (AttributeError, ValueError):  # closed by the caller (>&-), or not a file, as in a notebook
        return False
    if not any(event & POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@cache
def warn_once(text: str) -> None:
    """Print a warning on stderr, once a process and by the first of several."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)
