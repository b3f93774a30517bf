"""Every figure of the report as a file of its own, for papers and slides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure as Drawing

from ropewalk.analysis.figures.style import DASHES as DRAWN_DASHES
from ropewalk.analysis.figures.style import (
    MARKERS,
    NO_DATE,
    MethodStyle,
    canvas,
    finish,
    in_house_style,
    label,
    panel_grid,
    render,
    take_words,
)
from ropewalk.config.rules import one_of
from ropewalk.errors import UserError
from ropewalk.files import replace_atomically, write_atomically
from ropewalk.report.axes import draw_plot
from ropewalk.report.figures import Figure, Row, RunStyle
from ropewalk.report.figures.style import DASHES, SYMBOLS
from ropewalk.report.images import Images
from ropewalk.report.table import Table

CAPTIONS = "captions.md"
PANEL = (4.3, 2.7)  # inches
LONGEST = 56  # letters of a file name, before its ending
ALONE = (7.2, 3.6)  # inches, a panel without others


def check_files(directory: str | None, formats: Sequence[str]) -> None:
    """Raise UserError where figures could not be written into ``directory``; before anything is drawn."""
    if directory is None:
        return
    if not formats:
        raise UserError(f"figure_formats=[] names no format; use some of: {', '.join(NO_DATE)}")
    for kind in formats:
        one_of("figure_formats", kind, tuple(NO_DATE))
    if Path(directory).exists() and not Path(directory).is_dir():
        raise UserError(f"figures={directory} is a file; name a directory")


def write_figures(
    sections: Sequence[Table | Figure | Images], styles: dict[str, RunStyle], directory: Path, formats: Sequence[str]
) -> list[Path]:
    """Write each row of panels, and each image, in every format, and what they show into captions.md.

    Two calls on the same runs write the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written, captions = [], []
    for name, drawing, caption in drawings(sections, styles):
        for kind in formats:
            path = directory / f"{name}.{kind}"
            content = render(drawing, kind, crop=True)
            replace_atomically(path, lambda partial, content=content: partial.write_bytes(content))  # type: ignore[misc]
            written.append(path)
        captions.append(f"**{name}** {caption}\n")
    write_atomically(directory / CAPTIONS, "\n".join(captions))
    return written


def drawings(
    sections: Sequence[Table | Figure | Images], styles: dict[str, RunStyle]
) -> Iterator[tuple[str, Drawing, str]]:
    """File name without ending, figure without words of its own, and caption, of everything but tables."""
    names: set[str] = set()
    for section in sections:
        if isinstance(section, Images):
            for image in section.images:
                yield image.name, image.figure, f"{image.title}. {image.caption}"
        elif isinstance(section, Figure):
            for row in section.rows:
                name = _name(section, row, names)
                names.add(name)
                notes = " ".join(dict.fromkeys(panel.note for panel in row.panels if panel.note))
                parts = (f"{section.title}.", row.title and f"{row.title}.", row.reading or section.reading, notes)
                words = " ".join(part for part in parts if part)
                yield name, _draw(section, row, styles), words


@in_house_style
def _draw(section: Figure, row: Row, styles: dict[str, RunStyle]) -> Drawing:
    rows, columns = panel_grid(len(row.panels))
    width, height = ALONE if len(row.panels) == 1 else (PANEL[0] * columns, PANEL[1] * rows)
    figure = canvas(width, height)
    places = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(places.flat, row.panels, strict=False):
        draw_plot(axes, panel.plot)
        axes.set_title(label(panel.title, int(11 * width / columns)), pad=16)
    for axes in places.flat[len(row.panels) :]:
        axes.set_visible(False)
    if row.scale:  # one scale for all panels
        bar = figure.colorbar(places[0, 0].images[0], ax=places, shrink=0.8, aspect=30)
        bar.outline.set_visible(False)
    looks = {name: _method_style(styles[name]) for name in section.runs}
    take_words(finish(figure, section.title, ".", looks))
    return figure


def _method_style(style: RunStyle) -> MethodStyle:
    return MethodStyle(style.color, DRAWN_DASHES[DASHES.index(style.dash)], MARKERS[SYMBOLS.index(style.symbol)])


def _name(section: Figure, row: Row, taken: set[str]) -> str:
    """Title of section and row in lower case with underscores; numbered where that is taken."""
    words = section.title if not row.title else f"{section.title} {row.title}"
    name = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")
    name = name if len(name) <= LONGEST else name[:LONGEST].rpartition("_")[0]
    return next(one for i in range(1, len(taken) + 2) if (one := name if i == 1 else f"{name}_{i}") not in taken)
