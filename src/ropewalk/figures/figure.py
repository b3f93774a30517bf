"""One figure: its panels, numbers and words; as a drawing, and as files for papers."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from ropewalk.errors import UserError
from ropewalk.figures.style import GREY, HEADROOM, Style, house, in_house_style, label
from ropewalk.files import replace_atomically

PANEL, ALONE = (4.6, 2.9), (6.6, 3.8)  # inches, of one panel among others and of one by itself
DPI = 150
TITLE_SIZE, SIZE, CAPTION_SIZE = 11.5, 8.5, 8  # points
LINE_SPACING = 1.22  # of a font's size
LETTER = 0.0083  # inches of width for each point of a font's size
LEGEND_LINE = 0.2  # inches
MARGIN = 0.1  # inches
HANDLE = 0.36  # inches
NARROWEST = 6.4  # inches; a heading needs space
LONGEST_NAME = 56  # letters of a file name, before its ending
# What each format would say of the day it was written.
NO_DATE: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
FORMATS = tuple(NO_DATE)


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        draw: draws onto the axes it is given.
        title: heading.
        note: how it is to be read, where the figure's caption does not say so.
    """

    draw: Callable[[Axes], object]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class ColorScale:
    """A colour scale that the panels of a figure share, from ``low`` to ``high``."""

    colors: str  # name of a matplotlib colour map
    low: float
    high: float
    label: str
    is_log: bool = False

    @property
    def norm(self) -> Normalize:
        """Value -> share of the scale."""
        return LogNorm(self.low, self.high) if self.is_log else Normalize(self.low, self.high)

    @property
    def stops(self) -> list[str]:
        """Hexadecimal colours, evenly spaced from low to high."""
        colors = matplotlib.colormaps[self.colors]
        return [to_hex(colors(i / 10)) for i in range(11)]


@dataclass(frozen=True)
class Figure:
    """One figure, drawn once and shown on the page, in files for papers and by ``analyze``.

    Attributes:
        name: file name without its ending.
        title: heading.
        rows: rows of panels; None leaves a place empty.
        caption: what is drawn.
        styles: name -> style of the runs or methods in the legend.
        numbers: what a reader would read off the panels, formatted; index: runs, methods or checkpoints.
        legend: further entries.
        scale: colour scale of all panels.
        size: of a panel, inches.
        share: one y axis for each row or for all panels, with labels at the outside alone; None: each panel its own.
    """

    name: str
    title: str
    rows: Sequence[Sequence[Panel | None]]
    caption: str = ""
    styles: Mapping[str, Style] = field(default_factory=dict)
    numbers: pd.DataFrame | None = None
    legend: Sequence[Line2D] = ()
    scale: ColorScale | None = None
    size: tuple[float, float] = PANEL
    share: Literal["row", "all"] | None = None

    @property
    def panels(self) -> list[Panel]:
        """All panels, row by row."""
        return [panel for row in self.rows for panel in row if panel is not None]

    @property
    def explanation(self) -> str:
        """The caption and the different notes of the panels in one paragraph."""
        notes = dict.fromkeys(panel.note for panel in self.panels)
        return " ".join(part for part in (self.caption, *notes) if part)


def rows_of(panels: Sequence[Panel], columns: int | None = None) -> list[list[Panel | None]]:
    """Panels in rows of ``columns``; None: three in a row, four as 2 x 2. The last row is filled up with gaps."""
    width = columns or (2 if len(panels) == 4 else min(max(len(panels), 1), 3))
    filled = [*panels, *[None] * (-len(panels) % width)]
    return [filled[i : i + width] for i in range(0, len(filled), width)]


def file_name(words: str) -> str:
    """``words`` in lower case with underscores, cut between two of them where it would be too long."""
    name = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    return name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME].rpartition("_")[0]


def check_formats(key: str, formats: Sequence[str]) -> None:
    """Raise UserError unless ``formats``, the value of ``key``, names formats that figures have."""
    if not formats:
        raise UserError(f"{key}=[] names no format; use some of: {', '.join(FORMATS)}")
    for kind in formats:
        if kind not in FORMATS:
            raise UserError(f"{key}={kind} is not known; use one of: {', '.join(FORMATS)}")


