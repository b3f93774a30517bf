"""Spectra by pair: frequencies, factors on them, phases that training never met, and turns in a million tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from ropewalk.figures.figure import Figure, Panel, rows_of
from ropewalk.figures.spectrum.attention_kernel import kernel_panels
from ropewalk.figures.spectrum.kernels import ROUNDING, changed_pairs, unseen_phases
from ropewalk.figures.style import (
    GREY,
    LEVEL_DASH,
    SHADE,
    FloatArray,
    Style,
    method_styles,
    nested,
    pairs_axis,
    positive,
    tokens,
    with_tips,
)
from ropewalk.rope.advisor import BAND
from ropewalk.rope.spectrum import Spectrum, geometric

MILLION = 2**20  # tokens
SPECTRA_CAPTION = (
    "Frequency of each rotary pair of a head. Ringed: the first pair that differs from plain RoPE of the same base. "
    "Pairs under a dashed line never complete a turn within its length. The strip lists pairs of frequency exactly 0, "
    "which a logarithmic axis cannot hold."
)


def spectra_figure(
    spectra: Mapping[str, Spectrum],
    *,
    train_length: int,
    target_length: int,
    marked: Mapping[int, str] | None = None,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """Frequency, logarithmic, against pair index; stopped pairs in a strip below, since 0 has no place on that axis.

    Args:
        spectra: method or run -> spectrum.
        train_length: tokens; the frequency 2 pi / train_length, one turn over that length, is marked.
        target_length: tokens; marked likewise.
        marked: lengths in tokens -> what they are, to be marked in the place of these two.
        styles: method or run -> style; None: :func:`ropewalk.figures.style.method_styles`.
    """
    lengths = marked if marked is not None else {train_length: "training length", target_length: "target length"}
    looks = {name: (styles or method_styles(spectra))[name] for name in spectra}
    draw = partial(_draw_spectra, spectra=spectra, styles=looks, lengths=lengths)
    numbers = pd.DataFrame(
        {
            "pairs": [str(spectrum.inv_freq.size) for spectrum in spectra.values()],
            **{
                f"under one turn in {tokens(n)}": [str(_slow(spectrum, n)) for spectrum in spectra.values()]
                for n in sorted(lengths)
            },
            "first changed pair": [_onset_text(spectrum) for spectrum in spectra.values()],
            "stopped": [str(int(np.sum(spectrum.inv_freq == 0))) for spectrum in spectra.values()],
        },
        index=list(spectra),
    )
    size = (6.6, 4.2 + 0.2 * len(spectra))
    return Figure(
        "spectra", "Frequency of every rotary pair", [[Panel(draw)]], SPECTRA_CAPTION, looks, numbers, size=size
    )


def _slow(spectrum: Spectrum, length: int) -> int:
    return int(np.sum(spectrum.turns(length) < 1))


def _onset(spectrum: Spectrum) -> int | None:
    changed = changed_pairs(spectrum)
    return int(changed.argmax()) if changed.any() else None


def _onset_text(spectrum: Spectrum) -> str:
    onset = _onset(spectrum)
    return "none" if onset is None else str(onset)


def _draw_spectra(
    axes: Axes, spectra: Mapping[str, Spectrum], styles: Mapping[str, Style], lengths: Mapping[int, str]
) -> None:
    whole, drawing = axes.get_subplotspec(), axes.get_figure()
    assert whole is not None
    assert drawing is not None
    parts = whole.subgridspec(2, 1, height_ratios=[10, 0.75 * len(spectra) + 0.5])
    axes.set_subplotspec(parts[0])
    strip = drawing.add_subplot(parts[1], sharex=axes)
    for row, ((name, spectrum), width) in enumerate(zip(spectra.items(), nested(len(spectra)), strict=True)):
        _draw_frequencies(axes, name, spectrum, styles[name], width)
        stopped = np.flatnonzero(spectrum.inv_freq == 0)
        (marks,) = strip.plot(
            stopped, np.full(stopped.size, row), "s", color=styles[name].color, markersize=4, label=name
        )  # fmt: skip
        with_tips(marks, (f"{name}: pair {pair} does not rotate" for pair in stopped))
        _ring_onset(axes, strip, name, spectrum, styles[name], row)
    for number, (length, text) in enumerate(sorted(lengths.items())):
        frequency, above = 2 * np.pi / length, number < len(lengths) - 1 or len(lengths) == 1
        axes.axhline(frequency, color=GREY, linestyle=LEVEL_DASH, linewidth=1, gid=f"length {length}")
        axes.annotate(
            f"one turn in {tokens(length)} ({text})", (0, frequency), (2, 3 if above else -3),
            textcoords="offset points", fontsize=8, color=GREY, va="bottom" if above else "top",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("frequency (radians per token)")
    axes.tick_params(labelbottom=False)
    _dress_strip(strip, spectra, styles)


def _draw_frequencies(axes: Axes, name: str, spectrum: Spectrum, style: Style, width: float) -> None:
    turning = np.flatnonzero(spectrum.inv_freq)
    (line,) = axes.plot(
        np.arange(spectrum.inv_freq.size), positive(spectrum.inv_freq), color=style.color, linestyle=style.dash,
        linewidth=width, marker=".", markersize=width + 2, label=name,
    )  # fmt: skip
    with_tips(line, (f"{name}: pair {pair}, a turn in {spectrum.periods[pair]:,.1f} tokens" for pair in turning))


def _ring_onset(axes: Axes, strip: Axes, name: str, spectrum: Spectrum, style: Style, row: int) -> None:
    onset = _onset(spectrum)
    if onset is None:
        return
    where, height = (strip, row) if spectrum.inv_freq[onset] == 0 else (axes, spectrum.inv_freq[onset])
    ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2}
    where.plot([onset], [height], color=style.color, label=name, gid=f"onset {name}", clip_on=False, zorder=4, **ring)


def _dress_strip(strip: Axes, spectra: Mapping[str, Spectrum], styles: Mapping[str, Style]) -> None:
    strip.set_ylim(len(spectra) - 0.4, -0.6)
    counts = [int(np.sum(spectrum.inv_freq == 0)) for spectrum in spectra.values()]
    strip.set_yticks(range(len(spectra)), [f"{count} stopped" if count else "none" for count in counts])
    strip.tick_params(axis="y", length=0)
    for text, name in zip(strip.get_yticklabels(), spectra, strict=True):
        text.set_color(styles[name].color)
    strip.set_facecolor(SHADE)
    strip.grid(visible=False, axis="y")
    strip.set_title("frequency exactly 0: no rotation", fontsize=8, color=GREY, pad=2)
    pairs_axis(strip)


def coverage_figure(
    spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int, styles: Mapping[str, Style] | None = None
) -> Figure:
    """The share of each pair's phases at the target length that training never reached; a panel for each method.

    The definition is that of :func:`ropewalk.figures.spectrum.kernels.unseen_phases`, with one spectrum for training
    and use: a method that is added at test time was not trained with. Arguments as in :func:`spectra_figure`.
    """
    looks = styles or method_styles(spectra)
    phases = {name: unseen_phases(spectrum.inv_freq, train_length, target_length) for name, spectrum in spectra.items()}
    panels = [
        Panel(partial(_draw_coverage, name=name, spectrum=spectrum, style=looks[name], phases=phases[name]), name)
        for name, spectrum in spectra.items()
    ]
    numbers = pd.DataFrame(
        {
            "phases never met, mean share": [f"{share.mean():.0%}" for share, _ in phases.values()],
            "pairs beyond training": [str(int(np.sum(share > 0))) for share, _ in phases.values()],
            "circles, all pairs": [f"{circle.sum():.2f}" for _, circle in phases.values()],
            "stopped pairs": [str(int(np.sum(spectrum.inv_freq == 0))) for spectrum in spectra.values()],
        },
        index=list(spectra),
    )
    title = f"Phases at {tokens(target_length)} tokens that training at {tokens(train_length)} never met"
    of_all = {name: looks[name] for name in spectra}
    caption = _coverage_caption(train_length, target_length)
    return Figure("coverage", title, rows_of(panels), caption, of_all, numbers, size=(4.6, 2.0))


def _draw_coverage(
    axes: Axes, name: str, spectrum: Spectrum, style: Style, phases: tuple[FloatArray, FloatArray]
) -> None:
    share, circle = phases
    pairs = np.arange(share.size)
    needed = axes.bar(pairs, share, width=0.84, color=style.color, alpha=0.35, gid="share of the needed")
    axes.bar(pairs, circle, width=0.84, color=style.color, gid="share of the circle")
    for pair, bar in enumerate(needed):
        with_tips(bar, [f"{name}: pair {pair}, {share[pair]:.1%} of its phases, {circle[pair]:.1%} of the circle"])
    stopped = np.flatnonzero(spectrum.inv_freq == 0)
    axes.plot(stopped, np.full(stopped.size, 0.06), "s", color=GREY, markersize=3, gid=f"stopped {name}")
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(-1, share.size)
    axes.set_ylabel("phases never met")
    pairs_axis(axes)


def _coverage_caption(train_length: int, target_length: int) -> str:
    target, trained = tokens(target_length), tokens(train_length)
    return (
        f"A pair of frequency f (radians per token) needs the phases up to min(2 pi, {target} f) and met those up to "
        f"min(2 pi, {trained} f). Light: the share of the needed phases not met. Dark: the same angle as a share of "
        "the circle, small for pairs that hardly move. A pair that turns whole in training, or not at all (grey), has "
        "none. The model is taken to be trained and used with the same spectrum."
    )


def phases_figure(spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """How far each pair has turned at the training length, the target length and 2^20 tokens; kernels up to there.

    Arguments as in :func:`spectra_figure`.
    """
    styles = method_styles(spectra)
    lengths = sorted({train_length, target_length, MILLION})
    turns = [
        Panel(partial(_draw_turns, spectra=spectra, styles=styles, length=n), f"after {tokens(n)} tokens")
        for n in lengths
    ]
    kernels, _ = kernel_panels(spectra, styles, lengths[-1], train_length)
    numbers = pd.DataFrame(
        {
            f"short of one turn after {tokens(n)}": [str(_slow(spectrum, n)) for spectrum in spectra.values()]
            for n in lengths
        },
        index=list(spectra),
    )
    caption = (
        "Above: the largest phase of each pair, in turns; stopped pairs, which stay at 0, are left out. Below: the "
        f"attention kernel over every distance to {tokens(lengths[-1])} tokens, mean (line) and range (band) in 16 "
        "buckets an octave; grey, the mean of the first method."
    )
    rows: list[list[Panel | None]] = [[*turns], *rows_of(kernels, min(len(kernels), 4))]
    return Figure(
        "phases",
        "Turns of every pair, and kernels to a million tokens",
        rows,
        caption,
        styles,
        numbers,
        size=(3.6, 2.8),
    )


def _draw_turns(axes: Axes, spectra: Mapping[str, Spectrum], styles: Mapping[str, Style], length: int) -> None:
    for (name, spectrum), width in zip(spectra.items(), nested(len(spectra)), strict=True):
        turns = spectrum.turns(length)
        look = {"color": styles[name].color, "linestyle": styles[name].dash, "linewidth": width}
        axes.plot(np.arange(turns.size), positive(turns), label=name, **look)
    axes.axhline(1, color=GREY, linestyle=LEVEL_DASH, linewidth=1, gid="one turn")
    axes.annotate("one turn", (0, 1), (2, 3), textcoords="offset points", fontsize=8, color=GREY)
    axes.set_yscale("log")
    axes.set_ylabel("turns")
    pairs_axis(axes)


def factors_figure(spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """The factor on each pair's frequency over plain RoPE's of the same base: what a run learned, what a clip leaves.

    Args:
        spectra: method or run -> spectrum.
        train_length: tokens; the pair that turns once in 2.205 of it (LeRoPE's band) under the first base is marked.
        target_length: not drawn.
    """
    styles = method_styles(spectra)
    factors = {name: s.inv_freq / geometric(s.theta, s.head_dim) for name, s in spectra.items()}
    first = next(iter(spectra.values()))
    periods = 2 * np.pi / geometric(first.theta, first.head_dim)
    band = int(np.argmin(np.abs(np.log(periods / (BAND * train_length)))))
    draw = partial(_draw_factors, factors=factors, styles=styles, band=band)
    numbers = pd.DataFrame(
        {
            "slower": [str(int(np.sum((f < 1 - ROUNDING) & (f > 0)))) for f in factors.values()],
            "faster": [str(int(np.sum(f > 1 + ROUNDING))) for f in factors.values()],
            "stopped": [str(int(np.sum(f == 0))) for f in factors.values()],
            "least": [f"{f[f > 0].min():.3g}" if f.any() else "none" for f in factors.values()],
            "most": [f"{f.max():.3g}" for f in factors.values()],
            f"at pair {band}": [f"{f[band]:.3g}" for f in factors.values()],
        },
        index=list(spectra),
    )
    caption = (
        "Frequency of each rotary pair over that of plain RoPE at the same base; stopped pairs, 0, have no place on "
        f"the axis. Dashed: pair {band}, the one nearest to a turn in {BAND:g} training lengths, where spectra that "
        "are learned from scratch keep a band (LeRoPE, arXiv 2607.10134)."
    )
    return Figure(
        "factors", "Factor on every pair's frequency", [[Panel(draw)]], caption, styles, numbers, size=(6.6, 3.6)
    )


def _draw_factors(axes: Axes, factors: Mapping[str, FloatArray], styles: Mapping[str, Style], band: int) -> None:
    for (name, factor), width in zip(factors.items(), nested(len(factors)), strict=True):
        turning = np.flatnonzero(factor)
        look = {"color": styles[name].color, "linestyle": styles[name].dash, "linewidth": width}
        (line,) = axes.plot(np.arange(factor.size), positive(factor), marker=".", label=name, **look)
        with_tips(line, (f"{name}: pair {pair}, {factor[pair]:.3g} times RoPE's" for pair in turning))
    axes.axvline(band, color=GREY, linestyle=LEVEL_DASH, linewidth=1, gid="band")
    axes.set_yscale("log")
    axes.set_ylabel("factor on the frequency")
    pairs_axis(axes)
