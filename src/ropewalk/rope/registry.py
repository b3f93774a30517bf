"""Registry: the table of position methods, filled by ``@register_method``."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ropewalk.errors import UserError
from ropewalk.rope.spectrum import Spectrum

Function = Callable[..., Spectrum]

# Words that stand for a number in a chain; they resolve against the spectrum that the method is given.
LENGTHS = ("pretrained_length", "trained_length")
PRETRAINED_LENGTH: Any = "pretrained_length"
TRAINED_LENGTH: Any = "trained_length"
AUTO: Any = "auto"

# Annotation of an argument that counts tokens: it takes the two words as well.
Tokens = Annotated[int, "tokens"]


@dataclass(frozen=True)
class Method:
    """A registered method: its function, its arguments, and its place in a chain."""

    name: str
    function: Function
    hints: dict[str, Any]
    defaults: dict[str, Any]  # of the optional arguments
    auto: Mapping[str, Callable[[Spectrum], Any]]
    rebuilds: bool
    uses_base: bool
    clips: bool
    structural: bool
    reaches: Callable[[Mapping[str, Any], Spectrum], float] | None
    retired: Mapping[str, str]  # former arguments, with the way on

    @property
    def scaling(self) -> bool:
        """True if the method stretches a trained length."""
        return self.reaches is not None

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The canonical arguments: defaults filled in, numbers in their annotated type, words as they stand.

        Raises:
            UserError: for an unknown, retired or missing argument, or a value that is not of the annotated type.
        """
        given = {name: value for name, value in given.items() if name not in self.retired or value is not None}
        for retired in given.keys() & self.retired.keys():
            raise UserError(f"{self.name}: {retired}={_shown(given[retired])} is refused: {self.retired[retired]}")
        for unknown in given.keys() - self.hints.keys():
            takes = ", ".join(self.hints) or "nothing"
            raise UserError(f"{self.name}: {unknown}={_shown(given[unknown])} is not an argument; it takes: {takes}")
        resolved = {}
        for name in self.hints:
            if name not in given and name not in self.defaults:
                raise UserError(f"{self.name}: {name} is not given and has no default; write it beside the method")
            resolved[name] = self._converted(name, given[name]) if name in given else self.defaults[name]
        return resolved

    def resolved(self, given: Mapping[str, Any], spectrum: Spectrum) -> dict[str, Any]:
        """The canonical arguments with every word replaced by its value for ``spectrum``."""
        arguments = self.arguments(given)
        for name, value in arguments.items():
            if isinstance(value, str) and value in LENGTHS:
                is_optional = NoneType in _options(self.hints[name])
                arguments[name] = vars(spectrum)[value] if is_optional else getattr(spectrum, value)
            elif isinstance(value, str) and value == AUTO and name in self.auto:
                arguments[name] = self._converted(name, self.auto[name](spectrum))
        return arguments

    def __call__(self, spectrum: Spectrum, **given: Any) -> Spectrum:
        """Run the method on ``spectrum`` with the arguments of a chain."""
        return self.function(spectrum, **self.resolved(given, spectrum))

    def _converted(self, name: str, value: Any) -> Any:
        options = _options(self.hints[name])
        words = [AUTO] * (name in self.auto) + list(LENGTHS) * (Tokens in options)
        if isinstance(value, str) and value in words:
            return value
        for option in options:
            fits, converted = _convert(value, option)
            if fits:
                return converted
        fix = "; it is text, write 1.0e7 where YAML would read 1e7 so" if _is_numeral(value) else ""
        raise UserError(f"{self.name}: {name}={_shown(value)} must be {_described(options, words)}{fix}")


_METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    auto: Mapping[str, Callable[[Spectrum], Any]] | None = None,
    rebuilds: bool = False,
    uses_base: bool = True,
    clips: bool = False,
    structural: bool = False,
    reaches: Callable[[Mapping[str, Any], Spectrum], float] | None = None,
    retired: Mapping[str, str] | None = None,
) -> Callable[[Function], Function]:
    """Make ``method(spectrum, *, ...)`` usable in chains as ``{"method": name, ...}``.

    Every parameter after the spectrum is keyword-only and annotated: int, float, bool, a Literal, list[float], Tokens,
    or one of these or None. The annotations convert YAML's values, so that 10000000 and 1e7 are one value with one
    hash. A Tokens argument is an int that also takes the words ``trained_length`` and ``pretrained_length``.

    Args:
        name: of the method in chains.
        auto: arguments that take the word ``auto``, with the rule that resolves it.
        rebuilds: the method lays the spectrum out anew, so nothing but abf may stand before it.
        uses_base: of a method that rebuilds: it reads the base, so abf may stand before it.
        clips: the method slows or stops the ``clip`` slowest pairs; a chain takes one of these.
        structural: the method changes no frequency and says what stands beside them (axes, layers, the factor on
            queries); a chain takes one of these, as its first step, and a model's own stays where a chain lays the
            spectrum out anew.
        reaches: of a method that stretches a trained length, the rule that gives the tokens it reaches from its
            arguments, which include ``original_max_position_embeddings``; mostly ``stretched``.
        retired: former arguments that saved chains may hold, each with the reason and the fix; a null is dropped.

    Raises:
        ValueError: at registration, for a name that is taken or cannot be written in a chain, a parameter of another
            form, or a rule for an argument that does not exist.
    """

    def register(function: Function) -> Function:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        hints = get_type_hints(function, include_extras=True)
        method = Method(
            name=name,
            function=function,
            hints={p.name: hints.get(p.name) for p in parameters},
            defaults={p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty},
            auto=dict(auto or {}),
            rebuilds=rebuilds,
            uses_base=uses_base,
            clips=clips,
            structural=structural,
            reaches=reaches,
            retired=dict(retired or {}),
        )
        _check_registration(method, parameters)
        _METHODS[name] = method

        @wraps(function)
        def call(spectrum: Spectrum, **given: Any) -> Spectrum:
            return method(spectrum, **given)

        return call

    return register


def stretched(arguments: Mapping[str, Any], spectrum: Spectrum) -> float:
    """Tokens that a scaling reaches: L x factor, L the original_max_position_embeddings that it starts from.

    0 where L is not known (a caller's own vector).
    """
    return float((arguments["original_max_position_embeddings"] or 0) * arguments["factor"])


def _check_registration(method: Method, parameters: list[inspect.Parameter]) -> None:
    name = method.name
    if name in _METHODS:
        raise ValueError(f"method {name!r} is registered already; choose another name")
    if not name.isidentifier() or name == "rope":
        raise ValueError(f"method {name!r} cannot stand in a chain; name it by letters, digits and _, and not rope")
    for parameter in parameters:
        options = _options(method.hints[parameter.name])
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.name == "method":
            raise ValueError(f"{name}: parameter {parameter} must be keyword-only: write * after the spectrum")
        if not all(option in _KINDS or get_origin(option) is Literal for option in options):
            raise ValueError(
                f"{name}: parameter {parameter} must be annotated int, float, bool, Tokens, a Literal, list[float], or "
                "one of these or None"
            )
    if method.clips and "clip" not in method.hints:
        raise ValueError(f"{name}: a method with clips takes clip, the number of pairs it acts on")
    for argument in method.auto.keys() - method.hints.keys():
        raise ValueError(f"{name}: auto has a rule for {argument}, which is not a parameter of the function")
    if method.scaling and "original_max_position_embeddings" not in method.hints:
        raise ValueError(f"{name}: a method with reaches takes original_max_position_embeddings, its start in tokens")


def available_methods() -> tuple[str, ...]:
    """Names that a chain may use, sorted."""
    return tuple(sorted(_METHODS))


def get_method(name: str) -> Method:
    """The method of that name, or UserError with the nearest name and the list of all."""
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "use one of"
        raise UserError(f"method={name!r} is not known; {hint}: {', '.join(available_methods())}")
    return _METHODS[name]


_KINDS = (int, float, bool, Tokens, NoneType, list[float], list[int])


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _convert(value: Any, kind: Any) -> tuple[bool, Any]:
    """A flag, ``value`` is of ``kind``, and the value in it; numpy's numbers and arrays count as Python's."""
    if kind is NoneType:
        return value is None, None
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if get_origin(kind) is list:
        return _convert_items(value, *get_args(kind))
    if kind is bool:
        is_bool = type(value).__name__ in ("bool", "bool_")  # numpy's too
        return is_bool, bool(value) if is_bool else None
    try:
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        is_number = False
    if kind is float:
        return is_number, float(value) if is_number else None
    return is_number and float(value).is_integer(), int(value) if is_number else None


def _convert_items(value: Any, kind: Any) -> tuple[bool, Any]:
    """Any sequence but text: lists, tuples, arrays, OmegaConf's lists."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return False, None
    items = [_convert(item, kind) for item in value]
    return all(fits for fits, _ in items), [item for _, item in items]


def _is_numeral(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _shown(value: Any) -> str:
    """The value as an error prints it; a long one is cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _described(options: tuple[Any, ...], words: list[str]) -> str:
    names: list[str] = []
    for option in options:
        if get_origin(option) is Literal:
            names += get_args(option)
        elif option is NoneType:
            names.append("null")
        elif option == Tokens:
            names += [] if "float" in names else ["int"]
        else:
            names.append(str(option) if get_origin(option) else option.__name__)
    names += words
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
