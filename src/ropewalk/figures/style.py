"""House style: colours, dashes, axes in tokens, marks and the words beside them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

# Okabe and Ito's colour-blind safe set without black and yellow, which vanish on a dark or a white page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
SVG_DASHES = ("none", "7 4", "2 3", "7 3 2 3")
MARKERS = ("o", "s", "D", "^", "X", "*")
# Ink, and not data: the page replaces exactly these by its own colours for light, dark and paper.
INK, GREY, GRID, SHADE, PAGE = "#1b1f24", "#6e6e6e", "#e6e6e6", "#f4f4f4", "#ffffff"
LEVEL_DASH = (0, (4, 2))
HOUSE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures look alike everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "ropewalk",
}
TIPS: WeakKeyDictionary[Artist, tuple[str, ...]] = WeakKeyDictionary()
HEADROOM: WeakKeyDictionary[Axes, float] = WeakKeyDictionary()  # points between axes and their title
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Style:
    """How one run or method looks in every figure."""

    color: str
    dash: Any
    marker: str

    @property
    def svg_dash(self) -> str:
        """The dash as an SVG stroke-dasharray."""
        return SVG_DASHES[DASHES.index(self.dash)]

    def dashed(self, turn: int) -> Style:
        """The same, ``turn`` dashes further on."""
        return Style(self.color, DASHES[(DASHES.index(self.dash) + turn) % len(DASHES)], self.marker)


def series_styles(groups: Sequence[Sequence[str]]) -> dict[str, Style]:
    """A style for each name: a group shares its colour and marker, and its members differ in their dash.

    With more groups than colours every name is a group of its own: colours first, then the same with another dash.
    """
    turns = len(PALETTE)
    if len(groups) <= turns:
        return {
            name: Style(PALETTE[i], DASHES[member % len(DASHES)], MARKERS[i])
            for i, group in enumerate(groups)
            for member, name in enumerate(group)
        }
    names = [name for group in groups for name in group]
    return {
        name: Style(PALETTE[i % turns], DASHES[i // turns % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def method_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name, every one a group of its own."""
    return series_styles([[name] for name in names])


def house(changes: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """matplotlib's own defaults and, over them, this package's; a user's matplotlibrc changes nothing here."""
    return matplotlib.style.context(["default", HOUSE | dict(changes or {})])


def in_house_style(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a function that draws, to draw under :func:`house`."""

    @wraps(function)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with house():
            return function(*args, **kwargs)

    return drawn


def label(text: object, width: int = 44) -> str:
    """A name from data, made safe for matplotlib, which reads ``$`` as mathematics, and wrapped at ``width``."""
    return textwrap.fill(str(text), width).replace("$", r"\$")


def tokens(count: float) -> str:
    """A length as an axis has space for: ``512``, ``8k``, ``1M``."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if count >= size and count % size == 0:
            return f"{int(count) // size}{unit}"
    return f"{int(count):,}"


def amount(count: float) -> str:
    """A large count in three digits: ``1.57M``, ``21B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def number(value: float, form: str) -> str:
    """A value in a format; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:{form}}"


def interval(low: float, high: float, *, signed: bool = False) -> str:
    """``[3.381, 3.443]``, or ``signed`` with a digit more, for a difference; "" where an end is unknown."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{low:+.4f}, {high:+.4f}]" if signed else f"[{low:.3f}, {high:.3f}]"


def with_tips(artist: Artist, tips: Iterable[str]) -> None:
    """Text that the page shows for each marker, bar or cell of ``artist``, in their order."""
    TIPS[artist] = tuple(tips)


def reserve_headroom(axes: Axes, points: float) -> None:
    """Keep the title of ``axes`` so far above them: for names of marks, or a legend."""
    HEADROOM[axes] = max(points, HEADROOM.get(axes, 0))


def positive(values: FloatArray) -> FloatArray:
    """``values`` with nan where they are 0 or less, which a logarithmic axis leaves out."""
    return np.where(values > 0, values, np.nan)


def nested(count: int, step: float = 0.9) -> list[float]:
    """Line widths, points, for curves that coincide in part: those drawn first show at the sides of the later."""
    return [1.5 + step * (count - 1 - i) for i in range(count)] if count <= 6 else [1.8] * count


def tokens_axis(axes: Axes, low: float, high: float, name: str = "distance (tokens)", ticks: int = 8) -> None:
    """Make the x axis logarithmic over low..high tokens, with at most ``ticks`` ticks at powers of two."""
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    powers = list(range(first, last + 1))
    step = max(1, -(-len(powers) // ticks))
    shown = [2**power for power in reversed(powers[::-1][::step])]
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_xticks(shown, [tokens(count) for count in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(name)


def tokens_seen_axis(axes: Axes) -> None:
    """Make the x axis linear from 0, in tokens that training has seen."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens seen")


def pairs_axis(axes: Axes) -> None:
    """Name the x axis after rotary pairs, with whole numbers."""
    axes.set_xlabel("rotary pair (0: fastest)")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def mark_length(axes: Axes, length: int, text: str = "trained", side: str = "center", turn: int = 0) -> None:
    """A dashed vertical line at ``length`` tokens, its name above the plot, aligned by its ``side``.

    ``turn`` lifts the name by so many lines, where a neighbour would be in its way.
    """
    axes.axvline(length, color=GREY, linestyle=LEVEL_DASH, linewidth=1, zorder=1.5, gid=f"length {length}")
    axes.annotate(
        f"{text} {tokens(length)}",
        (length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2 + 10 * turn),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=8,
        color=GREY,
    )
    reserve_headroom(axes, 16 + 10 * turn)


def mark_lengths(axes: Axes, lengths: Iterable[float], low: float, high: float) -> None:
    """Mark every length within low..high that some run was trained at; names of neighbours take turns."""
    within = sorted({int(length) for length in lengths if low <= length <= high})
    for number, length in enumerate(within):
        mark_length(axes, length, turn=number % 2)


def draw_line(
    axes: Axes, name: str, style: Style, x: Iterable[float], y: Iterable[float], *, faint: bool = False
) -> None:
    """A line over tokens seen; ``faint``: behind another."""
    look: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.35} if faint else {"linewidth": 1.5, "linestyle": style.dash}
    axes.plot(list(x), list(y), color=style.color, label=name, **look)


def draw_curve(
    axes: Axes, name: str, style: Style, rows: pd.DataFrame, tips: Iterable[str], *, band: bool = True
) -> None:
    """A line with its interval ``band`` from columns x, value, ci_low and ci_high, ascending in x."""
    known = rows.dropna(subset=["ci_low", "ci_high"])
    x = known["x"].to_numpy(dtype=float)
    if len(known) and band:
        low, high = (known[end].to_numpy(dtype=float) for end in ("ci_low", "ci_high"))
        axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0, label=name)
    (line,) = axes.plot(
        rows["x"].to_numpy(dtype=float), rows["value"].to_numpy(dtype=float), color=style.color, linestyle=style.dash,
        marker=style.marker, linewidth=1.5, label=name,
    )  # fmt: skip
    with_tips(line, (f"{name}: {tip}" for tip in tips))
