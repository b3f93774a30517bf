"""Methods that stretch a trained length: every pair, or the slow ones, turn slower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ropewalk.rope.methods.checks import at_least_one, check, positive_length, rotary_dim_of
from ropewalk.rope.registry import PRETRAINED_LENGTH, TRAINED_LENGTH, Tokens, register_method, stretched
from ropewalk.rope.spectrum import FloatArray, Spectrum


@register_method("pi", reaches=stretched)
def pi(
    spectrum: Spectrum, *, factor: float, original_max_position_embeddings: Tokens | None = PRETRAINED_LENGTH
) -> Spectrum:
    """Position interpolation: theta_i / s (arXiv 2306.15595, equation 4).

    factor = s >= 1; original_max_position_embeddings, the tokens it stretches from, is recorded and changes nothing.
    """
    at_least_one("pi", factor)
    positive_length("pi", original_max_position_embeddings)
    return spectrum.scaled(1.0 / factor)


def _ntk(spectrum: Spectrum, method: str, factor: float) -> Spectrum:
    """theta_i s^(-2i/(d-2)): the base b s^(d/(d-2)), without laying the spectrum out anew."""
    pairs = np.arange(spectrum.inv_freq.size, dtype=np.float64)
    return spectrum.scaled(factor ** (-2 * pairs / max(rotary_dim_of(method, spectrum) - 2, 1)))


@register_method("ntk", reaches=stretched)
def ntk(
    spectrum: Spectrum, *, factor: float, original_max_position_embeddings: Tokens | None = PRETRAINED_LENGTH
) -> Spectrum:
    """NTK-aware scaling: base b s^(d/(d-2)) (stated in YaRN, arXiv 2309.00071, section 3.1).

    In place of a new base each theta_i is multiplied by s^(-2i/(d-2)), which is the same for RoPE's own spectrum
    and leaves a clip that stands earlier in the chain intact. The slowest pair is slowed by exactly s; d counts the
    channels that RoPE is laid out over. factor = s >= 1. original_max_position_embeddings, the tokens it stretches
    from, is recorded and changes nothing.
    """
    at_least_one("ntk", factor)
    positive_length("ntk", original_max_position_embeddings)
    return _ntk(spectrum, "ntk", factor)


def _followed(arguments: Mapping[str, Any], spectrum: Spectrum) -> float:
    """dynamic_ntk follows the input, so it reaches at least the trained length."""
    return max(stretched(arguments, spectrum), spectrum.present_length)


@register_method("dynamic_ntk", reaches=_followed)
def dynamic_ntk(spectrum: Spectrum, *, factor: float, original_max_position_embeddings: Tokens) -> Spectrum:
    """NTK-aware scaling that follows the input's length: base b (f len/L - (f-1))^(d/(d-2)) (arXiv 2309.00071, 3.3).

    len is the present length, at least L; up to L nothing changes. original_max_position_embeddings = L, tokens.
    factor = f >= 1 (transformers' ``dynamic``).
    """
    at_least_one("dynamic_ntk", factor)
    positive_length("dynamic_ntk", original_max_position_embeddings)
    over = max(spectrum.present_length / original_max_position_embeddings, 1.0)
    return _ntk(spectrum, "dynamic_ntk", factor * over - (factor - 1))


def yarn_ramp(spectrum: Spectrum, length: int, beta_fast: float, beta_slow: float, truncate: bool = True) -> FloatArray:
    """YaRN's ramp over pairs: 0 where theta_i is kept, 1 where it is interpolated (arXiv 2309.00071, section 3.2).

    The pair that turns r times in ``length`` tokens is c(r) = d ln(length / (2 pi r)) / (2 ln b), d the channels that
    RoPE is laid out over. The ramp runs from c(beta_fast) to c(beta_slow), rounded outwards if ``truncate``, within
    [0, d-1].

    Returns:
        float64 (d/2,) in [0, 1].
    """
    low, high = yarn_ramp_ends(spectrum, length, beta_fast, beta_slow, truncate)
    if low == high:
        high += 0.001  # a step, without dividing by zero; the library's own value
    pairs = np.arange(spectrum.head_dim // 2, dtype=np.float64)
    return np.clip((pairs - low) / (high - low), 0.0, 1.0)


def yarn_ramp_ends(
    spectrum: Spectrum, length: int, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True
) -> tuple[float, float]:
    """The pair indices between which YaRN's ramp rises from 0 to 1."""
    dim = rotary_dim_of("yarn's ramp", spectrum)

    def pair_of(turns: float) -> float:
        return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(spectrum.theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


@register_method("ntk_by_parts", reaches=stretched)
def ntk_by_parts(
    spectrum: Spectrum,
    *,
    factor: float,
    original_max_position_embeddings: Tokens,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Spectrum:
    """Interpolate slow pairs, keep fast ones, ramp between them (arXiv 2309.00071, section 3.2).

    theta_i (1 - ramp_i) + theta_i / s ramp_i, the ramp by pair index at L = original_max_position_embeddings tokens.
    factor = s >= 1; beta_fast >= beta_slow > 0 are turns in L.
    """
    at_least_one("ntk_by_parts", factor)
    positive_length("ntk_by_parts", original_max_position_embeddings)
    _ordered_betas("ntk_by_parts", beta_fast, beta_slow)
    ramp = yarn_ramp(spectrum, original_max_position_embeddings, beta_fast, beta_slow, truncate)
    return spectrum.scaled((1 - ramp) + ramp / factor)


@register_method("yarn", reaches=stretched)
def yarn(
    spectrum: Spectrum,
    *,
    factor: float,
    original_max_position_embeddings: Tokens,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
) -> Spectrum:
    """YaRN: ntk_by_parts with the attention scaling 0.1 ln s + 1 (arXiv 2309.00071, sections 3.2 and 3.4).

    original_max_position_embeddings (L, tokens) has no fallback: the ramp depends on it. factor = s >= 1.
    beta_fast >= beta_slow > 0 are turns in L; ``truncate`` rounds the ramp's ends outwards to whole pairs.
    attention_factor, where given, is the attention scaling. With both mscale and mscale_all_dim it is
    (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1), DeepSeek's form (arXiv 2405.04434's code). One of these
    alone is without effect, as in transformers.
    """
    at_least_one("yarn", factor)
    positive_length("yarn", original_max_position_embeddings)
    _ordered_betas("yarn", beta_fast, beta_slow)
    ramp = yarn_ramp(spectrum, original_max_position_embeddings, beta_fast, beta_slow, truncate)
    if attention_factor is not None:
        check(attention_factor > 0, f"yarn: attention_factor={attention_factor} must be positive; null computes it")
        scaling = attention_factor
    elif mscale and mscale_all_dim:
        check(
            min(mscale, mscale_all_dim) > 0,
            f"yarn: mscale={mscale} and mscale_all_dim={mscale_all_dim} must be positive; DeepSeek-V2 has 0.707 twice",
        )
        scaling = _log_scaling(factor, mscale) / _log_scaling(factor, mscale_all_dim)
    else:
        scaling = _log_scaling(factor)
    return spectrum.scaled((1 - ramp) + ramp / factor, attention_scaling=scaling)


def _log_scaling(factor: float, mscale: float = 1.0) -> float:
    """YaRN's 0.1 m ln s + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0


def _ordered_betas(method: str, fast: float, slow: float) -> None:
    check(
        fast >= slow > 0,
        f"{method}: beta_fast={fast} and beta_slow={slow} are turns in the original length, so fast >= slow > 0; the "
        "paper has 32 and 1",
    )


@register_method("llama3", reaches=stretched)
def llama3(
    spectrum: Spectrum,
    *,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position_embeddings: Tokens = 8192,
) -> Spectrum:
    """Llama 3.1's scaling, by wavelength (arXiv 2407.21783 and its published configuration).

    Pairs longer than L / low_freq_factor are divided by s, those shorter than L / high_freq_factor kept, those
    between blended linearly in L / wavelength. factor = s >= 1; high_freq_factor > low_freq_factor > 0.
    """
    at_least_one("llama3", factor)
    positive_length("llama3", original_max_position_embeddings)
    check(
        high_freq_factor > low_freq_factor > 0,
        f"llama3: high_freq_factor={high_freq_factor} must exceed low_freq_factor={low_freq_factor}, both positive",
    )
    turns = spectrum.turns(original_max_position_embeddings)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return spectrum.scaled(kept + (1 - kept) / factor)


def _declared(arguments: Mapping[str, Any], spectrum: Spectrum) -> float:
    """longrope stretches to the length that it names, or by its factor."""
    named = arguments["factor"] is None
    return float(arguments["max_position_embeddings"] or 0) if named else stretched(arguments, spectrum)


@register_method("longrope", reaches=_declared)
def longrope(
    spectrum: Spectrum,
    *,
    short_factor: list[float],
    long_factor: list[float],
    original_max_position_embeddings: Tokens,
    max_position_embeddings: Tokens | None = TRAINED_LENGTH,
    factor: float | None = None,
    attention_factor: float | None = None,
) -> Spectrum:
    """LongRoPE: theta_i / factor_i, one searched factor a pair (arXiv 2402.13753; Phi-3's configuration).

    short_factor up to L = original_max_position_embeddings tokens of present input, long_factor past it, each d/2
    positive numbers. The attention scaling is attention_factor, or sqrt(1 + ln s / ln L); 1 where s <= 1. There
    s = factor >= 1, by default max_position_embeddings (tokens, the trained length) over L. It is the same for both
    lists, as in transformers. A factor whose product with the period's base^(2i/d) overflows float32 stops the pair,
    as it does in every stock engine.
    """
    positive_length("longrope", original_max_position_embeddings)
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        check(
            len(factors) == spectrum.inv_freq.size and min(factors) > 0,
            f"longrope: {name} has {len(factors)} numbers, the least {min(factors, default=0)}; it takes one positive "
            f"factor for each of the {spectrum.inv_freq.size} pairs",
        )
    if factor is not None:
        at_least_one("longrope", factor)
    check(
        attention_factor is None or attention_factor > 0,
        f"longrope: attention_factor={attention_factor} must be positive; null computes it",
    )
    is_long = spectrum.present_length > original_max_position_embeddings
    if attention_factor is None:
        stretch = factor or _stretch(max_position_embeddings, original_max_position_embeddings)
        is_stretched = stretch > 1 and original_max_position_embeddings > 1
        log_ratio = math.log(stretch) / math.log(original_max_position_embeddings) if is_stretched else 0.0
        attention_factor = math.sqrt(1 + log_ratio)
    chosen = np.array(long_factor if is_long else short_factor)
    with np.errstate(divide="ignore", over="ignore"):
        denominators = chosen.astype(np.float32) * (1.0 / spectrum.inv_freq).astype(np.float32)
    return spectrum.scaled(np.where(np.isinf(denominators), 0.0, 1.0 / chosen), attention_factor)


def _stretch(longest: int | None, original: int) -> float:
    check(
        longest is not None and longest >= 1,
        f"longrope: max_position_embeddings={longest} must be 1 token or more where neither factor nor "
        "attention_factor is given",
    )
    assert longest is not None
    return longest / original


def _mixed(spectrum: Spectrum, method: str, factor: float, length: int, progressive: bool) -> Spectrum:
    """theta_i s^(-p): p rises from 0 at the last pair turning over 32 times to 1 at the first turning under once."""
    at_least_one(method, factor)
    positive_length(method, length)
    turns = spectrum.turns(length)
    fast, slow = np.flatnonzero(turns > 32), np.flatnonzero(turns < 1)
    low = int(fast[-1]) if fast.size else -1
    high = int(slow[0]) if slow.size else turns.size
    width = max(high - low, 1)
    offset = np.clip(np.arange(turns.size) - low, 0, width)
    exponent = offset * (offset + 1) / (width * (width + 1)) if progressive else offset / width
    return spectrum.scaled(factor**-exponent, attention_scaling=_log_scaling(factor))


@register_method("mrrope_pro", reaches=stretched)
def mrrope_pro(spectrum: Spectrum, *, factor: float, original_max_position_embeddings: Tokens) -> Spectrum:
    """MrRoPE, progressive mixing of radices: theta_i s^(-q(q+1)/(n(n+1))), attention scaling 0.1 ln s + 1.

    L = original_max_position_embeddings tokens. l is the last pair that turns more than 32 times in L (-1: none does).
    h is the first pair that turns less than once (d/2: none does). n = h - l, q = clip(i - l, 0, n), factor = s >= 1.
    """
    return _mixed(spectrum, "mrrope_pro", factor, original_max_position_embeddings, progressive=True)


@register_method("mrrope_uni", reaches=stretched)
def mrrope_uni(spectrum: Spectrum, *, factor: float, original_max_position_embeddings: Tokens) -> Spectrum:
    """MrRoPE, uniform mixing of radices: theta_i s^(-q/n), attention scaling 0.1 ln s + 1; see mrrope_pro."""
    return _mixed(spectrum, "mrrope_uni", factor, original_max_position_embeddings, progressive=False)
