"""Stock entries: a chain as the ``rope_parameters`` that unmodified transformers, vLLM and SGLang read."""

from __future__ import annotations

from typing import Any

import numpy as np

from ropewalk.rope.chain import RopeChain
from ropewalk.rope.notation import Step
from ropewalk.rope.spectrum import FloatArray, Spectrum, geometric

# A factor whose product with base^(2i/d) overflows float32 to infinity, whose reciprocal is exactly 0. Infinity itself
# is not JSON. Where base^(2i/d) is too small for that, the factor alone must overflow: 1e39 is a number in JSON, and
# infinite as soon as an engine puts it into float32.
ZERO_FACTOR = 1e38
ZERO_FACTOR_OF_FAST_PAIRS = 1e39
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_OVERFLOW = _FLOAT32_MAX / ZERO_FACTOR


def compile_to_stock(chain: RopeChain, spectrum: Spectrum, max_position_embeddings: int) -> dict[str, Any]:
    """The most specific stock entry that gives ``spectrum``: default, linear, llama3 or yarn, else longrope.

    Args:
        chain: the methods, every word resolved, for recognising a stock type.
        spectrum: what they give, at a declared length if a method depends on it.
        max_position_embeddings: N, the length the checkpoint serves, in tokens.
    """
    steps = chain.steps[1:] if chain.steps and chain.steps[0].method == "abf" else chain.steps
    base = _plain_base(spectrum)
    if base is not None and spectrum.attention_scaling == 1.0:
        return {"rope_type": "default", "rope_theta": base}
    if len(steps) == 1 and steps[0].method in _STOCK and _is_read_alike(steps[0]):
        return {"rope_theta": spectrum.theta, **_STOCK[steps[0].method](steps[0])}
    return longrope_entry(spectrum, max_position_embeddings)


def _plain_base(spectrum: Spectrum) -> float | None:
    """The base at which plain RoPE is this spectrum, to 1e-12; None: there is none that float32 holds.

    NTK-aware scaling is plain RoPE at another base, b s^(d/(d-2)), and so is whatever else keeps the series geometric.
    """
    slowest, d = spectrum.inv_freq[-1], spectrum.head_dim
    candidates = [spectrum.theta]
    if d > 2 and 0 < slowest < 1:
        candidates.append(float(np.exp(-np.log(slowest) * d / (d - 2))))
    for base in candidates:
        if base < _FLOAT32_MAX and np.allclose(spectrum.inv_freq, geometric(base, d), rtol=1e-12, atol=0.0):
            return base
    return None


def _is_read_alike(step: Step) -> bool:
    """True if every engine takes the same attention scaling from the stock type.

    vLLM's yarn takes 0.1 ln s + 1 and ignores attention_factor and the two mscale.
    """
    arguments = step.arguments
    has_own = arguments.get("attention_factor") or (arguments.get("mscale") and arguments.get("mscale_all_dim"))
    return step.method != "yarn" or not has_own


def _linear(step: Step) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": step.arguments["factor"]}


def _llama3(step: Step) -> dict[str, Any]:
    return {"rope_type": "llama3", **step.arguments}


def _yarn(step: Step) -> dict[str, Any]:
    return {"rope_type": "yarn", **{k: v for k, v in step.arguments.items() if v is not None}}


_STOCK = {"pi": _linear, "llama3": _llama3, "yarn": _yarn}


def stock_factors(spectrum: Spectrum) -> FloatArray:
    """Per-pair factors for ``longrope``: inv_freq_i = 1 / (factor_i base^(2i/d)).

    Returns:
        float64 (d/2,), every one finite as JSON; as float32 those of stopped pairs give a frequency of exactly 0.
    """
    base = geometric(spectrum.theta, spectrum.head_dim)
    with np.errstate(divide="ignore", over="ignore"):
        factors = base / spectrum.inv_freq
        stopped = np.where(1 / base > _OVERFLOW, ZERO_FACTOR, ZERO_FACTOR_OF_FAST_PAIRS)
    return np.where(spectrum.inv_freq == 0, stopped, factors)


def longrope_entry(spectrum: Spectrum, max_position_embeddings: int) -> dict[str, Any]:
    """Any spectrum as a ``longrope`` entry for a model that serves ``max_position_embeddings`` tokens.

    The short and the long list are equal and both lengths are N. So no engine switches between lists or adds a
    scaling of its own. transformers reads attention_factor, vLLM and SGLang the two mscale keys.
    """
    factors = stock_factors(spectrum).tolist()
    scaling = float(spectrum.attention_scaling)
    return {
        "rope_type": "longrope",
        "rope_theta": spectrum.theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
        "attention_factor": scaling,
        "short_mscale": scaling,
        "long_mscale": scaling,
    }
