"""Sections of the report: tables of cells, figures, and one line of legend; their form on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ropewalk.figures.figure import Figure

EMPTY = "-"
UNKNOWN_NOISE = "training noise unknown"  # shown once, and not in every cell


@dataclass(frozen=True)
class Cell:
    """One number.

    Attributes:
        main: the number as shown, "-" where there is none.
        detail: its interval or control.
        beyond: the length is past what the run was trained at.
        marked: bold, by the rule that the table's legend states; no difference outside a declared family is.
        hint: shown when pointed at: the chain, the number of documents, or why there is no number.
        noise: beside a difference, what is known of training noise.
    """

    main: str = EMPTY
    detail: str = ""
    beyond: bool = False
    marked: bool = False
    hint: str = ""
    noise: str = ""


@dataclass(frozen=True)
class Block:
    """One quantity: rows of (name, one cell for each column); a title may be empty."""

    title: str
    rows: list[tuple[str, list[Cell]]]

    @property
    def is_empty(self) -> bool:
        """True if no cell has a number or a reason for none."""
        return not any(cell.main != EMPTY or cell.hint for _, cells in self.rows for cell in cells)


@dataclass(frozen=True)
class Section:
    """A section of the report: a table, figures, or both.

    Attributes:
        title: heading.
        legend: how to read the table, in one line.
        columns: heads of the columns.
        blocks: quantities, those with nothing to show left out.
        corner: what the columns are.
        folded: blocks that the page hides until they are unfolded.
        figures: drawn under the table.
        folded_figures: figures that the page hides likewise.
        folded_title: what is hidden.
        missing: what is not in it, in words.
        on_terminal: whether a comparison prints the table, too.
    """

    title: str
    legend: str = ""
    columns: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    corner: str = "context length"
    folded: list[Block] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    folded_figures: list[Figure] = field(default_factory=list)
    folded_title: str = "Task by task"
    missing: list[str] = field(default_factory=list)
    on_terminal: bool = False

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def block_of(title: str, rows: Sequence[tuple[str, list[Cell]]]) -> list[Block]:
    """The block, or nothing where it has nothing to show."""
    block = Block(title, list(rows))
    return [] if block.is_empty else [block]


def as_text(section: Section) -> str:
    """The table for a terminal: an aligned grid for each block, a star at lengths past the trained one."""
    lines: list[str] = []
    for block in section.blocks:
        rows = [["", *section.columns], *(_row_text(name, cells) for name, cells in block.rows)]
        width = max(map(len, rows))
        lines += [block.title, *_aligned([[*row, *[""] * (width - len(row))] for row in rows]), ""]
    cells = [cell for block in section.blocks for _, row in block.rows for cell in row]
    unknown = (
        [f"Where nothing stands of seeds: {UNKNOWN_NOISE}."] if any(c.noise == UNKNOWN_NOISE for c in cells) else []
    )
    return "\n".join([*lines, section.legend, *unknown, *section.missing])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines whose columns start in the same place, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row_text(name: str, cells: list[Cell]) -> list[str]:
    """A row; where all its differences have one and the same note on noise, that stands once, at its end."""
    noises = {cell.noise for cell in cells if cell.main != EMPTY} - {UNKNOWN_NOISE}
    shared = noises.pop() if len(noises) == 1 else ""
    return [name, *(_cell_text(cell, cell.noise != shared) for cell in cells), *([shared] if shared else [])]


def _cell_text(cell: Cell, with_noise: bool) -> str:
    star = "*" if cell.beyond and cell.main != EMPTY else ""
    noise = f" ({cell.noise})" if with_noise and cell.noise not in ("", UNKNOWN_NOISE) else ""
    return f"{cell.main}{star} {cell.detail}".rstrip() + noise
