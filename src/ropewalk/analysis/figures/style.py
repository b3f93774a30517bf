"""What the figures share: colours, axes in tokens, legends, words, and files whose bytes do not depend on the day."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ropewalk.analysis.kernels import Bands
from ropewalk.rope.spectrum import FloatArray

# The report's colours (ropewalk.report.figures.style), whose package would bring in plotly; a test holds them equal.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "D", "^", "X", "*")
GREY = "#6E6E6E"
LIGHT = "#D9D9D9"
DPI = 150
TITLE_SIZE, CAPTION_SIZE = 11.5, 8  # points
LINE_SPACING = 1.22  # of a font's size
LEGEND_LINE = 0.2  # inches
MARGIN = 0.1  # inches
HOUSE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that figures look alike everywhere
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "ropewalk",
}
NO_DATE: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
Parameters = ParamSpec("Parameters")


@dataclass(frozen=True)
class MethodStyle:
    """How one method looks in every figure."""

    color: str
    dash: Any
    marker: str


def method_styles(names: Sequence[str]) -> dict[str, MethodStyle]:
    """A style for each method: colours first, then the same colours with another dash."""
    turns = len(PALETTE)
    return {
        name: MethodStyle(PALETTE[i % turns], DASHES[i // turns % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def house() -> AbstractContextManager[None]:
    """matplotlib's own defaults and, over them, this package's; a user's matplotlibrc changes nothing here."""
    return matplotlib.style.context(["default", HOUSE])


def in_house_style(figure: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Decorate a figure function to draw under :func:`house`."""

    @wraps(figure)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with house():
            return figure(*args, **kwargs)

    return drawn


def canvas(width: float, height: float) -> Figure:
    """An empty figure, inches, that belongs to no window and no global state."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def render(figure: Figure, kind: str, *, crop: bool = False) -> bytes:
    """The figure as a file of ``kind`` (png, pdf or svg), without date or path: equal figures give equal bytes.

    ``crop`` leaves out the empty space around what is drawn.
    """
    file = io.BytesIO()
    with house():
        figure.savefig(
            file, format=kind, dpi=DPI, metadata=NO_DATE[kind], bbox_inches="tight" if crop else None,
            pad_inches=MARGIN,
        )  # fmt: skip
    return file.getvalue()


def label(text: object, width: int = 44) -> str:
    """A name from data, made safe for matplotlib, which reads ``$`` as mathematics, and wrapped at ``width``."""
    return textwrap.fill(str(text), width).replace("$", r"\$")


def short(name: str) -> str:
    """A name as a title has room for; a long chain keeps its beginning."""
    return name if len(name) <= 24 else f"{name[:23]}…"


def finish(
    figure: Figure,
    title: str,
    caption: str,
    styles: Mapping[str, MethodStyle] | None = None,
    extra: Iterable[Line2D] = (),
) -> Figure:
    """Put the title and, with ``styles``, a legend over the panels and the caption under them.

    The figure grows by what they need, so that panels keep the size they were given. ``extra`` are labelled lines for
    the legend.
    """
    width, height = figure.get_size_inches()
    heading = textwrap.fill(title.replace("$", r"\$"), int(width * 10.2), break_long_words=False)
    notes = textwrap.fill(caption.replace("$", r"\$"), int(width * 15.5), break_long_words=False)
    handles = [*_legend_handles(styles or {}), *extra]
    columns, legend_height = _legend_grid(handles, width)
    over = _lines(heading, TITLE_SIZE) + legend_height + 2 * MARGIN
    under = _lines(notes, CAPTION_SIZE) + 1.5 * MARGIN
    total = height + over + under
    figure.set_size_inches(width, total)
    figure.set_layout_engine("constrained", rect=(0, under / total, 1, height / total))
    if figure.get_supylabel():
        figure.supylabel(figure.get_supylabel(), y=(under + height / 2) / total, fontsize=HOUSE["axes.labelsize"])
    figure.text(
        0.008, 1 - MARGIN / total, heading, va="top", fontsize=TITLE_SIZE, fontweight="bold", gid="title"
    )  # fmt: skip
    figure.text(0.008, MARGIN / 2 / total, notes, va="bottom", fontsize=CAPTION_SIZE, color=GREY, gid="caption")
    if handles:
        top = 1 - (over - legend_height - MARGIN / 2) / total
        figure.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0.008, top), ncols=columns, borderaxespad=0,
            handlelength=2.6, columnspacing=1.8,
        )  # fmt: skip
    return figure


