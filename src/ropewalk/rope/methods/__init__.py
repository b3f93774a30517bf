"""Position methods: pure functions Spectrum -> Spectrum, registered on import.

Every module here is imported, so a new method is one function in any of them or in a file of its own.

In the docstrings i = 0..d/2-1 counts the pairs of a head of d channels; theta_i is the i-th frequency of the spectrum
that the method is given. b is the base, L the length that the method names, s the scaling factor (new over old length).
"""

import pkgutil
import traceback
from collections.abc import Iterable
from importlib import import_module

from ropewalk.errors import UserError


def import_methods(folders: Iterable[str], prefix: str) -> None:
    """Import every module of ``folders``.

    Args:
        folders: directories.
        prefix: of the modules' names, with its dot.

    Raises:
        UserError: naming the file, the line and the mistake, for a module that cannot be imported.
    """
    for module in pkgutil.iter_modules(folders):
        try:
            import_module(prefix + module.name)
        except Exception as error:  # whatever stands in a file of the user's
            lines = [f"{frame.filename}, line {frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
            own = [line for line in lines if f"{module.name}.py," in line]
            place = f"{error.filename}, line {error.lineno}" if isinstance(error, SyntaxError) else (own or lines)[-1]
            raise UserError(
                f"{place}: {type(error).__name__}: {error}; a method's file is described in docs/position.md, with its "
                "imports (from ropewalk.rope import Spectrum, Tokens, TRAINED_LENGTH, register_method, stretched)"
            ) from error


import_methods(__path__, f"{__name__}.")
