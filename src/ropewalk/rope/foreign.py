"""Position settings in other people's config.json, read as a chain and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_THETA = 1e4  # what transformers takes for a Llama config without rope_theta

# Keys with which CoPE's published code selects the clip; no stock engine reads them.
REFERENCE_KEYS = ("use_cope", "cope_clip_n")


@dataclass(frozen=True)
class ForeignPosition:
    """What a config.json without our metadata says of position.

    Attributes:
        entry: its rope_parameters, or rope_scaling in the older form; keys as they stand there.
        theta: RoPE base.
        head_dim: channels of a head that rotate.
        pretrained_length: tokens before any scaling, where the entry tells, else the trained length.
        trained_length: max_position_embeddings, tokens.
        chain: the scaling as steps of a chain.
    """

    entry: dict[str, Any]
    theta: float
    head_dim: int
    pretrained_length: int
    trained_length: int
    chain: list[dict[str, Any]]


def read_foreign(config: Mapping[str, Any]) -> ForeignPosition:
    """Read a config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Where layers differ (Gemma 3), the entry of the full-attention layers is read.

    Raises:
        ValueError: for a scaling that no chain expresses, or a config without attention heads.
    """
    config = config.get("text_config") or config
    entry = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    layer_type = chain_layer(entry)
    if layer_type is not None:
        entry = dict(entry[layer_type])
    theta = float(entry.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA)
    head_dim = config.get("head_dim")
    if head_dim is None and not config.get("num_attention_heads"):
        raise ValueError("config.json names neither head_dim nor num_attention_heads; it is no rotary transformer's")
    head_dim = head_dim or config["hidden_size"] // config["num_attention_heads"]
    kind = entry.get("rope_type") or entry.get("type") or "default"
    partial = entry.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if not config.get("max_position_embeddings"):
        raise ValueError("config.json has no max_position_embeddings; write the length the model was trained at there")
    trained_length = int(config["max_position_embeddings"])
    # transformers gives the top-level key (Phi-3's place for it) the last word
    named = config.get("original_max_position_embeddings") or entry.get("original_max_position_embeddings")
    original = int(named or trained_length)
    return ForeignPosition(
        entry=entry,
        theta=theta,
        head_dim=head_dim if kind == "proportional" else int(head_dim * partial),
        pretrained_length=original,
        trained_length=trained_length,
        chain=_chain(kind, entry, original, partial),
    )


def chain_layer(entry: Mapping[str, Any]) -> str | None:
    """The layer type whose part of a rope_parameters entry a chain is about; None where all layers share one entry.

    Where layers differ (Gemma 3) it is full_attention, or the only type that rotates.

    Raises:
        ValueError: where several types rotate, each in its way, and none is full_attention.
    """
    kinds = [kind for kind, part in entry.items() if isinstance(part, Mapping)]
    if not kinds:
        return None
    first = "full_attention" if "full_attention" in kinds else kinds[0]
    if first != "full_attention" and any(entry[kind] != entry[first] for kind in kinds):
        raise ValueError(
            f"rope_parameters has entries for {', '.join(kinds)} that differ, and none for full_attention, whose the "
            "chain would be; name the layers to read full_attention"
        )
    return first


_LONGROPE = ("short_factor", "long_factor", "factor", "attention_factor")
_KEYS = {
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": _LONGROPE,
    "su": _LONGROPE,
}
_METHODS = {"dynamic": "dynamic_ntk", "yarn": "yarn", "llama3": "llama3", "longrope": "longrope", "su": "longrope"}


def _chain(kind: str, entry: Mapping[str, Any], original: int, partial: float) -> list[dict[str, Any]]:
    if kind == "default":
        return []
    if kind == "linear":
        return [_linear(entry, kind, original)]
    if kind == "proportional":
        slower = [_linear(entry, kind, original)] if entry.get("factor", 1.0) != 1.0 else []
        return [{"method": "p_rope", "fraction": partial}, *slower]
    if kind not in _METHODS:
        raise ValueError(
            f"rope_type={kind!r} is not read as a chain; known: default, linear, dynamic, yarn, llama3, longrope, "
            "proportional"
        )
    arguments = {key: entry[key] for key in _KEYS.get(kind, ()) if entry.get(key) is not None}
    if _METHODS[kind] != "longrope":
        arguments["factor"] = _factor(entry, kind)
    return [{"method": _METHODS[kind], **arguments, "original_max_position_embeddings": original}]


def _linear(entry: Mapping[str, Any], kind: str, original: int) -> dict[str, Any]:
    """Interpolation to max_position_embeddings, the longest input that a config promises."""
    factor = _factor(entry, kind)
    named = entry.get("original_max_position_embeddings")
    return {
        "method": "pi",
        "factor": factor,
        "original_max_position_embeddings": int(named or max(original // factor, 1)),
    }


def _factor(entry: Mapping[str, Any], kind: str) -> float:
    if entry.get("factor") is None:
        raise ValueError(f"rope_type={kind!r} has no factor; write factor: NEW_LENGTH / ORIGINAL_LENGTH beside it")
    return float(entry["factor"])
