"""The ringing of a hard cut of the spectrum against soft ones.

A head of 64 pairs is too coarse to show it: its kernel is a sum of a few dozen incommensurate cosines and looks like
noise at large distances, whichever way it was clipped. So the same clip is drawn twice, in the head as it is and in
the limit of infinitely many pairs (same base, same share clipped), where the O(1/distance) ringing of a cut has a
closed form; see :func:`ropewalk.analysis.kernels.many_pair_kernel`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ropewalk.analysis.figures.style import (
    GREY,
    MethodStyle,
    canvas,
    finish,
    in_house_style,
    mark_length,
    method_styles,
    tokens_axis,
)
from ropewalk.analysis.kernels import kernel, many_pair_kernel, ringing, upper_envelope
from ropewalk.rope import Spectrum
from ropewalk.rope.methods.clipping import recommended_clip
from ropewalk.rope.registry import get_method
from ropewalk.rope.spectrum import FloatArray

PERIODS = 64  # periods of the cut that are drawn
PER_PERIOD = 64  # samples
LONGEST_HEAD = 2**22  # tokens of the real head's kernel that are held
KINDS = {
    "hard cut (hardclip)": "cut",
    "soft clip of frequencies (cope)": "frequency",
    "soft window on amplitudes": "amplitude",
}
HARD, SOFT, WINDOW = KINDS


@dataclass(frozen=True)
class Clip:
    """What is compared: ``clip`` of ``pairs`` pairs at base ``theta``."""

    theta: float
    pairs: int
    clip: int

    @property
    def kept(self) -> float:
        """Share of the pairs before the clip."""
        return 1 - self.clip / self.pairs

    @property
    def period(self) -> float:
        """Tokens in one turn at the cut frequency theta_c = theta^(-kept)."""
        return 2 * math.pi * self.theta**self.kept

    @property
    def constant(self) -> float:
        """C of the hard cut's envelope C / distance: 1 / (theta_c ln theta), tokens."""
        return self.theta**self.kept / math.log(self.theta)


@dataclass(frozen=True)
class Curve:
    """One way to clip, with infinitely many pairs.

    Attributes:
        distance: float64 (n,), tokens: logarithmic up to half a period of the cut, then evenly spaced.
        envelope: float64 (n,), running maximum of |kernel| from the right.
        values: float64 (n,), the kernel without the constant part of stopped pairs.
        ring_distance: float64 (m,), tokens, evenly spaced from one period on.
        ring_envelope: float64 (m,), running maximum of the ringing from the right.
    """

    distance: FloatArray
    values: FloatArray
    envelope: FloatArray
    ring_distance: FloatArray
    ring_envelope: FloatArray


def compared_clip(spectra: dict[str, Spectrum], train_length: int) -> Clip:
    """The clip of the first spectrum that is RoPE of its base under hardclip or cope and nothing else.

    Where there is none: at the first spectrum's base, the paper's 75% of the pairs whose period exceeds
    ``train_length``, and two pairs at least.
    """
    for spectrum in spectra.values():
        clip = _clip_of(spectrum)
        if clip:
            return Clip(spectrum.theta, spectrum.inv_freq.size, clip)
    first = next(iter(spectra.values()))
    clip = max(2, recommended_clip(first.rebased(first.theta), train_length))
    return Clip(first.theta, first.inv_freq.size, clip)


def _clip_of(spectrum: Spectrum) -> int | None:
    base = spectrum.rebased(spectrum.theta)
    for method in ("hardclip", "cope"):
        for clip in range(1, spectrum.inv_freq.size):
            clipped = get_method(method)(base, clip=clip).inv_freq
            if not np.array_equal(clipped, base.inv_freq) and np.allclose(clipped, spectrum.inv_freq, 1e-9, 0):
                return clip
    return None


@in_house_style
def leakage_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """A hard cut, CoPE's soft clip and an amplitude window at the clip of :func:`compared_clip`.

    Args:
        spectra: method name -> spectrum; they only decide the clip.
        train_length: tokens; marked.
        target_length: tokens; marked.

    Returns:
        A figure with four axes: the envelope in the head as it is; then, with infinitely many pairs, the kernel itself,
        its envelope, and the envelope of its ringing. Constant parts of stopped pairs are removed throughout.
    """
    clip = compared_clip(spectra, train_length)
    styles = method_styles(list(KINDS))
    figure = canvas(10.5, 7.4)
    (head, signed), (level, rings) = figure.subplots(2, 2)
    _draw_head(head, next(iter(spectra.values())).rebased(clip.theta), clip, styles)
    curves = {name: limit_curve(clip, kind) for name, kind in KINDS.items()}
    for name, curve in curves.items():
        look = {"color": styles[name].color, "label": name}
        near = (curve.distance >= clip.period / 64) & (curve.distance <= 8 * clip.period)
        signed.plot(curve.distance[near], curve.values[near], **look)
        drawn = _within(curve.distance, clip)
        level.plot(curve.distance[drawn], curve.envelope[drawn], **look)
        drawn = _within(curve.ring_distance, clip)
        rings.plot(curve.ring_distance[drawn], curve.ring_envelope[drawn], **look)
    signed.axhline(0, color=GREY, linewidth=0.8)
    tokens_axis(signed, clip.period / 64, 8 * clip.period, ticks=6)
    signed.set_ylabel("kernel")
    signed.set_title("infinitely many pairs: kernel", pad=14)
    level.set_title("infinitely many pairs: envelope")
    rings.set_title("infinitely many pairs: ringing (less the mean over one period)")
    for axes in (level, rings):
        _draw_reference(axes, clip)
    for axes in (head, signed):
        for length, text, side in ((train_length, "trained", "right"), (target_length, "target", "left")):
            if axes.get_xlim()[0] < length < axes.get_xlim()[1]:
                mark_length(axes, length, text, side)
    return finish(figure, _title(curves, clip), _caption(curves, clip), styles)


