"""Errors of users: one line on the terminal, no traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A user's input is wrong: a configuration, a file, a checkpoint, a path, the environment of a command.

    The message names the value, the rule and the fix. Commands print it as one line and exit with 2. Every other
    exception, a plain ValueError among them, is a fault of the program and keeps its traceback.
    """
