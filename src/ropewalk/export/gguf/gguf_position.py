"""The position of a model in llama.cpp's keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.rope import Position
from ropewalk.rope.position import stock_factors

FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufPosition:
    """Position in the words of a GGUF file.

    Attributes:
        freq_base: RoPE base.
        factors: float32 (rotating channels / 2,), freq_i = base^(-2i/d) / factor_i; None: all 1, not written.
        attn_factor: multiplies cos and sin; None: 1, not written.
        scaling: rope.scaling.* keys of llama.cpp's own scalings (linear, yarn).
        dimensions: channels of a head that rotate.
    """

    freq_base: float
    factors: NDArray[np.float32] | None
    attn_factor: float | None
    scaling: dict[str, Any]
    dimensions: int


def gguf_position(position: Position, served: int) -> GgufPosition:
    """The position of a model that serves ``served`` tokens, for llama.cpp.

    It knows ``linear``, and ``yarn`` with the truncated ramp; every other scaling is written as factors, for which no
    rope.scaling.type may be set, since ``longrope`` without its own tensors runs as plain RoPE.
    """
    stock, dimensions = position.rope_parameters(served), position.head_dim
    base = float(stock["rope_theta"])
    if stock["rope_type"] == "default":
        return GgufPosition(base, None, None, {}, dimensions)
    if stock["rope_type"] == "linear":
        return GgufPosition(base, None, None, {"type": "linear", "factor": float(stock["factor"])}, dimensions)
    if stock["rope_type"] == "yarn" and stock.get("truncate", True):
        return GgufPosition(base, None, None, _yarn(stock), dimensions)
    spectrum = position.spectrum()
    with np.errstate(over="ignore"):  # 1e39 is meant to become infinite
        factors: NDArray[np.float32] = stock_factors(spectrum).astype(np.float32)
    attention = float(spectrum.attention_scaling)
    return GgufPosition(spectrum.theta, factors, None if attention == 1 else attention, {}, dimensions)


def _yarn(stock: dict[str, Any]) -> dict[str, Any]:
    scaling = {
        "type": "yarn",
        "factor": float(stock["factor"]),
        "original_context_length": int(stock["original_max_position_embeddings"]),
    }
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = float(stock.get(key) or default)
        if value != default:
            scaling[f"yarn_{key}"] = value
    return scaling
