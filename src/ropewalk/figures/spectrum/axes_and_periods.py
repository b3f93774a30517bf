"""Axis and period of each pair: which coordinate of an image's or a video's tokens it reads, and how fast it turns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ropewalk.figures.figure import Figure, Panel, rows_of
from ropewalk.figures.style import GREY, LEVEL_DASH, MARKERS, PALETTE, pairs_axis, tokens, with_tips
from ropewalk.rope.pair_axes import IntArray
from ropewalk.rope.spectrum import Spectrum

NAMES = ("time", "height", "width", "one dimension")
LOOKS: dict[str, dict[str, Any]] = {
    name: {"color": color, "marker": marker} for name, color, marker in zip(NAMES, PALETTE, MARKERS, strict=False)
}
LOOKS["one dimension"] = {"color": GREY, "marker": "o"}
CAPTION = (
    "Period of each rotary pair in positions, its colour the axis that the pair reads. Hollow, on the upper edge: "
    "pairs that do not turn. Text has one position for all three axes, so there the colours say nothing."
)


def axes_figure(spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """Period, logarithmic, against pair index, coloured by the axis that the pair reads; a panel for each method.

    Args:
        spectra: method or run -> spectrum.
        train_length: tokens; a pair above this line never finishes a turn in text of the length.
        target_length: not drawn.
    """
    panels = [Panel(partial(_draw, spectrum=spectrum, length=train_length), name) for name, spectrum in spectra.items()]
    drawn = [name for name in NAMES if any(kind == name for s in spectra.values() for kind in _kinds(s))]
    legend = [Line2D([], [], linestyle="", label=name, **LOOKS[name]) for name in drawn]
    numbers = pd.DataFrame(
        {name: [_extent(spectrum, name) for spectrum in spectra.values()] for name in drawn}
        | {"still": [str(int(np.sum(spectrum.inv_freq == 0))) for spectrum in spectra.values()]},
        index=list(spectra),
    )
    title = "Axis and period of every rotary pair"
    return Figure("axes", title, rows_of(panels), CAPTION, {}, numbers, legend, size=(4.0, 2.6), share="all")


def _kinds(spectrum: Spectrum) -> list[str]:
    """The name of each pair's axis."""
    axes: IntArray = np.full(spectrum.inv_freq.size, 3) if spectrum.axes is None else spectrum.axes.of_pairs
    return [NAMES[axis] for axis in axes]


def _extent(spectrum: Spectrum, name: str) -> str:
    """Number of the pairs on an axis, and the periods of those that turn."""
    on_axis = np.array([kind == name for kind in _kinds(spectrum)])
    periods = spectrum.periods[on_axis & (spectrum.inv_freq > 0)]
    turning = f", {periods.min():,.0f} to {periods.max():,.0f}" if periods.size else ""
    return f"{int(on_axis.sum())} pairs{turning}" if on_axis.any() else "none"


def _draw(axes: Axes, spectrum: Spectrum, length: int) -> None:
    kinds, pairs = np.array(_kinds(spectrum)), np.arange(spectrum.inv_freq.size)
    for name in dict.fromkeys(kinds.tolist()):
        turning = (kinds == name) & (spectrum.inv_freq > 0)
        still = (kinds == name) & (spectrum.inv_freq == 0)
        (marks,) = axes.plot(
            pairs[turning], spectrum.periods[turning], linestyle="", markersize=3.5, label=name, **LOOKS[name]
        )
        with_tips(marks, (f"pair {pair}, {name}: a turn in {spectrum.periods[pair]:,.1f}" for pair in pairs[turning]))
        (marks,) = axes.plot(
            pairs[still], np.full(still.sum(), 0.97), linestyle="", markersize=3.5, gid=f"still {name}",
            markerfacecolor="none", transform=axes.get_xaxis_transform(), **LOOKS[name],
        )  # fmt: skip
        with_tips(marks, (f"pair {pair}, {name}: does not turn" for pair in pairs[still]))
    axes.axhline(length, color=GREY, linestyle=LEVEL_DASH, linewidth=1, gid=f"length {length}")
    axes.annotate(tokens(length), (0, length), (2, 3), textcoords="offset points", fontsize=8, color=GREY)
    axes.set_yscale("log")
    axes.set_ylabel("period (positions)")
    pairs_axis(axes)