def write_figure(
    figure: Figure, directory: Path, formats: Iterable[str], *, words: bool = True, name: str | None = None
) -> list[Path]:
    """Write ``<name>.<format>`` for every format; the same figure gives the same bytes.

    Args:
        figure: to draw.
        directory: exists.
        formats: of ``FORMATS``.
        words: whether title, numbers and caption are in the picture, too.
        name: of the files; None: the figure's.

    Returns:
        The paths, in the order of the formats.
    """
    drawing = compose(figure, words=words)
    paths = []
    for kind in formats:
        path = directory / f"{name or figure.name}.{kind}"
        content = render(drawing, kind, crop=not words)
        replace_atomically(path, lambda partial, content=content: partial.write_bytes(content))  # type: ignore[misc]
        paths.append(path)
    return paths


def render(drawing: Drawing, kind: str, *, crop: bool = False) -> bytes:
    """The drawing as a file of ``kind`` (png, pdf or svg), without date or path.

    ``crop`` leaves out the empty space around what is drawn.
    """
    file = io.BytesIO()
    with house():
        drawing.savefig(
            file, format=kind, dpi=DPI, metadata=NO_DATE[kind], bbox_inches="tight" if crop else None,
            pad_inches=MARGIN,
        )  # fmt: skip
    return file.getvalue()


