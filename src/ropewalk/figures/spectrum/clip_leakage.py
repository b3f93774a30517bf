"""The ringing of a hard cut of the spectrum against soft ones.

A head of 64 pairs is too coarse to show it: its kernel is a sum of a few dozen incommensurate cosines and looks like
noise at large distances, whichever way it was clipped. So the same clip is drawn twice, in the head as it is and in
the limit of infinitely many pairs (same base, same share clipped), where the O(1/distance) ringing of a cut has a
closed form; see :func:`ropewalk.figures.spectrum.kernels.many_pair_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ropewalk.figures.figure import Figure, Panel
from ropewalk.figures.spectrum.kernels import kernel, many_pair_kernel, ringing, upper_envelope
from ropewalk.figures.style import GREY, INK, FloatArray, Style, mark_length, method_styles, tokens_axis
from ropewalk.rope import Spectrum
from ropewalk.rope.methods.clipping import recommended_clip
from ropewalk.rope.registry import get_method

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
    """The clip that is compared: ``clip`` of ``pairs`` pairs at base ``theta``."""

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


def compared_clip(spectra: Mapping[str, Spectrum], train_length: int) -> Clip:
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


def leakage_figure(spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """A hard cut, CoPE's soft clip and an amplitude window at the clip of :func:`compared_clip`.

    Args:
        spectra: method -> spectrum; they only decide the clip.
        train_length: tokens; marked.
        target_length: tokens; marked.

    Returns:
        A figure with four panels: the envelope in the head as it is; then, with infinitely many pairs, the kernel
        itself, its envelope, and the envelope of its ringing. Constant parts of stopped pairs are removed throughout.
    """
    clip = compared_clip(spectra, train_length)
    styles = method_styles(KINDS)
    curves = {name: limit_curve(clip, kind) for name, kind in KINDS.items()}
    base = next(iter(spectra.values())).rebased(clip.theta)
    common: dict[str, Any] = {"clip": clip, "styles": styles}
    lengths = {"trained": train_length, "target": target_length}
    head = partial(_draw_head, base=base, lengths=lengths, **common)
    signed = partial(_draw_signed, curves=curves, lengths=lengths, **common)
    level, rings = (partial(_draw_envelope, curves=curves, of_ringing=of, **common) for of in (False, True))
    rows = [
        [
            Panel(head, f"the head as it is: {clip.pairs} pairs, {clip.clip} clipped"),
            Panel(signed, "infinitely many pairs: kernel"),
        ],
        [
            Panel(level, "infinitely many pairs: envelope"),
            Panel(rings, "infinitely many pairs: ringing (less the mean over one period)"),
        ],
    ]
    title = "The ringing of a hard cut against soft ones"
    return Figure("leakage", title, rows, _caption(clip), styles, _numbers(curves, clip), size=(5.0, 3.2))


def _numbers(curves: Mapping[str, Curve], clip: Clip) -> pd.DataFrame:
    ringing_lost = [_lost_per_doubling(c.ring_distance, c.ring_envelope, clip) for c in curves.values()]
    whole_lost = [_lost_per_doubling(c.distance, c.envelope, clip) for c in curves.values()]
    return pd.DataFrame(
        {
            "ringing lost per doubling of distance": [f"{value:.0%}" for value in ringing_lost],
            "kernel lost per doubling of distance": [f"{value:.0%}" for value in whole_lost],
            "kernel above the hard cut's": [f"{_share_above(curves, name, clip):.0%}" for name in curves],
        },
        index=list(curves),
    )


def _share_above(curves: Mapping[str, Curve], name: str, clip: Clip) -> float:
    """Share of the (logarithmic) range drawn over which an envelope is above the hard cut's."""
    drawn = _within(curves[HARD].distance, clip)
    weights = np.gradient(np.log(curves[HARD].distance[drawn]))
    higher = curves[name].envelope[drawn] > curves[HARD].envelope[drawn]
    return float(np.sum(weights * higher) / np.sum(weights))


def _mark(axes: Axes, lengths: Mapping[str, int]) -> None:
    low, high = axes.get_xlim()
    for (text, length), side in zip(lengths.items(), ("right", "left"), strict=True):
        if low < length < high:
            mark_length(axes, length, text, side)


