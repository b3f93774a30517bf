"""What the figures share: runs' colours and dashes, bare axes, trained-length marks.

Text and grid get their colours from the page's style sheet, which knows light from dark; the colours set here
are those of data alone.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go

from ropewalk.report.seeds import Arm

# Okabe and Ito's colour-blind safe set without black and yellow, which vanish on a dark or a white page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
SVG_DASHES = {"solid": "none", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
GREY = "#808080"  # legible on white and on black alike


@dataclass(frozen=True)
class RunStyle:
    """How one run looks in every figure."""

    color: str
    dash: str
    symbol: str

    @property
    def band(self) -> str:
        """The colour, faint, for an interval."""
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.18)"

    @property
    def svg_dash(self) -> str:
        """The dash as an SVG stroke-dasharray."""
        return SVG_DASHES[self.dash]


@dataclass(frozen=True)
class Panel:
    """One plot with its heading and, where needed, a note under it."""

    title: str
    plot: go.Figure
    note: str = ""


@dataclass(frozen=True)
class ScaleBar:
    """A colour scale that a row of panels shares, as the page draws it."""

    low: str
    high: str
    colors: Sequence[str]


@dataclass(frozen=True)
class Row:
    """Panels side by side under one heading, with a sentence of their own where the figure's says too little."""

    panels: list[Panel]
    title: str = ""
    reading: str = ""
    scale: ScaleBar | None = None


@dataclass(frozen=True)
class Figure:
    """One section of the report: plots, a sentence read off the data, and what is missing, in words."""

    title: str
    reading: str
    rows: list[Row] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)  # in the legend
    missing: list[str] = field(default_factory=list)


def run_styles(names: Sequence[str]) -> dict[str, RunStyle]:
    """A style for each run: colours first, then the same colours with another dash."""
    turns = len(PALETTE)
    return {
        name: RunStyle(PALETTE[i % turns], DASHES[i // turns % len(DASHES)], SYMBOLS[i % len(SYMBOLS)])
        for i, name in enumerate(names)
    }


def styles_of(arms: Sequence[Arm]) -> dict[str, RunStyle]:
    """A style for each run and arm: the seeds of an arm share its colour and marker, and differ in their dash.

    With more arms than colours every run looks its own way, as in :func:`run_styles`.
    """
    if len(arms) > len(PALETTE):
        styles = run_styles([run.name for arm in arms for run in arm.runs])
    else:
        styles = {
            run.name: RunStyle(PALETTE[i], DASHES[seed % len(DASHES)], SYMBOLS[i])
            for i, arm in enumerate(arms)
            for seed, run in enumerate(arm.runs)
        }
    return styles | {arm.name: styles[arm.runs[0].name] for arm in arms}


def plain(text: object) -> str:
    """Text from data made safe for plotly, which reads tags such as <b> and <a> in names and labels."""
    return html.escape(str(text), quote=False)


def short_length(tokens: float) -> str:
    """A length as an axis has room for: ``512``, ``8k``, ``1M``."""
    count = int(tokens)
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def canvas(x_title: str, y_title: str, *, height: int = 340) -> go.Figure:
    """An empty transparent plot, ``height`` pixels high and as wide as the page gives it."""
    axis = {"automargin": True, "zeroline": False, "showline": True, "ticks": "outside", "linecolor": GREY}
    axis |= {"gridcolor": GREY, "tickcolor": GREY, "fixedrange": True}
    plot = go.Figure()
    plot.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 12, "t": 30, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        showlegend=False,
        hovermode="closest",
        xaxis={**axis, "title": {"text": x_title, "standoff": 8}},
        yaxis={**axis, "title": {"text": y_title, "standoff": 8}},
    )
    return plot


def log2_axis(plot: go.Figure, low: float, high: float) -> None:
    """Make the x axis logarithmic over low..high tokens, with ticks at powers of two."""
    powers = [2**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    shown = powers[:: -(-len(powers) // 8)] if powers else []
    plot.update_xaxes(
        type="log",
        range=[math.log10(low), math.log10(high)],
        tickvals=shown,
        ticktext=[short_length(power) for power in shown],
    )


def mark_lengths(plot: go.Figure, lengths: Iterable[int]) -> None:
    """A dashed vertical line, labelled above the plot, at each length that some run was trained at."""
    for turn, length in enumerate(lengths):
        plot.add_vline(x=length, line={"dash": "dash", "width": 1.5, "color": GREY})
        plot.add_annotation(
            x=math.log10(length),
            y=1,
            yref="paper",
            yanchor="bottom",
            yshift=11 * (turn % 2),  # neighbours on a narrow page would overlap
            text=f"trained {short_length(length)}",
            showarrow=False,
            font={"size": 11},
        )


def add_line(
    plot: go.Figure,
    name: str,
    style: RunStyle,
    tokens: Iterable[float],
    values: Iterable[float],
    unit: str = ":.3f",
    *,
    faint: bool = False,
) -> None:
    """A line over tokens seen; ``faint``: behind another, without words of its own."""
    look = {"color": style.color, "width": 1} if faint else {"color": style.color, "width": 2, "dash": style.dash}
    plot.add_scatter(
        x=list(tokens),
        y=list(values),
        mode="lines",
        line=look,
        opacity=0.35 if faint else None,
        hoverinfo="skip" if faint else None,
        hovertemplate=None if faint else f"{plain(name)}<br>%{{x:.3s}} tokens: %{{y{unit}}}<extra></extra>",
        name=plain(name),
        legendgroup=plain(name),
    )


def add_curve(plot: go.Figure, name: str, style: RunStyle, rows: pd.DataFrame, hover: Sequence[str]) -> None:
    """A line with its interval band from columns x, value, ci_low and ci_high, ascending in x."""
    banded = rows.dropna(subset=["ci_low", "ci_high"])
    common = {"legendgroup": plain(name), "name": plain(name)}
    if not banded.empty:
        plot.add_scatter(
            x=[*banded["x"], *banded["x"][::-1]],
            y=[*banded["ci_high"], *banded["ci_low"][::-1]],
            fill="toself",
            fillcolor=style.band,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            **common,
        )
    plot.add_scatter(
        x=list(rows["x"]),
        y=list(rows["value"]),
        mode="lines+markers",
        line={"color": style.color, "width": 2, "dash": style.dash},
        marker={"symbol": style.symbol, "size": 6, "color": style.color},
        text=list(hover),
        hovertemplate=f"{plain(name)}<br>%{{text}}<extra></extra>",
        **common,
    )