def take_words(figure: Figure) -> tuple[str, str]:
    """Title and caption, each as one line, removed from the figure for a page that prints them itself."""
    words = {text.get_gid(): text for text in list(figure.texts) if text.get_gid() in ("title", "caption")}
    for text in words.values():
        text.remove()
    title, caption = (" ".join(words[name].get_text().replace(r"\$", "$").split()) for name in ("title", "caption"))
    return title, caption


def _legend_handles(styles: Mapping[str, MethodStyle]) -> list[Line2D]:
    return [
        Line2D([], [], color=style.color, linestyle=style.dash, label=label(name)) for name, style in styles.items()
    ]


def _legend_grid(handles: Sequence[Line2D], width: float) -> tuple[int, float]:
    """Columns of the legend, and its height in inches."""
    if not handles:
        return 1, 0.0
    entries = [str(handle.get_label()).splitlines() for handle in handles]
    longest = max(len(line) for lines in entries for line in lines)
    columns = max(1, min(len(handles), int(width * 12.5 / (longest + 8))))
    lines = [sum(map(len, column)) for column in np.array_split(np.array(entries, dtype=object), columns)]
    return columns, max(lines) * LEGEND_LINE + MARGIN / 2


def _lines(text: str, size: float) -> float:
    """Inches that ``text`` takes in a font of ``size`` points."""
    return (text.count("\n") + 1) * size * LINE_SPACING / 72


def tokens(count: float) -> str:
    """A length as an axis has room for: ``512``, ``8k``, ``1M``."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if count >= size and count % size == 0:
            return f"{int(count) // size}{unit}"
    return f"{int(count):,}"


def tokens_axis(axes: Axes, low: float, high: float, name: str = "distance (tokens)", ticks: int = 8) -> None:
    """Make the x axis logarithmic over low..high tokens, with at most ``ticks`` ticks at powers of two."""
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    powers = list(range(first, last + 1))
    step = -(-len(powers) // ticks)
    shown = [2**power for power in reversed(powers[::-1][::step])]
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.set_xticks(shown, [tokens(count) for count in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(name)


def mark_length(axes: Axes, length: int, text: str = "trained", side: str = "center") -> None:
    """A dashed vertical line at ``length`` tokens, its name above the plot, aligned by its ``side``."""
    axes.axvline(length, color=GREY, linestyle=(0, (4, 2)), linewidth=1, zorder=1.5, gid=f"length {length}")
    axes.annotate(
        f"{text} {tokens(length)}",
        (length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha=side,
        va="bottom",
        fontsize=8,
        color=GREY,
    )


def nested(count: int, step: float = 0.9) -> list[float]:
    """Line widths, points, for curves that coincide in part: those drawn first show at the sides of the later."""
    return [1.5 + step * (count - 1 - i) for i in range(count)] if count <= 6 else [1.8] * count


def draw_bands(axes: Axes, bands: Bands, style: MethodStyle, name: str) -> None:
    """The range of each bucket as a light band, and its mean as a line."""
    axes.fill_between(bands.distance, bands.low, bands.high, color=style.color, alpha=0.22, linewidth=0)
    axes.plot(bands.distance, bands.mean, color=style.color, linestyle=style.dash, label=label(name))


def positive(values: FloatArray) -> FloatArray:
    """``values`` with nan where they are 0 or less, which a logarithmic axis leaves out."""
    return np.where(values > 0, values, np.nan)


def panel_grid(count: int) -> tuple[int, int]:
    """Rows and columns for ``count`` small panels: three in a row, four as 2 x 2."""
    columns = 2 if count == 4 else min(count, 3)
    return -(-count // columns), columns
