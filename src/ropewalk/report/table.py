"""What every table of the report is made of, and its form on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ropewalk.report.text import aligned

EMPTY = "-"


@dataclass(frozen=True)
class Cell:
    """One number.

    Attributes:
        main: the number as shown, "-" where there is none.
        detail: its interval or control.
        beyond: the length is past what the run was trained at.
        decided: a difference whose interval leaves out zero.
        worse: a decided difference to the wrong side.
        hint: what a reader may ask of it: the chain, the number of documents, or why there is no number.
        noise: beside a difference, what is known of training noise.
    """

    main: str = EMPTY
    detail: str = ""
    beyond: bool = False
    decided: bool = False
    worse: bool = False
    hint: str = ""
    noise: str = ""


@dataclass(frozen=True)
class Block:
    """One quantity: rows of (name, one cell for each column)."""

    title: str
    rows: list[tuple[str, list[Cell]]]

    @property
    def is_empty(self) -> bool:
        """Whether no cell has a number or says why there is none."""
        return not any(cell.main != EMPTY or cell.hint for _, cells in self.rows for cell in cells)


@dataclass(frozen=True)
class Table:
    """A section of the report that is a table.

    Attributes:
        title: heading.
        reading: what it says, in a sentence or two computed from its numbers, and how to read it.
        columns: heads of the columns.
        blocks: quantities, those with nothing to show left out.
        corner: what the columns are.
        missing: what is not in it, in words.
        folded: blocks that a page may hide until asked for.
        on_terminal: whether a comparison prints it, too.
    """

    title: str
    reading: str
    columns: list[str]
    blocks: list[Block]
    corner: str = "context length"
    missing: list[str] = field(default_factory=list)
    folded: list[Block] = field(default_factory=list)
    on_terminal: bool = False


def block_of(title: str, rows: Sequence[tuple[str, list[Cell]]]) -> list[Block]:
    """The block, or nothing where it has nothing to show."""
    block = Block(title, list(rows))
    return [] if block.is_empty else [block]


def as_text(table: Table) -> str:
    """The table for a terminal: an aligned grid for each block, a star at lengths past the trained one."""
    lines: list[str] = []
    for block in table.blocks:
        rows = [["", *table.columns], *(_row_text(name, cells) for name, cells in block.rows)]
        width = max(map(len, rows))
        lines += [block.title, *aligned([[*row, *[""] * (width - len(row))] for row in rows]), ""]
    return "\n".join([*lines, table.reading, *table.missing])


def _row_text(name: str, cells: list[Cell]) -> list[str]:
    """A row; where all its differences have one and the same note on noise, that stands once, at its end."""
    noises = {cell.noise for cell in cells if cell.main != EMPTY}
    shared = noises.pop() if len(noises) == 1 else ""
    return [name, *(_cell_text(cell, cell.noise != shared) for cell in cells), *([shared] if shared else [])]


def _cell_text(cell: Cell, with_noise: bool) -> str:
    star = "*" if cell.beyond and cell.main != EMPTY else ""
    noise = f" ({cell.noise})" if with_noise and cell.noise else ""
    return f"{cell.main}{star} {cell.detail}".rstrip() + noise
