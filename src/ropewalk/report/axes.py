"""One plot of the page drawn again by matplotlib: the same traces, axes and marks, so the same numbers."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.ticker import EngFormatter, MaxNLocator

from ropewalk.analysis.figures.style import DASHES as DRAWN_DASHES
from ropewalk.analysis.figures.style import GREY, MARKERS, label
from ropewalk.report.figures.style import DASHES, SYMBOLS

DASH = dict(zip(DASHES, DRAWN_DASHES, strict=True))
MARKER = {**dict(zip(SYMBOLS, MARKERS, strict=True)), "circle-open": "o"}
POINT = 0.75  # points in a pixel of 1/96 inch
COLOR_STEPS = 256
DARK = 0.45  # of the colour scale; a cell above it gets black figures


def draw_plot(axes: Axes, plot: go.Figure) -> None:
    """Draw every trace, shape and annotation of ``plot`` and take over its axes.

    Raises:
        ValueError: for a kind of trace that no figure of the report uses.
    """
    drawers = {"scatter": _scatter, "heatmap": _heatmap, "bar": _bars}
    kinds = {trace.type for trace in plot.data}
    if unknown := kinds - drawers.keys():
        raise ValueError(f"traces of kind {', '.join(sorted(unknown))} cannot be drawn; add a drawer for them")
    for kind in kinds:
        drawers[kind](axes, [trace for trace in plot.data if trace.type == kind])
    _axis(axes, "x", plot.layout.xaxis)
    _axis(axes, "y", plot.layout.yaxis)
    for shape in plot.layout.shapes:
        line = shape.line
        look = {"color": line.color, "linewidth": line.width * POINT, "linestyle": DASH[line.dash or "solid"]}
        if shape.x0 == shape.x1:
            axes.axvline(shape.x0, **look)
        else:
            axes.axhline(shape.y0, **look)
    for note in plot.layout.annotations:
        _annotate(axes, note)
    if "heatmap" in kinds:
        axes.grid(visible=False)


def _scatter(axes: Axes, traces: list[Any]) -> None:
    for trace in traces:
        x, y = np.asarray(trace.x, dtype=float), np.asarray(trace.y, dtype=float)
        if trace.fill == "toself":
            axes.fill(x, y, color=_rgba(trace.fillcolor), linewidth=0)
            continue
        has_line = "lines" in trace.mode
        is_ring = trace.marker.symbol == "circle-open"
        axes.plot(
            x,
            y,
            color=trace.line.color or trace.marker.color,
            linewidth=(trace.line.width or 2) * POINT if has_line else 0,
            linestyle=DASH[trace.line.dash or "solid"] if has_line else "none",
            marker=MARKER[trace.marker.symbol] if "markers" in trace.mode else "none",
            markersize=(trace.marker.size or 0) * POINT,
            markerfacecolor="none" if is_ring else None,
            alpha=trace.opacity,
        )


def _heatmap(axes: Axes, traces: list[Any]) -> None:
    (heat,) = traces
    grid = np.array(heat.z, dtype=float)
    colors = ListedColormap([_interpolated(heat.colorscale, i / (COLOR_STEPS - 1)) for i in range(COLOR_STEPS)])
    axes.imshow(grid, cmap=colors, vmin=heat.zmin, vmax=heat.zmax, aspect="auto", origin="upper")
    axes.set_yticks(range(len(heat.y)), list(heat.y))
    if heat.texttemplate:
        for (row, column), value in np.ndenumerate(grid):
            share = (value - heat.zmin) / (heat.zmax - heat.zmin) if heat.zmax > heat.zmin else 0
            is_light = sum(colors(share)[:3]) / 3 > DARK
            words = "" if math.isnan(value) else f"{value:.2f}"
            axes.text(column, row, words, ha="center", va="center", fontsize=7, color="black" if is_light else "white")


def _bars(axes: Axes, traces: list[Any]) -> None:
    """Stacked horizontal bars with their legend."""
    names = [html.unescape(str(name)) for name in traces[0].y]
    left = np.zeros(len(names))
    for trace in traces:
        widths = np.nan_to_num(np.asarray(trace.x, dtype=float))
        axes.barh(range(len(names)), widths, left=left, color=trace.marker.color, label=trace.name)
        left += widths
    axes.set_yticks(range(len(names)), [label(name, 24) for name in names])
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3)


def _axis(axes: Axes, which: str, axis: Any) -> None:
    is_log = axis.type == "log"
    if is_log:
        getattr(axes, f"set_{which}scale")("log")
    if axis.range is not None:
        ends = [10**end for end in axis.range] if is_log else axis.range
        getattr(axes, f"set_{which}lim")(*ends)
    elif axis.rangemode == "tozero":
        getattr(axes, f"set_{which}lim")(**{"left" if which == "x" else "bottom": 0})
    if axis.tickvals is not None:
        getattr(axes, f"set_{which}ticks")(list(axis.tickvals), list(axis.ticktext))
        getattr(axes, f"set_{which}ticks")([], minor=True)
    elif axis.nticks:
        getattr(axes, f"{which}axis").set_major_locator(MaxNLocator(axis.nticks))
        getattr(axes, f"{which}axis").set_major_formatter(EngFormatter(sep=""))
    if axis.autorange == "reversed" and not getattr(axes, f"{which}axis_inverted")():
        getattr(axes, f"invert_{which}axis")()
    getattr(axes, f"set_{which}label")(axis.title.text or "")


def _annotate(axes: Axes, note: Any) -> None:
    """A label; a logarithmic axis places it at a power of ten."""
    x = 10**note.x if note.xref in (None, "x") and axes.get_xscale() == "log" else note.x
    y = 10**note.y if note.yref in (None, "y") and axes.get_yscale() == "log" else note.y
    across, along = note.xref not in (None, "x"), note.yref not in (None, "y")
    transform = {
        (False, False): axes.transData,
        (False, True): axes.get_xaxis_transform(),
        (True, False): axes.get_yaxis_transform(),
        (True, True): axes.transAxes,
    }[across, along]
    side = {"middle": "center", "bottom": "bottom", "top": "top", None: "center"}[note.yanchor]
    axes.annotate(
        note.text, (x, y), (0, (note.yshift or 0) * POINT), xycoords=transform, textcoords="offset points",
        ha=note.xanchor or "center", va=side, fontsize=8, color=GREY,
    )  # fmt: skip


def _rgba(text: str) -> tuple[float, float, float, float]:
    """plotly's ``rgba(r,g,b,a)`` as matplotlib has it."""
    red, green, blue, alpha = (float(part) for part in text.removeprefix("rgba(").removesuffix(")").split(","))
    return red / 255, green / 255, blue / 255, alpha


def _interpolated(scale: Any, share: float) -> tuple[float, ...]:
    """The colour of a plotly scale at a share of it."""
    places = [place for place, _ in scale]
    colors = np.array([to_rgba(color) for _, color in scale])
    return tuple(float(np.interp(share, places, colors[:, channel])) for channel in range(4))
