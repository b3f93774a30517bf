"""Methods that stop or slow the lowest frequencies, with the windows of a soft clip, and one that rounds periods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from ropewalk.rope.methods.checks import check
from ropewalk.rope.registry import TRAINED_LENGTH, Tokens, register_method
from ropewalk.rope.spectrum import FloatArray, Spectrum

Window = Literal["raised_cosine", "quarter_cosine", "blackman", "kaiser", "linear"]
TaperDomain = Literal["index", "frequency"]

KAISER_BETA = 8.6  # side lobes like Blackman's (numpy.kaiser's documentation)


def recommended_clip(spectrum: Spectrum, length: int | None = None) -> int:
    """75% of the out-of-distribution pairs, rounded down (CoPE, arXiv 2602.05258): 20 at base 1e7 and 64k.

    Out of distribution are the pairs that rotate but never finish a turn in ``length`` tokens (None: the trained
    length), counted on the spectrum as it is given.
    """
    return 3 * spectrum.pairs_beyond(spectrum.trained_length if length is None else length) // 4


def raised_cosine(x: FloatArray) -> FloatArray:
    """(1 + cos(pi x)) / 2, the falling half of Hann's window: CoPE's (arXiv 2602.05258, section 4)."""
    return 0.5 * (1 + np.cos(np.pi * x))


def quarter_cosine(x: FloatArray) -> FloatArray:
    """cos(pi x / 2), the falling half of the cosine window."""
    return np.cos(0.5 * np.pi * x)


def blackman(x: FloatArray) -> FloatArray:
    """0.42 + 0.5 cos(pi x) + 0.08 cos(2 pi x), the falling half of Blackman's window."""
    return 0.42 + 0.5 * np.cos(np.pi * x) + 0.08 * np.cos(2 * np.pi * x)


def kaiser(x: FloatArray) -> FloatArray:
    """I0(beta sqrt(1 - x^2)) / I0(beta), beta 8.6, the falling half of Kaiser's window; it ends at 1/I0(beta)."""
    return np.i0(KAISER_BETA * np.sqrt(1 - x**2)) / np.i0(KAISER_BETA)


def linear(x: FloatArray) -> FloatArray:
    """1 - x, the falling half of Bartlett's window."""
    return 1 - x


WINDOWS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "raised_cosine": raised_cosine,
    "quarter_cosine": quarter_cosine,
    "blackman": blackman,
    "kaiser": kaiser,
    "linear": linear,
}
assert tuple(WINDOWS) == get_args(Window)


def taper(clipped: FloatArray, window: Window, domain: TaperDomain) -> FloatArray:
    """Weights of the clipped pairs.

    Args:
        clipped: their frequencies, highest first, float64 (clip,), radians per token.
        window: shape of the fall over x in [0, 1].
        domain: ``index``: x_j = j / (clip - 1). ``frequency``: x_j = (f_0 - f_j) / (f_0 - f_last), linear in
            frequency, so that most of a geometric series lies near x = 1.

    Returns:
        float64 (clip,) in [0, 1]: 1 at the first pair, and exactly 0 at the last for every window but Kaiser's.
        A single pair, or pairs of one frequency, are untouched.
    """
    if clipped.size < 2:
        return np.ones(clipped.size)
    if domain == "index":
        x = np.arange(clipped.size) / (clipped.size - 1)
    elif clipped[0] == clipped[-1]:
        return np.ones(clipped.size)
    else:
        x = np.clip((clipped[0] - clipped) / (clipped[0] - clipped[-1]), 0.0, 1.0)
    weights = np.clip(WINDOWS[window](x), 0.0, 1.0)
    weights[x == 0.0] = 1.0  # the sums of cosines miss both ends by 1e-16
    if window != "kaiser":
        weights[x == 1.0] = 0.0
    return weights


