"""Spectra: the frequency of every pair, where each method's change begins, and which pairs stand still."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ropewalk.analysis.figures.style import (
    GREY,
    LIGHT,
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
from ropewalk.analysis.kernels import changed_pairs
from ropewalk.rope.spectrum import Spectrum


@in_house_style
def spectra_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """Frequency, logarithmic, against pair index; stopped pairs in a strip below, since 0 has no place on that axis.

    Args:
        spectra: method name -> spectrum.
        train_length: tokens; the frequency 2 pi / train_length, one turn over that length, is marked.
        target_length: tokens; marked likewise.

    Returns:
        A figure with two axes: the frequencies, and the strip of the pairs whose frequency is exactly 0.
    """
    styles = method_styles(list(spectra))
    figure = canvas(9, 5.6 + 0.16 * len(spectra))
    main, strip = figure.subplots(2, 1, sharex=True, height_ratios=[10, 0.75 * len(spectra) + 0.5])
    widths = nested(len(spectra))
    for row, (name, spectrum) in enumerate(spectra.items()):
        pairs = np.arange(spectrum.inv_freq.size)
        look = {"color": styles[name].color, "linestyle": styles[name].dash, "linewidth": widths[row]}
        main.plot(pairs, positive(spectrum.inv_freq), label=label(name), **look)
        _draw_stopped(strip, name, spectrum, styles[name], row)
        _ring_onset(main, strip, name, spectrum, styles[name], row)
    for length, text, side in ((train_length, "training length", 3), (target_length, "target length", -3)):
        frequency = 2 * np.pi / length
        main.axhline(frequency, color=GREY, linestyle=(0, (4, 2)), linewidth=1, gid=f"length {length}")
        main.annotate(
            f"one turn in {tokens(length)} ({text})", (0, frequency), (2, side), textcoords="offset points", fontsize=8,
            va="bottom" if side > 0 else "top",
        )  # fmt: skip
    main.set_yscale("log")
    main.set_ylabel("frequency (radians per token)")
    _dress_strip(strip, spectra)
    return finish(figure, _title(spectra, train_length), _caption(train_length), styles)


def _draw_stopped(strip: Axes, name: str, spectrum: Spectrum, style: MethodStyle, row: int) -> None:
    stopped = np.flatnonzero(spectrum.inv_freq == 0)
    strip.plot(stopped, np.full(stopped.size, row), "s", color=style.color, markersize=4.5, label=label(name))


def _ring_onset(main: Axes, strip: Axes, name: str, spectrum: Spectrum, style: MethodStyle, row: int) -> None:
    changed = changed_pairs(spectrum)
    if not changed.any():
        return
    onset = int(changed.argmax())
    axes, height = (strip, row) if spectrum.inv_freq[onset] == 0 else (main, spectrum.inv_freq[onset])
    ring: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 2}
    axes.plot([onset], [height], color=style.color, gid=f"onset {name}", clip_on=False, zorder=4, **ring)


def _dress_strip(strip: Axes, spectra: dict[str, Spectrum]) -> None:
    strip.set_ylim(len(spectra) - 0.4, -0.6)
    counts = [int(np.sum(spectrum.inv_freq == 0)) for spectrum in spectra.values()]
    strip.set_yticks(range(len(spectra)), [f"{count} stopped" if count else "none" for count in counts])
    strip.tick_params(axis="y", length=0)
    for text, style in zip(strip.get_yticklabels(), method_styles(list(spectra)).values(), strict=True):
        text.set_color(style.color)
    strip.set_facecolor("#F6F6F6")
    strip.set_title("frequency exactly 0: no rotation", fontsize=8.5, color=GREY, pad=3)
    strip.grid(visible=False, axis="y")
    strip.grid(color=LIGHT, axis="x")
    strip.set_xlabel("rotary pair (0: fastest)")
    strip.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def _title(spectra: dict[str, Spectrum], train_length: int) -> str:
    parts = []
    for name, spectrum in spectra.items():
        slow = int(np.sum(spectrum.inv_freq * train_length < 2 * np.pi))
        stopped = int(np.sum(spectrum.inv_freq == 0))
        parts.append(f"{slow} of {short(name)}" + (f" ({stopped} stopped)" if stopped else ""))
    pairs = next(iter(spectra.values())).inv_freq.size
    return f"Of {pairs} pairs, those that turn less than once in {tokens(train_length)} tokens: {', '.join(parts)}"


def _caption(train_length: int) -> str:
    return (
        "Frequency of each rotary pair of a head. Ringed: the first pair that differs from plain RoPE of the same "
        f"base. Pairs under the upper dashed line never complete a turn within the {tokens(train_length)} tokens of "
        "training. The strip under the plot lists pairs of frequency exactly 0, which a logarithmic axis cannot hold."
    )
