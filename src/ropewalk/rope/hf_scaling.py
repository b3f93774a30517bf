"""Scalings of a stock rope_parameters entry as steps of a chain, type by type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import UserError
from ropewalk.rope.values import flag, number, numbers

ORIGINAL = "original_max_position_embeddings"
STRETCHED = ("yarn", "llama3", "longrope", "su")  # the types that name the length they stretch
WITH_ALPHA = "dynamic with alpha"  # Hunyuan's own type; the entry calls it dynamic

Step = dict[str, Any]


@dataclass(frozen=True)
class Scaling:
    """The values that the steps of a rope_type follow from.

    Attributes:
        kind: rope_type.
        entry: the stock entry, as it stands.
        original: L, tokens: the entry's, the config's own, or else the served length.
        served_length: max_position_embeddings, tokens.
        share: of a head's pairs that rotates; ``proportional`` alone makes a step of it.
        is_layered: whether the entry is one layer type's of several.
    """

    kind: str
    entry: Mapping[str, Any]
    original: int
    served_length: int
    share: float
    is_layered: bool


def scaling_steps(scaling: Scaling) -> list[Step]:
    """The steps that transformers' function of that type takes.

    Raises:
        UserError: for a type that no chain expresses, or a value that is missing or wrong.
    """
    if scaling.kind not in _STEPS:
        raise UserError(f"rope_type={scaling.kind!r} is not read as a chain; known: {', '.join(KINDS)}")
    return _STEPS[scaling.kind](scaling)


def _linear(scaling: Scaling) -> list[Step]:
    return [_interpolation(scaling, _required(scaling, "factor"))]


def _interpolation(scaling: Scaling, factor: float) -> Step:
    """From the length that the entry names, else from the one that makes it reach the longest input served."""
    named = _positive(scaling.entry, ORIGINAL)
    return {"method": "pi", "factor": factor, ORIGINAL: int(named or max(scaling.served_length / factor, 1))}


def _dynamic(scaling: Scaling) -> list[Step]:
    # transformers takes the served length for L, whatever the entry holds
    return [{"method": "dynamic_ntk", "factor": _required(scaling, "factor"), ORIGINAL: scaling.served_length}]


def _alpha(scaling: Scaling) -> list[Step]:
    """Hunyuan's: base b alpha^(d/(d-2)) at every length; the length it starts from is not given."""
    return [{"method": "ntk", "factor": _required(scaling, "alpha"), ORIGINAL: None}]


def _proportional(scaling: Scaling) -> list[Step]:
    factor = _positive(scaling.entry, "factor") or 1.0
    slower = [_interpolation(scaling, factor)] if factor != 1.0 else []
    return [{"method": "p_rope", "fraction": scaling.share}, *slower]


def _llama3(scaling: Scaling) -> list[Step]:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return [{"method": "llama3", **{name: _required(scaling, name) for name in names}, ORIGINAL: scaling.original}]


def _yarn(scaling: Scaling) -> list[Step]:
    entry = scaling.entry
    # transformers takes null for the ratio of the lengths and refuses an entry without the key; so does this
    is_null = "factor" in entry and entry["factor"] is None
    factor = scaling.served_length / scaling.original if is_null else _required(scaling, "factor")
    step = {"method": "yarn", "factor": factor, ORIGINAL: scaling.original}
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        value = number(entry, name, "0 or a positive number; remove the key for the default", lambda value: value >= 0)
        if value:  # transformers treats a zero like an absent key
            step[name] = value
    step["attention_factor"] = _positive(entry, "attention_factor")
    if "truncate" in entry and not scaling.is_layered:  # it is not looked up in one layer type's entry
        step["truncate"] = bool(flag(entry, "truncate"))
    return [step]


def _longrope(scaling: Scaling) -> list[Step]:
    lists = {name: numbers(scaling.entry, name) for name in ("short_factor", "long_factor")}
    for name, factors in lists.items():
        if factors is None:
            raise UserError(f"rope_type={scaling.kind!r} has no {name}; write the published list, one number a pair")
    scalings = {name: _positive(scaling.entry, name) for name in ("factor", "attention_factor")}
    return [{"method": "longrope", **lists, **scalings, ORIGINAL: scaling.original}]


_STEPS: dict[str, Callable[[Scaling], list[Step]]] = {
    "default": lambda scaling: [],
    "linear": _linear,
    "dynamic": _dynamic,
    WITH_ALPHA: _alpha,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _longrope,
    "proportional": _proportional,
}
KINDS = tuple(kind for kind in _STEPS if kind not in (WITH_ALPHA, "su"))


def _positive(entry: Mapping[str, Any], key: str) -> float | None:
    return number(entry, key, "a positive number; remove the key for the default", lambda value: value > 0)


def _required(scaling: Scaling, key: str) -> float:
    value = _positive(scaling.entry, key)
    if value is None:
        fix = "NEW_LENGTH / ORIGINAL_LENGTH" if key == "factor" else "the published number"
        raise UserError(f"rope_type={scaling.kind!r} has no {key}; write {key}: {fix} beside it")
    return value
