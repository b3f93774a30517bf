"""Methods that stop or slow the lowest frequencies, and one that rounds periods."""

from __future__ import annotations

import numpy as np

from ropewalk.rope.methods.checks import check, pairs_within
from ropewalk.rope.methods.windows import TaperDomain, Window, taper
from ropewalk.rope.registry import TRAINED_LENGTH, Tokens, register_method
from ropewalk.rope.spectrum import Spectrum


def recommended_clip(spectrum: Spectrum, length: int | None = None) -> int:
    """75% of the out-of-distribution pairs, rounded down (CoPE, arXiv 2602.05258): 20 at base 1e7 and 64k.

    Out of distribution are the pairs that rotate but never finish a turn in ``length`` tokens (None: the trained
    length), counted on the spectrum as it is given.
    """
    return 3 * spectrum.pairs_beyond(spectrum.trained_length if length is None else length) // 4


@register_method("cope", auto={"clip": recommended_clip}, clips=True)
def cope(
    spectrum: Spectrum, *, clip: int, window: Window = "raised_cosine", taper_domain: TaperDomain = "index"
) -> Spectrum:
    """Soft-clip the lowest frequencies with a raised cosine (CoPE, arXiv 2602.05258, section 4).

    theta_i w_j over the last n pairs, w_j = (1 + cos(pi j / (n-1))) / 2, j = 0..n-1.

    clip = n: pairs under the taper, 0..d/2, counted from the slowest that rotates, or ``auto`` for the paper's rule.
    The first keeps weight 1 and the last gets 0, so a clip of 20 changes 19 pairs and stops one; a clip of 1 changes
    nothing.
    window: the paper's raised cosine (Hann's), or another of :mod:`ropewalk.rope.methods.windows`.
    taper_domain: the paper writes the taper over frequency, its code runs it over the pair index; ``index`` is the
    code's, ``frequency`` is linear in frequency from the first clipped pair to the slowest.
    """
    pairs_within("cope", clip, spectrum)
    last = spectrum.rotating_pairs
    clipped = spectrum.inv_freq[last - clip : last]
    return spectrum.scale_lowest(taper(clipped, window, taper_domain))


@register_method("hardclip", auto={"clip": recommended_clip}, clips=True)
def hardclip(spectrum: Spectrum, *, clip: int) -> Spectrum:
    """Stop the ``clip`` slowest pairs that rotate, 0..d/2 or ``auto`` (the ablation of CoPE, arXiv 2602.05258)."""
    pairs_within("hardclip", clip, spectrum)
    return spectrum.scale_lowest(np.zeros(clip))


@register_method("p_rope")
def p_rope(spectrum: Spectrum, *, fraction: float) -> Spectrum:
    """Keep the highest ``fraction`` of the pairs, 0..1, rounded down; the rest do not rotate (arXiv 2410.06205)."""
    check(0 <= fraction <= 1, f"p_rope: fraction={fraction} must lie between 0 and 1; 1 keeps every pair")
    return _first_kept(spectrum, int(fraction * spectrum.inv_freq.size))


def _first_kept(spectrum: Spectrum, pairs: int) -> Spectrum:
    return spectrum.scaled(np.where(np.arange(spectrum.inv_freq.size) < pairs, 1.0, 0.0))


@register_method("hope")
def hope(spectrum: Spectrum, *, length: Tokens = TRAINED_LENGTH, share: float | None = None) -> Spectrum:
    """Stop the pairs that never finish a turn in L tokens (HoPE for text, Chen et al., arXiv 2410.21216).

    length = L, by default the training length. share, 0..1, stops that share of the pairs instead, the slowest ones,
    rounded down. The paper's own cut is not recoverable; it reports 50% at 1B and 80% at 3B parameters.
    """
    if share is not None:
        check(0 <= share <= 1, f"hope: share={share} must lie between 0 and 1; 1 stops every pair")
        return _first_kept(spectrum, spectrum.inv_freq.size - int(share * spectrum.inv_freq.size))
    check(length >= 1, f"hope: length={length} must be 1 token or more")
    return spectrum.scaled(np.where(spectrum.periods > length, 0.0, 1.0))


@register_method("resonance")
def resonance(spectrum: Spectrum) -> Spectrum:
    """Round each period to the nearest whole number of tokens, at least 1 (Resonance RoPE, arXiv 2403.00071).

    theta_i = 2 pi / round(2 pi / theta_i), so that a pair's phases repeat exactly; a stopped pair stays stopped.
    Halves round to the even number.
    """
    periods = np.maximum(np.rint(spectrum.periods), 1.0)
    rounded = np.where(np.isfinite(periods), 2 * np.pi / periods, spectrum.inv_freq)
    return spectrum.laid_out(rounded, spectrum.attention_scaling, spectrum.rotary_dim or 0)