def _draw_head(axes: Axes, base: Spectrum, clip: Clip, styles: Mapping[str, Style], lengths: Mapping[str, int]) -> None:
    length = min(LONGEST_HEAD, 2 ** math.ceil(math.log2(8 * clip.period)))
    shown = np.unique(np.geomspace(1, length // 2, 400).astype(int))
    for name, method in ((HARD, "hardclip"), (SOFT, "cope")):
        inv_freq = get_method(method)(base, clip=clip.clip).inv_freq
        envelope = upper_envelope(kernel(inv_freq, length) - np.mean(inv_freq == 0))
        axes.plot(shown, envelope[shown], color=styles[name].color, label=name)
    tokens_axis(axes, 1, length // 2, ticks=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("largest |kernel| from here on")
    _mark(axes, lengths)


def _draw_signed(
    axes: Axes, curves: Mapping[str, Curve], clip: Clip, styles: Mapping[str, Style], lengths: Mapping[str, int]
) -> None:
    for name, curve in curves.items():
        near = (curve.distance >= clip.period / 64) & (curve.distance <= 8 * clip.period)
        axes.plot(curve.distance[near], curve.values[near], color=styles[name].color, label=name)
    axes.axhline(0, color=GREY, linewidth=0.8)
    tokens_axis(axes, clip.period / 64, 8 * clip.period, ticks=6)
    axes.set_ylabel("kernel")
    _mark(axes, lengths)


def _draw_envelope(
    axes: Axes, curves: Mapping[str, Curve], clip: Clip, styles: Mapping[str, Style], *, of_ringing: bool
) -> None:
    for name, curve in curves.items():
        distance, envelope = (
            (curve.ring_distance, curve.ring_envelope) if of_ringing else (curve.distance, curve.envelope)
        )
        drawn = _within(distance, clip)
        axes.plot(distance[drawn], envelope[drawn], color=styles[name].color, label=name)
    reach = np.array([clip.period, PERIODS * clip.period])
    axes.plot(reach, clip.constant / reach, color=INK, linewidth=1, linestyle=(0, (2, 2)), gid="C / distance")
    middle = 4 * clip.period
    axes.annotate(
        "C / distance", (middle, clip.constant / middle), (-4, -8), textcoords="offset points", ha="right", va="top",
        fontsize=8.5,
    )  # fmt: skip
    tokens_axis(axes, clip.period, PERIODS * clip.period, ticks=6)
    axes.set_yscale("log")
    axes.set_ylabel("largest |value| from here on")


def limit_curve(clip: Clip, kind: str) -> Curve:
    """The many-pair kernel of one ``kind`` and its ringing.

    See :func:`ropewalk.figures.spectrum.kernels.many_pair_kernel`.
    """
    half = PER_PERIOD // 2
    even = np.arange(half, PERIODS * PER_PERIOD * 5 // 4) * clip.period / PER_PERIOD
    near = np.geomspace(clip.period / 4096, even[0], 300, endpoint=False)
    distance = np.concatenate([near, even])
    values = many_pair_kernel(distance, clip.theta, clip.kept, kind)
    ring = ringing(values[near.size :], PER_PERIOD)
    return Curve(distance, values, upper_envelope(values), even[half:-half], upper_envelope(ring))


def _within(distance: FloatArray, clip: Clip) -> NDArray[np.bool_]:
    return (distance >= clip.period * (1 - 1e-9)) & (distance <= PERIODS * clip.period)


def _lost_per_doubling(distance: FloatArray, envelope: FloatArray, clip: Clip) -> float:
    """The share that a doubling of distance takes off an envelope, on average from 4 to 32 periods of the cut."""
    start, end = np.interp([4 * clip.period, 32 * clip.period], distance, envelope)
    return float(1 - (end / start) ** (1 / 3))


def _caption(clip: Clip) -> str:
    return (
        f"Base {clip.theta:,.0f}, the slowest {clip.clip} of {clip.pairs} pairs clipped; the constant part of stopped "
        f"pairs is removed. The cut lies at a period of {clip.period:,.0f} tokens, where its ringing begins: much "
        f"shorter distances show nothing of it. C = 1 / (theta_c ln base) = {clip.constant:,.0f} tokens, from Ci(x) ~ "
        "sin(x) / x. Envelopes are running maxima from the right; losses are averages from 4 to 32 periods of the cut, "
        f"the last column is over the (logarithmic) range drawn. With {clip.pairs} pairs no envelope falls to 0: "
        "cosines of unrelated periods come back into step. CoPE slows pairs and does not fade them, so it leaves no "
        "edge, but frequencies all the way down to 0, whose smooth tail outlasts the ringing of the cut. A window on "
        "amplitudes, which no RoPE model has, leaves no edge either."
    )
