"""Tokens of packed stores by the length of the piece of a document that they stand in, and by domain."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import ALONE, Figure, Panel
from ropewalk.figures.style import label, method_styles, tokens_axis


def length_census_figure(census: pd.DataFrame) -> Figure:
    """The share of each domain's tokens in pieces of at least each length.

    Args:
        census: a row for each domain and length, ascending: domain, length_from and length_to (tokens: a power of two,
            and the last number before the next), pieces, tokens.
    """
    domains = census["domain"].unique()
    styles = method_styles(domains)

    def draw(axes: Axes) -> None:
        for name in domains:
            rows = census[census["domain"] == name]
            longer = 100 * rows["tokens"][::-1].cumsum()[::-1] / rows["tokens"].sum()
            x, y = [*rows["length_from"], rows["length_to"].iloc[-1] + 1], [*longer, 0.0]
            style = styles[name]
            axes.plot(x, y, color=style.color, linestyle=style.dash, marker=style.marker, label=label(name))
        tokens_axis(axes, census["length_from"].min(), census["length_to"].max() + 1, "at least so many tokens")
        axes.set_ylabel("tokens of the domain in such pieces (%)")
        axes.set_ylim(bottom=0)

    totals = census.groupby("domain", sort=False)[["pieces", "tokens"]].sum()
    halves = [_median_length(census[census["domain"] == name]) for name in totals.index]
    return Figure(
        "length_census",
        "Tokens by length of the piece they stand in",
        [[Panel(draw)]],
        "A document longer than a sequence counts as the pieces it was cut into. Half: the power of two below the "
        "length that splits a domain's tokens in two halves.",
        styles,
        totals.assign(half=halves).map("{:,}".format),
        size=ALONE,
    )


def _median_length(rows: pd.DataFrame) -> int:
    below = rows["tokens"].cumsum().to_numpy()
    return int(rows["length_from"].iloc[int(np.searchsorted(below, below[-1] / 2))])
