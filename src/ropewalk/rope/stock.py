"""A chain as the ``rope_parameters`` that unmodified transformers, vLLM and SGLang read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ropewalk.rope.spectrum import Spectrum, geometric

if TYPE_CHECKING:
    from ropewalk.rope.chain import RopeChain, Step

# 1e38 * base^(2i/d) overflows float32 to infinity, whose reciprocal is exactly 0; infinity itself is not JSON.
ZERO_FACTOR = 1e38
_OVERFLOW = float(np.finfo(np.float32).max) / ZERO_FACTOR


def compile_to_stock(chain: RopeChain, spectrum: Spectrum, max_position_embeddings: int) -> dict[str, Any]:
    """The most specific stock entry that gives ``spectrum``: default, linear, llama3 or yarn, else longrope.

    Args:
        chain: the methods, for recognising a stock type.
        spectrum: what they give, at a declared length if a method depends on it.
        max_position_embeddings: N, the length the checkpoint serves, in tokens.

    Raises:
        ValueError: where a frequency of exactly zero cannot be expressed in float32.
    """
    steps = chain.steps[1:] if chain.steps and chain.steps[0].method == "abf" else chain.steps
    if not steps:
        return {"rope_type": "default", "rope_theta": spectrum.theta}
    if len(steps) == 1 and steps[0].method in _STOCK:
        return {"rope_theta": spectrum.theta, **_STOCK[steps[0].method](steps[0])}
    return _longrope(spectrum, max_position_embeddings)


def _linear(step: Step) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": step.arguments["factor"]}


def _llama3(step: Step) -> dict[str, Any]:
    return {"rope_type": "llama3", **step.arguments}


def _yarn(step: Step) -> dict[str, Any]:
    return {"rope_type": "yarn", **{k: v for k, v in step.arguments.items() if v is not None}}


_STOCK = {"pi": _linear, "llama3": _llama3, "yarn": _yarn}


def _longrope(spectrum: Spectrum, max_position_embeddings: int) -> dict[str, Any]:
    """Per-pair factors: inv_freq_i = 1 / (factor_i * theta^(2i/d)).

    The short and the long list are equal and both lengths are N, so no engine switches between lists or adds a
    scaling of its own. transformers reads attention_factor, vLLM and SGLang the two mscale keys.
    """
    base = geometric(spectrum.theta, spectrum.head_dim)
    zero = spectrum.inv_freq == 0
    too_fast = zero & (1 / base <= _OVERFLOW)
    if too_fast.any():
        pair = int(np.flatnonzero(too_fast)[0])
        raise ValueError(
            f"pair {pair} is stopped, but its base^(2i/d) = {1 / base[pair]:.3g} is not above {_OVERFLOW:.2f}, so that "
            "1e38 times it stays finite in float32 and the pair would still turn; stop fewer pairs or raise the base"
        )
    with np.errstate(divide="ignore"):
        factors = np.where(zero, ZERO_FACTOR, base / spectrum.inv_freq)
    scaling = float(spectrum.attention_scaling)
    return {
        "rope_type": "longrope",
        "rope_theta": spectrum.theta,
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
        "attention_factor": scaling,
        "short_mscale": scaling,
        "long_mscale": scaling,
    }
