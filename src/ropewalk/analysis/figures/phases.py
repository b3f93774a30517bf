"""Phases: which of them a longer input reaches for the first time, and how far pairs turn in a million tokens."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ropewalk.analysis.figures.kernel import kernel_panels
from ropewalk.analysis.figures.style import (
    GREY,
    MethodStyle,
    canvas,
    finish,
    in_house_style,
    label,
    method_styles,
    nested,
    positive,
    short,
    tokens,
)
from ropewalk.analysis.kernels import kernel, unseen_phases
from ropewalk.rope.spectrum import FloatArray, Spectrum

MILLION = 2**20  # tokens


@in_house_style
def coverage_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """The share of each pair's phases at the target length that training never reached; a row for each method.

    The definition is that of :func:`ropewalk.analysis.kernels.unseen_phases`, with one spectrum for training and
    use: a method that is added at test time was not trained with.

    Args:
        spectra: method name -> spectrum.
        train_length: tokens.
        target_length: tokens.

    Returns:
        A figure with one axes of bars for each method.
    """
    styles = method_styles(list(spectra))
    figure = canvas(9, max(1.25 * len(spectra) + 0.5, 2.6))
    rows = figure.subplots(len(spectra), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    found = {name: unseen_phases(one.inv_freq, train_length, target_length) for name, one in spectra.items()}
    for axes, (name, spectrum) in zip(rows, spectra.items(), strict=True):
        _coverage_row(axes, name, spectrum, styles[name], *found[name])
    rows[-1].set_xlabel("rotary pair (0: fastest)")
    rows[-1].xaxis.set_major_locator(MaxNLocator(9, integer=True))
    figure.supylabel("phases never met in training")
    title = (
        f"Of the phases that {tokens(target_length)} tokens need, training at {tokens(train_length)} never met: "
        + ", ".join(f"{share.mean():.0%} under {short(name)}" for name, (share, _) in found.items())
    )
    return finish(figure, title, _coverage_caption(train_length, target_length))


def _coverage_row(
    axes: Axes, name: str, spectrum: Spectrum, style: MethodStyle, share: FloatArray, circle: FloatArray
) -> None:
    pairs = np.arange(share.size)
    axes.bar(pairs, share, width=0.84, color=style.color, alpha=0.35, label=label(name), gid="share of the needed")
    axes.bar(pairs, circle, width=0.84, color=style.color, gid="share of the circle")
    stopped = np.flatnonzero(spectrum.inv_freq == 0)
    axes.plot(stopped, np.full(stopped.size, 0.06), "s", color=GREY, markersize=3.5, gid=f"stopped {name}")
    still = f", {stopped.size} stopped (grey)" if stopped.size else ""
    axes.set_title(label(name), color=style.color, fontweight="bold", pad=3)
    axes.annotate(
        f"{int(np.sum(share > 0))} pairs beyond training, {circle.sum():.2f} circles together{still}",
        (1, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", ha="right", fontsize=8.5, color=GREY,
    )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(-1, share.size)


def _coverage_caption(train_length: int, target_length: int) -> str:
    target, trained = tokens(target_length), tokens(train_length)
    return (
        f"A pair of frequency f (radians per token) needs the phases up to min(2 pi, {target} f) and met those up to "
        f"min(2 pi, {trained} f). Light: the share of the needed phases not met, averaged over all pairs in the title. "
        "Dark: the same angle as a share of the circle, small for pairs that hardly move. A pair that turns whole in "
        "training, or not at all, has none. The model is taken to be trained and used with the same spectrum."
    )


@in_house_style
def phases_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """How far each pair has turned at the training length, the target length and 2^20 tokens; kernels up to there.

    Args:
        spectra: method name -> spectrum.
        train_length: tokens.
        target_length: tokens.

    Returns:
        A figure with an axes of turns for each length, then one with the banded kernel of each method.
    """
    styles = method_styles(list(spectra))
    lengths = sorted({train_length, target_length, MILLION})
    columns = min(len(spectra), 4)
    rows = -(-len(spectra) // columns)
    figure = canvas(11, 3.4 + 2.7 * rows)
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.4, 2.7 * rows]).flat
    turns = upper.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(turns, lengths, strict=True):
        _draw_turns(axes, spectra, styles, length)
    turns[0].set_ylabel("turns (log)")
    end = lengths[-1]
    kernels = {name: kernel(one.inv_freq, end, one.attention_scaling) for name, one in spectra.items()}
    panels = lower.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    kernel_panels(panels, kernels, styles, train_length, width=24)
    return finish(figure, _phases_title(spectra, lengths), _phases_caption(end), styles)


def _draw_turns(axes: Axes, spectra: dict[str, Spectrum], styles: dict[str, MethodStyle], length: int) -> None:
    for (name, spectrum), width in zip(spectra.items(), nested(len(spectra)), strict=True):
        turns = spectrum.turns(length)
        look = {"color": styles[name].color, "linestyle": styles[name].dash, "linewidth": width}
        axes.plot(np.arange(turns.size), positive(turns), label=label(name), **look)
    axes.axhline(1, color=GREY, linestyle=(0, (4, 2)), linewidth=1, gid="one turn")
    axes.annotate("one turn", (0, 1), (2, 3), textcoords="offset points", fontsize=8, color=GREY)
    axes.set_yscale("log")
    axes.set_title(f"after {tokens(length)} tokens")
    axes.set_xlabel("rotary pair (0: fastest)")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def _phases_title(spectra: dict[str, Spectrum], lengths: list[int]) -> str:
    parts = []
    for name, spectrum in spectra.items():
        counts = [str(int(np.sum(spectrum.turns(length) < 1))) for length in lengths]
        parts.append(f"{short(name)} {', '.join(counts)}")
    return f"Pairs short of one turn after {', '.join(map(tokens, lengths))} tokens: {'; '.join(parts)}"


def _phases_caption(end: int) -> str:
    return (
        "Above: the largest phase of each pair, in turns; stopped pairs, which stay at 0, are left out. Below: the "
        f"attention kernel over every distance to {tokens(end)} tokens, mean (line) and range (band) in 16 buckets an "
        "octave; grey, the mean of the first method."
    )
