"""The table of position methods, filled by ``@register_method``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from ropewalk.rope.spectrum import Spectrum

Method = Callable[..., Spectrum]
_METHODS: dict[str, Method] = {}


def register_method(name: str) -> Callable[[Method], Method]:
    """Make ``method(spectrum, *, ...)`` usable in chains as ``{"method": name, ...}``.

    Every parameter after the spectrum is keyword-only and annotated; the annotations convert what YAML gives, so
    that 10000000 and 1e7 are one value with one hash.
    """

    def register(method: Method) -> Method:
        if name in _METHODS:
            raise ValueError(f"method {name!r} is registered already; choose another name")
        _METHODS[name] = method
        return method

    return register


def available_methods() -> tuple[str, ...]:
    """Names that a chain may use, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str) -> Method:
    """The method of that name, or ValueError listing those there are."""
    if name not in _METHODS:
        raise ValueError(f"method={name!r} is not known; use one of: {', '.join(available_methods())}")
    return _METHODS[name]


def resolve_arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's arguments, defaults filled in and numbers in their annotated type.

    Raises:
        ValueError: for an unknown or missing argument, or a value that is not of the annotated type.
    """
    method = get_method(name)
    hints = get_type_hints(method)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    names = [p.name for p in parameters]
    for unknown in given.keys() - set(names):
        raise ValueError(f"{name}: {unknown}={given[unknown]!r} is not an argument; it takes: {', '.join(names)}")
    resolved = {}
    for parameter in parameters:
        if parameter.name in given:
            resolved[parameter.name] = _convert(name, parameter.name, given[parameter.name], hints[parameter.name])
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{name}: {parameter.name} is not given and has no default; write it beside the method")
        else:
            resolved[parameter.name] = parameter.default
    return resolved


def _convert(method: str, name: str, value: Any, kind: Any) -> Any:
    wanted = str(kind)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if "float" in wanted and is_number:
        return float(value)
    if wanted == "<class 'int'>" and is_number and float(value).is_integer():
        return int(value)
    if wanted == "<class 'bool'>" and isinstance(value, bool):
        return value
    if "None" in wanted and value is None:
        return None
    if "Literal" in wanted and value in kind.__args__:
        return value
    expected = getattr(kind, "__name__", wanted)
    if "Literal" in wanted:
        expected = f"one of {', '.join(kind.__args__)}"
    raise ValueError(f"{method}: {name}={value!r} must be {expected}")
