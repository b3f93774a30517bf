"""The table of position methods, filled by ``@register_method``."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ropewalk.rope.spectrum import Spectrum

Function = Callable[..., Spectrum]

# Words that a chain may say in place of a number; they resolve against the spectrum that the method finds.
LENGTHS = ("pretrained_length", "trained_length")
TRAINED_LENGTH: Any = "trained_length"
AUTO: Any = "auto"


@dataclass(frozen=True)
class Method:
    """A registered method: its function, and what the registry knows about its arguments."""

    name: str
    function: Function
    hints: dict[str, Any]
    defaults: dict[str, Any]  # of the optional arguments
    auto: Mapping[str, Callable[[Spectrum], Any]]
    rebuilds: bool
    scaling: bool

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The canonical arguments: defaults filled in, numbers in their annotated type, words as they stand.

        Raises:
            ValueError: for an unknown or missing argument, or a value that is not of the annotated type.
        """
        for unknown in given.keys() - self.hints.keys():
            takes = ", ".join(self.hints) or "nothing"
            raise ValueError(f"{self.name}: {unknown}={given[unknown]!r} is not an argument; it takes: {takes}")
        resolved = {}
        for name in self.hints:
            if name not in given and name not in self.defaults:
                raise ValueError(f"{self.name}: {name} is not given and has no default; write it beside the method")
            resolved[name] = self._converted(name, given[name]) if name in given else self.defaults[name]
        return resolved

    def resolved(self, given: Mapping[str, Any], spectrum: Spectrum) -> dict[str, Any]:
        """The canonical arguments with every word replaced by its value for ``spectrum``."""
        arguments = self.arguments(given)
        for name, value in arguments.items():
            if isinstance(value, str) and value in LENGTHS:
                arguments[name] = getattr(spectrum, value)
            elif value == AUTO and name in self.auto:
                arguments[name] = self.auto[name](spectrum)
        return arguments

    def __call__(self, spectrum: Spectrum, **given: Any) -> Spectrum:
        """Run the method on ``spectrum`` with the arguments of a chain."""
        return self.function(spectrum, **self.resolved(given, spectrum))

    def _converted(self, name: str, value: Any) -> Any:
        kind = self.hints[name]
        if value == AUTO and name in self.auto:
            return value
        if isinstance(value, str) and value in LENGTHS and int in _options(kind):
            return value
        for option in _options(kind):
            fits, converted = _convert(value, option)
            if fits:
                return converted
        words = [AUTO] * (name in self.auto)
        raise ValueError(f"{self.name}: {name}={value!r} must be {_described(kind, words)}")


_METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    auto: Mapping[str, Callable[[Spectrum], Any]] | None = None,
    rebuilds: bool = False,
    scaling: bool = False,
) -> Callable[[Function], Function]:
    """Make ``method(spectrum, *, ...)`` usable in chains as ``{"method": name, ...}``.

    Every parameter after the spectrum is keyword-only and annotated (int, float, bool, a Literal, list[float], or one
    of these or None); the annotations convert what YAML gives, so that 10000000 and 1e7 are one value with one hash.
    An int argument also takes the words ``trained_length`` and ``pretrained_length``.

    Args:
        name: of the method in chains.
        auto: arguments that take the word ``auto``, with the rule that resolves it.
        rebuilds: the method lays the spectrum out anew, so nothing but abf may stand before it.
        scaling: the method stretches a length that it names (or the pretrained one) by its ``factor``.
    """

    def register(function: Function) -> Function:
        if name in _METHODS:
            raise ValueError(f"method {name!r} is registered already; choose another name")
        hints = get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        method = Method(
            name=name,
            function=function,
            hints={p.name: hints[p.name] for p in parameters},
            defaults={p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty},
            auto=dict(auto or {}),
            rebuilds=rebuilds,
            scaling=scaling,
        )
        _METHODS[name] = method

        @wraps(function)
        def call(spectrum: Spectrum, **given: Any) -> Spectrum:
            return method(spectrum, **given)

        return call

    return register


def available_methods() -> tuple[str, ...]:
    """Names that a chain may use, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str) -> Method:
    """The method of that name, or ValueError with the nearest name and the list of those there are."""
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1)
        mend = f"did you mean {near[0]}? There are" if near else "use one of"
        raise ValueError(f"method={name!r} is not known; {mend}: {', '.join(available_methods())}")
    return _METHODS[name]


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether ``value`` is of ``kind``, and the value in it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is NoneType:
        return value is None, None
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if get_origin(kind) is list:
        items = [_convert(item, *get_args(kind)) for item in value] if isinstance(value, (list, tuple)) else []
        return isinstance(value, (list, tuple)) and all(fits for fits, _ in items), [item for _, item in items]
    if kind is float:
        return is_number, float(value) if is_number else None
    if kind is int:
        return is_number and float(value).is_integer(), int(value) if is_number else None
    return isinstance(value, kind), value


def _described(kind: Any, words: list[str]) -> str:
    names: list[str] = []
    for option in _options(kind):
        if get_origin(option) is Literal:
            names += get_args(option)
        elif option is NoneType:
            names.append("null")
        else:
            names.append(str(option) if get_origin(option) else option.__name__)
    names += words
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
