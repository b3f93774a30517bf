"""RoPE-ID's ablations: retrieval against each argument of the method, measured beside published."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ropewalk.figures.figure import Figure, Panel, rows_of
from ropewalk.figures.layer_curves import entry, length_colors
from ropewalk.figures.style import GREY, PAGE, tokens, tokens_axis

# Argument of rope_id -> title of its panel, and whether its axis counts tokens.
ARGUMENTS = {
    "share": ("share of the channels that rotate", False),
    "shortest_period": ("shortest period", True),
    "longest_period": ("longest period", True),
    "temperature_exponent": ("exponent of the temperature", False),
}


def ablations_figure(measured: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """A panel for each argument, a line for each input length; published numbers dashed (arXiv 2603.18017, table 5).

    Args:
        measured: a row for each argument, its value and an input length: argument (a key of ``ARGUMENTS``), setting
            (its value), context_length (tokens), value (RULER's mean over 13 tasks, percent), stderr (NaN: unknown);
            ``attrs["note"]`` is added to the caption.
        published: the same without stderr; None: there are none.
    """
    others = measured.iloc[:0] if published is None else published
    lengths = sorted(int(n) for n in {*measured["context_length"], *others["context_length"]})
    panels = []
    for argument, (title, counts_tokens) in ARGUMENTS.items():
        draw = partial(
            _draw, measured=_of(measured, argument), published=_of(others, argument), lengths=lengths,
            counts_tokens=counts_tokens,
        )  # fmt: skip
        panels.append(Panel(draw, title))
    legend = [entry(f"{tokens(n)} tokens", color, marker="o") for n, color in length_colors(lengths).items()]
    if len(others):
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "markerfacecolor": PAGE, "linestyle": (0, (3, 1.6))}
        legend.append(Line2D([], [], color=GREY, label="published", **look))
    caption = (
        "RULER, mean over its 13 tasks; each argument of rope_id by itself, the others at their defaults (share 1/2, "
        "periods 32 to half the training length, exponent 2). Bars: standard error over samples. "
        f"{measured.attrs['note']}"
    ).rstrip()
    title = "RoPE-ID: one argument at a time"
    numbers = _best(measured, lengths)
    return Figure("ablations", title, rows_of(panels), caption, numbers=numbers, legend=legend, size=(4.2, 2.7))


def _of(rows: pd.DataFrame, argument: str) -> pd.DataFrame:
    return rows[rows["argument"] == argument].sort_values("setting")


def _best(measured: pd.DataFrame, lengths: list[int]) -> pd.DataFrame:
    """The value of each argument with the highest score at each length, and that score."""
    cells: dict[str, list[str]] = {}
    for length in lengths:
        column = cells.setdefault(f"best at {tokens(length)}", [])
        for argument in ARGUMENTS:
            rows = _of(measured[measured["context_length"] == length], argument)
            best = rows.loc[rows["value"].idxmax()] if len(rows) else None
            column.append("not measured" if best is None else f"{best['setting']:g} ({best['value']:.1f})")
    return pd.DataFrame(cells, index=[title for title, _ in ARGUMENTS.values()])


def _draw(axes: Axes, measured: pd.DataFrame, published: pd.DataFrame, lengths: list[int], counts_tokens: bool) -> None:
    for length, color in length_colors(lengths).items():
        theirs = published[published["context_length"] == length]
        axes.plot(
            theirs["setting"], theirs["value"], color=color, linestyle=(0, (3, 1.6)), linewidth=1.0, marker="o",
            markersize=4, markerfacecolor=PAGE,
        )  # fmt: skip
        ours = measured[measured["context_length"] == length]
        axes.errorbar(
            ours["setting"], ours["value"], yerr=ours["stderr"].fillna(0.0), color=color, marker="o", markersize=4,
            linewidth=1.5, elinewidth=1, capsize=2.5,
        )  # fmt: skip
    settings = np.unique(np.concatenate([measured["setting"], published["setting"]]).astype(float))
    if counts_tokens and settings.size:
        tokens_axis(axes, settings[0] / 1.2, settings[-1] * 1.2, "tokens a turn")
    else:
        axes.set_xticks(settings, [f"{value:g}" for value in settings])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("RULER (%)")