def _draw_head(axes: Axes, base: Spectrum, clip: Clip, styles: dict[str, MethodStyle]) -> None:
    length = min(LONGEST_HEAD, 2 ** math.ceil(math.log2(8 * clip.period)))
    shown = np.unique(np.geomspace(1, length // 2, 400).astype(int))
    for name, method in ((HARD, "hardclip"), (SOFT, "cope")):
        inv_freq = get_method(method)(base, clip=clip.clip).inv_freq
        envelope = upper_envelope(kernel(inv_freq, length) - np.mean(inv_freq == 0))
        axes.plot(shown, envelope[shown], color=styles[name].color, label=name)
    tokens_axis(axes, 1, length // 2, ticks=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("largest |kernel| from here on")
    axes.set_title(f"the head as it is: {clip.pairs} pairs, {clip.clip} clipped", pad=14)


def limit_curve(clip: Clip, kind: str) -> Curve:
    """The many-pair kernel of one ``kind`` (see :func:`ropewalk.analysis.kernels.many_pair_kernel`) and its ringing."""
    half = PER_PERIOD // 2
    even = np.arange(half, PERIODS * PER_PERIOD * 5 // 4) * clip.period / PER_PERIOD
    near = np.geomspace(clip.period / 4096, even[0], 300, endpoint=False)
    distance = np.concatenate([near, even])
    values = many_pair_kernel(distance, clip.theta, clip.kept, kind)
    ring = ringing(values[near.size :], PER_PERIOD)
    return Curve(distance, values, upper_envelope(values), even[half:-half], upper_envelope(ring))


def _within(distance: FloatArray, clip: Clip) -> NDArray[np.bool_]:
    return (distance >= clip.period * (1 - 1e-9)) & (distance <= PERIODS * clip.period)


def _draw_reference(axes: Axes, clip: Clip) -> None:
    low, high = clip.period, PERIODS * clip.period
    reach = np.array([low, high])
    axes.plot(reach, clip.constant / reach, color="black", linewidth=1, linestyle=(0, (2, 2)), gid="C / distance")
    middle = 4 * clip.period
    axes.annotate(
        "C / distance", (middle, clip.constant / middle), (-4, -8), textcoords="offset points", ha="right", va="top",
        fontsize=8.5,
    )  # fmt: skip
    tokens_axis(axes, low, high, ticks=6)
    axes.set_yscale("log")
    axes.set_ylabel("largest |value| from here on")


def _lost_per_doubling(distance: FloatArray, envelope: FloatArray, clip: Clip) -> float:
    """What a doubling of distance takes off an envelope, as a share, on average from 4 to 32 periods of the cut."""
    start, end = np.interp([4 * clip.period, 32 * clip.period], distance, envelope)
    return float(1 - (end / start) ** (1 / 3))


def _title(curves: dict[str, Curve], clip: Clip) -> str:
    rings = {n: _lost_per_doubling(c.ring_distance, c.ring_envelope, clip) for n, c in curves.items()}
    whole = {n: _lost_per_doubling(c.distance, c.envelope, clip) for n, c in curves.items()}
    return (
        f"A doubling of distance takes {rings[HARD]:.0%} off the ringing of the hard cut and {rings[SOFT]:.0%} off the "
        f"soft clip's; of the kernel as a whole it takes {whole[HARD]:.0%} off the hard cut's and {whole[SOFT]:.0%} "
        "off the soft clip's"
    )


def _caption(curves: dict[str, Curve], clip: Clip) -> str:
    drawn = _within(curves[HARD].distance, clip)
    weights = np.gradient(np.log(curves[HARD].distance[drawn]))
    higher = curves[WINDOW].envelope[drawn] > curves[HARD].envelope[drawn]
    share = float(np.sum(weights * higher) / np.sum(weights))
    return (
        f"Base {clip.theta:,.0f}, the slowest {clip.clip} of {clip.pairs} pairs clipped; the constant part of stopped "
        f"pairs is removed. The cut lies at a period of {clip.period:,.0f} tokens, where its ringing begins: much "
        f"shorter distances show nothing of it. C = 1 / (theta_c ln base) = {clip.constant:,.0f} tokens, from Ci(x) ~ "
        "sin(x) / x. Envelopes are running maxima from the right; the title averages from 4 to 32 periods of the cut. "
        f"With {clip.pairs} pairs no envelope falls to 0: cosines of unrelated periods come back into step. "
        "CoPE slows pairs and does not fade them, so it leaves no edge, but frequencies all the way down to 0, whose "
        "smooth tail outlasts the ringing of the cut. A window on amplitudes, which no RoPE model has, leaves no edge "
        f"either; its kernel is above the hard cut's over {share:.0%} of the (logarithmic) range drawn."
    )