def _check_clip(method: str, clip: int, spectrum: Spectrum) -> None:
    """The rule of every clip: it counts from the slowest pair that rotates."""
    pairs = spectrum.rotating_pairs
    check(
        0 <= clip <= pairs,
        f"{method}: clip={clip} is not within the {pairs} pairs of head_dim={spectrum.head_dim} that rotate; "
        f"use 0..{pairs}",
    )


@register_method("cope", auto={"clip": recommended_clip}, clips=True)
def cope(
    spectrum: Spectrum, *, clip: int, window: Window = "raised_cosine", taper_domain: TaperDomain = "index"
) -> Spectrum:
    """Soft-clip the lowest frequencies with a raised cosine (CoPE, arXiv 2602.05258, section 4).

    theta_i w_j over the last n pairs, w_j = (1 + cos(pi j / (n-1))) / 2, j = 0..n-1.

    clip = n: pairs under the taper, 0..d/2, counted from the slowest that rotates, or ``auto`` for the paper's rule.
    The first keeps weight 1 and the last gets 0, so a clip of 20 changes 19 pairs and stops one; a clip of 1 changes
    nothing.
    window: the paper's raised cosine (Hann's), or another of WINDOWS.
    taper_domain: the paper writes the taper over frequency, its code runs it over the pair index; ``index`` is the
    code's, ``frequency`` is linear in frequency from the first clipped pair to the slowest.
    """
    _check_clip("cope", clip, spectrum)
    last = spectrum.rotating_pairs
    clipped = spectrum.inv_freq[last - clip : last]
    return spectrum.scale_lowest(taper(clipped, window, taper_domain))


@register_method("hardclip", auto={"clip": recommended_clip}, clips=True)
def hardclip(spectrum: Spectrum, *, clip: int) -> Spectrum:
    """Stop the ``clip`` slowest pairs that rotate, 0..d/2 or ``auto`` (the ablation of CoPE, arXiv 2602.05258)."""
    _check_clip("hardclip", clip, spectrum)
    return spectrum.scale_lowest(np.zeros(clip))


@register_method("p_rope")
def p_rope(spectrum: Spectrum, *, fraction: float) -> Spectrum:
    """Keep the highest ``fraction`` of the pairs, 0..1, rounded down; the rest do not rotate (arXiv 2410.06205).

    0 stops all: DroPE (arXiv 2512.12167), after training with rotation, before a recalibration at the old length.
    """
    check(0 <= fraction <= 1, f"p_rope: fraction={fraction} must lie between 0 and 1; 1 keeps every pair")
    return _first_kept(spectrum, int(fraction * spectrum.inv_freq.size))


def _first_kept(spectrum: Spectrum, pairs: int) -> Spectrum:
    return spectrum.scaled(np.where(np.arange(spectrum.inv_freq.size) < pairs, 1.0, 0.0))


_SHARE_OF_HOPE = (
    "it counted the pairs that stop, and the paper's shares count those that rotate; write rotating, which is 1 less "
    "that share. In the config.json of an export delete chain_sha256 and spectrum_sha256 beside the chain, too; a "
    "training checkpoint is exported by the version that saved it"
)


@register_method("hope", retired={"share": _SHARE_OF_HOPE})
def hope(spectrum: Spectrum, *, length: Tokens = TRAINED_LENGTH, rotating: float | None = None) -> Spectrum:
    """Stop the pairs that never finish a turn in L tokens (HoPE for text, Chen et al., arXiv 2410.21216).

    length = L, by default the training length. rotating, 0..1, keeps that share of the pairs instead, the fastest
    ones, rounded down. The paper's own cut is not recoverable; it reports that 50% of the channels rotate at 1B
    parameters and 80% at 3B.
    """
    if rotating is not None:
        check(0 <= rotating <= 1, f"hope: rotating={rotating} must lie between 0 and 1; 1 keeps every pair")
        return _first_kept(spectrum, int(rotating * spectrum.inv_freq.size))
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