@in_house_style
def compose(figure: Figure, *, words: bool = True) -> Drawing:
    """Draw all panels under a legend; with ``words``, title and numbers stand above and the caption under them."""
    width, height = figure.size
    columns = max(len(row) for row in figure.rows)
    body = (max(width * columns, NARROWEST if words else 0), height * len(figure.rows))
    heading = _wrapped(figure.title, body[0], TITLE_SIZE * 1.06) if words else ""
    caption = _wrapped(figure.explanation, body[0], CAPTION_SIZE) if words else ""
    head = _Head(figure, body[0], words=words)
    over = _lines(heading, TITLE_SIZE) + head.height + (2 if words else 1) * MARGIN
    under = _lines(caption, CAPTION_SIZE) + 1.5 * MARGIN if words else 0.0
    total = body[1] + over + under
    engine = ConstrainedLayoutEngine(rect=(0, under / total, 1, body[1] / total))
    drawing = Drawing(figsize=(body[0], total), dpi=DPI, layout=engine)
    axes = _draw_panels(drawing, figure)
    if figure.scale:
        mappable = ScalarMappable(figure.scale.norm, figure.scale.colors)
        bar = drawing.colorbar(mappable, ax=axes, shrink=0.8, aspect=30, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_label(figure.scale.label)
    if words:
        drawing.text(
            0.008, 1 - MARGIN / total, heading, va="top", fontsize=TITLE_SIZE, fontweight="bold", gid="title"
        )  # fmt: skip
        drawing.text(0.008, MARGIN / 2 / total, caption, va="bottom", fontsize=CAPTION_SIZE, color=GREY, gid="caption")
    head.draw(drawing, _lines(heading, TITLE_SIZE) + 1.5 * MARGIN if words else MARGIN / 2)
    settle(drawing)
    return drawing


def settle(drawing: Drawing) -> None:
    """Lay the drawing out once and for all, rounded: the solver's last digits change from process to process."""
    drawing.draw_without_rendering()
    drawing.set_layout_engine("none")
    for axes in drawing.axes:
        x, y, width, height = (round(value, 6) for value in axes.get_position(original=True).bounds)
        axes.set_position((x, y, width, height))


def _draw_panels(drawing: Drawing, figure: Figure) -> list[Axes]:
    """Every panel in axes of its own; rows of unlike length fill the same width."""
    cells = math.lcm(*(len(row) for row in figure.rows))
    grid = drawing.add_gridspec(len(figure.rows), cells)
    columns = max(len(row) for row in figure.rows)
    drawn: list[Axes] = []
    for i, row in enumerate(figure.rows):
        span, first = cells // len(row), None
        for j, panel in enumerate(row):
            if panel is None:
                continue
            together = {"row": first, "all": drawn[0] if drawn else None}.get(figure.share or "")
            axes = drawing.add_subplot(grid[i, j * span : (j + 1) * span], sharey=together)
            panel.draw(axes)
            axes.set_title(label(panel.title, int(13 * figure.size[0] * columns / len(row))), pad=HEADROOM.get(axes, 5))
            first = first or axes
            drawn.append(axes)
    if figure.share:
        for axes in drawn:
            axes.label_outer()
    return drawn


class _Head:
    """The legend over the panels: a table of the figure's numbers with a line each, or names side by side."""

    def __init__(self, figure: Figure, width: float, *, words: bool) -> None:
        self.figure, self.width = figure, width
        self.numbers = figure.numbers if words else None
        named = [] if self.numbers is not None and set(figure.styles) <= set(self.numbers.index) else figure.styles
        self.handles = [
            *(
                Line2D([], [], color=figure.styles[n].color, linestyle=figure.styles[n].dash, label=label(n))
                for n in named
            ),
            *figure.legend,
        ]
        self.columns, self.legend_height = _legend_grid(self.handles, width)
        self.cells = _cells(self.numbers)
        self.table_height = sum(self._row_height(row) for row in self.cells) + (MARGIN if self.cells else 0)
        self.height = self.legend_height + self.table_height

    def _row_height(self, row: Sequence[str]) -> float:
        return (max(cell.count("\n") for cell in row) + 1) * SIZE * LINE_SPACING / 72 + 0.03

    def draw(self, drawing: Drawing, top: float) -> None:
        """Draw from ``top`` inches under the upper edge on."""
        height = float(drawing.get_size_inches()[1])
        if self.cells:
            self._draw_table(drawing, top, height)
        if self.handles:
            drawing.legend(
                handles=self.handles, loc="upper left", bbox_to_anchor=(0.008, 1 - (top + self.table_height) / height),
                ncols=self.columns, borderaxespad=0, handlelength=2.6, columnspacing=1.8,
            )  # fmt: skip

    def _draw_table(self, drawing: Drawing, top: float, height: float) -> None:
        widths = [
            max(len(line) for cell in column for line in cell.splitlines() or [""])
            for column in zip(*self.cells, strict=True)
        ]
        whole = HANDLE + sum(count * SIZE * LETTER + 0.16 for count in widths)
        size = SIZE * min(1.0, (self.width - 2 * MARGIN) / whole)
        for number, row in enumerate(self.cells):
            x = MARGIN
            style = self.figure.styles.get(str(self.numbers.index[number - 1])) if number else None  # type: ignore[union-attr]
            top += self._row_height(row)
            baseline = 1 - (top - 0.05) / height
            middle = baseline + size * 0.35 / 72 / height
            if style:
                ends = [x / self.width, (x + HANDLE - 0.08) / self.width]
                line = Line2D(ends, [middle, middle], color=style.color, linestyle=style.dash, linewidth=1.8)
                line.set_transform(drawing.transFigure)
                drawing.add_artist(line)
            x += HANDLE if self.figure.styles else 0
            for cell, count in zip(row, widths, strict=True):
                drawing.text(
                    x / self.width, baseline, cell.replace("$", r"\$"), va="baseline", fontsize=size,
                    color=GREY if number == 0 else None, gid="numbers", linespacing=1.1,
                )  # fmt: skip
                x += count * size * LETTER + 0.16


def _cells(numbers: pd.DataFrame | None) -> list[list[str]]:
    """Rows of text with the header first, wrapped."""
    if numbers is None or numbers.empty:
        return []
    head = ["", *(textwrap.fill(str(column), 24) for column in numbers.columns)]
    rows = numbers.itertuples(name=None)
    return [head, *([textwrap.fill(str(row[0]), 44), *map(str, row[1:])] for row in rows)]


def _wrapped(text: str, width: float, size: float) -> str:
    return textwrap.fill(text.replace("$", r"\$"), int(width / (size * LETTER)), break_long_words=False)


def _legend_grid(handles: Sequence[Line2D], width: float) -> tuple[int, float]:
    """Columns of the legend, and its height in inches."""
    if not handles:
        return 1, 0.0
    entries = [str(handle.get_label()).splitlines() for handle in handles]
    longest = max(len(line) for lines in entries for line in lines)
    columns = max(1, min(len(handles), int(width * 12.5 / (longest + 8))))
    per_column = -(-len(entries) // columns)
    lines = [sum(map(len, entries[i : i + per_column])) for i in range(0, len(entries), per_column)]
    return columns, max(lines) * LEGEND_LINE + MARGIN / 2


def _lines(text: str, size: float) -> float:
    """Inches that ``text`` takes in a font of ``size`` points."""
    return (text.count("\n") + 1) * size * LINE_SPACING / 72 if text else 0.0
