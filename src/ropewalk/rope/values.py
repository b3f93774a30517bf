"""Values of a config.json, typed: a wrong one is a UserError that names its key, the rule and the fix."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from ropewalk.errors import UserError

_LEAST, _MOST = 1e-30, 1e30  # magnitudes whose logarithms, powers and quotients stay finite in float64
_LONGEST = 2**40  # tokens, channels


def wrong(key: str, value: Any, rule: str) -> UserError:
    """The error for a key whose value breaks ``rule``, which names the rule and the fix."""
    return UserError(f"config.json: {key}={reprlib.repr(value)} must be {rule}")


def number(
    values: Mapping[str, Any], key: str, rule: str = "a number", holds: Callable[[float], bool] = lambda value: True
) -> float | None:
    """A finite number for which ``holds``; None where the key is absent or null."""
    value = values.get(key)
    if value is None:
        return None
    if not _is_number(value) or not holds(value):
        raise wrong(key, value, rule)
    return float(value)


def whole(values: Mapping[str, Any], key: str, what: str = "tokens", most: int = _LONGEST) -> int | None:
    """A whole number from 1 to ``most``; None where the key is absent or null."""
    value = values.get(key)
    if value is None:
        return None
    if not _is_number(value) or not 1 <= value <= most or value != int(value):
        raise wrong(key, value, f"a whole number of {what} from 1 to {most:,}; write the model's own")
    return int(value)


def flag(values: Mapping[str, Any], key: str) -> bool | None:
    """True or false; None where the key is absent or null."""
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(key, value, "true or false; remove the key for the default")
    return value


def numbers(values: Mapping[str, Any], key: str) -> list[float] | None:
    """A list of positive numbers; None where the key is absent or null."""
    rule = "a list of positive numbers, one for each pair of channels that rotates"
    items = _items(values, key, rule, lambda item: _is_finite(item) and item > 0)
    return None if items is None else [float(item) for item in items]


def strings(values: Mapping[str, Any], key: str) -> list[str] | None:
    """A list of words; None where the key is absent or null."""
    return _items(values, key, "a list of words, one for each layer", lambda item: isinstance(item, str))


def _items(values: Mapping[str, Any], key: str, rule: str, fits: Callable[[Any], bool]) -> list[Any] | None:
    value = values.get(key)
    if value is not None and not (isinstance(value, (list, tuple)) and all(map(fits, value))):
        raise wrong(key, value, rule)
    return None if value is None else list(value)


def mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A JSON object; empty where the key is absent or null."""
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong(key, value, "an object of keys and values, or null; write it as the model was published")
    return dict(value)


def _is_finite(value: Any) -> bool:
    # by magnitude, since an integer may be too long for a float; a NaN compares as false
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def _is_number(value: Any) -> bool:
    return _is_finite(value) and (value == 0 or _LEAST <= abs(value) <= _MOST)
