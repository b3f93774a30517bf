"""Position methods: pure functions Spectrum -> Spectrum.

i = 0..d/2-1 counts the pairs, theta_i is the i-th frequency as the method finds it, b the base, L the length that the
method names, s the scaling factor (new over old length).
"""

from __future__ import annotations

import math

import numpy as np

from ropewalk.rope.registry import register_method
from ropewalk.rope.spectrum import FloatArray, Spectrum


@register_method("abf")
def abf(spectrum: Spectrum, *, theta: float) -> Spectrum:
    """Adjust the base frequency: the geometric spectrum of base ``theta`` (arXiv 2309.16039, section 2).

    It rebuilds the spectrum, so it stands first in a chain. theta > 1.
    """
    if theta <= 1:
        raise ValueError(f"abf: theta={theta} must be above 1; Llama-3 has 5e5, CoPE's 64k recipe 1e7")
    return spectrum.rebased(theta)


@register_method("pi")
def pi(spectrum: Spectrum, *, factor: float) -> Spectrum:
    """Position interpolation: theta_i / s (arXiv 2306.15595, equation 4). factor = s >= 1."""
    _at_least_one("pi", factor)
    return spectrum.scaled(1.0 / factor)


@register_method("ntk")
def ntk(spectrum: Spectrum, *, factor: float) -> Spectrum:
    """NTK-aware scaling: base b * s^(d/(d-2)) (stated in YaRN, arXiv 2309.00071, section 3.1). factor = s >= 1.

    In place of a new base each theta_i is multiplied by s^(-2i/(d-2)), which is the same for RoPE's own spectrum
    and leaves a clip that stands earlier in the chain intact. The slowest pair is slowed by exactly s.
    """
    _at_least_one("ntk", factor)
    pairs = np.arange(spectrum.inv_freq.size, dtype=np.float64)
    return spectrum.scaled(factor ** (-2 * pairs / (spectrum.head_dim - 2)))


def yarn_ramp(spectrum: Spectrum, length: int, beta_fast: float, beta_slow: float, truncate: bool = True) -> FloatArray:
    """YaRN's ramp over pairs: 0 where theta_i is kept, 1 where it is interpolated (arXiv 2309.00071, section 3.2).

    The pair that turns r times in ``length`` tokens is c(r) = d ln(length / (2 pi r)) / (2 ln b). The ramp runs from
    c(beta_fast) to c(beta_slow), rounded outwards if ``truncate``, within [0, d-1].

    Returns:
        float64 (d/2,) in [0, 1].
    """
    head_dim = spectrum.head_dim

    def pair_of(turns: float) -> float:
        return head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(spectrum.theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero; the library's own value
    pairs = np.arange(head_dim // 2, dtype=np.float64)
    return np.clip((pairs - low) / (high - low), 0.0, 1.0)


@register_method("ntk_by_parts")
def ntk_by_parts(
    spectrum: Spectrum,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Spectrum:
    """Interpolate slow pairs, keep fast ones, ramp between them (arXiv 2309.00071, section 3.2).

    theta_i (1 - ramp_i) + theta_i / s ramp_i, the ramp by pair index at L = original_max_position_embeddings tokens.
    factor = s >= 1.
    """
    _at_least_one("ntk_by_parts", factor)
    ramp = yarn_ramp(spectrum, original_max_position_embeddings, beta_fast, beta_slow, truncate)
    return spectrum.scaled((1 - ramp) + ramp / factor)


@register_method("yarn")
def yarn(
    spectrum: Spectrum,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
) -> Spectrum:
    """YaRN: ntk_by_parts with the attention scaling 0.1 ln s + 1 (arXiv 2309.00071, sections 3.2 and 3.4).

    original_max_position_embeddings (L, tokens) has no fallback: the ramp depends on it. factor = s >= 1.
    attention_factor replaces 0.1 ln s + 1 where given.
    """
    _at_least_one("yarn", factor)
    ramp = yarn_ramp(spectrum, original_max_position_embeddings, beta_fast, beta_slow, truncate)
    scaling = 0.1 * math.log(factor) + 1.0 if attention_factor is None else attention_factor
    return spectrum.scaled((1 - ramp) + ramp / factor, attention_scaling=scaling)


@register_method("llama3")
def llama3(
    spectrum: Spectrum,
    *,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_position_embeddings: int = 8192,
) -> Spectrum:
    """Llama 3.1's scaling, by wavelength (arXiv 2407.21783 and its published configuration).

    Pairs longer than L / low_freq_factor are divided by s, those shorter than L / high_freq_factor kept, those
    between blended linearly in L / wavelength. factor = s >= 1.
    """
    _at_least_one("llama3", factor)
    if high_freq_factor <= low_freq_factor:
        raise ValueError(f"llama3: high_freq_factor={high_freq_factor} must exceed low_freq_factor={low_freq_factor}")
    turns = original_max_position_embeddings * spectrum.inv_freq / (2 * np.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return spectrum.scaled(kept + (1 - kept) / factor)


def raised_cosine(clip: int) -> FloatArray:
    """w_j = (1 + cos(pi j / (n-1))) / 2 for j = 0..n-1, n = clip: 1 at the first pair, exactly 0 at the last.

    A clip of 1 is [1]: the taper starts at weight 1, so a single pair is untouched.
    """
    if clip < 2:
        return np.ones(clip)
    weights = 0.5 * (1 + np.cos(np.pi * np.arange(clip) / (clip - 1)))
    weights[-1] = 0.0
    return weights


@register_method("cope")
def cope(spectrum: Spectrum, *, clip: int) -> Spectrum:
    """Soft-clip the lowest frequencies with a raised cosine (CoPE, arXiv 2602.05258, section 4).

    clip: lowest-frequency pairs under the taper, 0..d/2; the first keeps weight 1, the last gets 0, so a clip of 20
    changes 19 pairs and stops one.
    """
    _pairs("cope", clip, spectrum)
    return spectrum.scale_lowest(raised_cosine(clip))


@register_method("hardclip")
def hardclip(spectrum: Spectrum, *, clip: int) -> Spectrum:
    """Set the ``clip`` lowest frequencies, 0..d/2, to zero (the ablation of CoPE, arXiv 2602.05258)."""
    _pairs("hardclip", clip, spectrum)
    return spectrum.scale_lowest(np.zeros(clip))


@register_method("p_rope")
def p_rope(spectrum: Spectrum, *, fraction: float) -> Spectrum:
    """Keep the highest ``fraction`` of the pairs, 0..1, rounded down; the rest do not rotate (arXiv 2410.06205)."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"p_rope: fraction={fraction} must lie between 0 and 1")
    return spectrum.scale_lowest(np.zeros(spectrum.inv_freq.size - int(fraction * spectrum.inv_freq.size)))


def _at_least_one(method: str, factor: float) -> None:
    if factor < 1:
        raise ValueError(f"{method}: factor={factor} must be 1 or more; it is the new length over the old")


def _pairs(method: str, clip: int, spectrum: Spectrum) -> None:
    pairs = spectrum.inv_freq.size
    if not 0 <= clip <= pairs:
        raise ValueError(
            f"{method}: clip={clip} is not within the {pairs} pairs of head_dim={spectrum.head_dim}; use 0..{pairs}"
        )
