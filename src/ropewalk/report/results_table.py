"""The results table: blocks of run by context length, for the page and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ropewalk.report.differences import Unpaired, at_length
from ropewalk.report.needle import EXACT_MATCH, TOKEN_ACCURACY, needle_lengths, pooled
from ropewalk.report.runs import Run
from ropewalk.report.text import aligned, interval, tokens

EMPTY = "-"


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        main: the number as shown, "-" where there is none.
        detail: its interval or control.
        beyond: the length is past what the run was trained at.
        decided: a difference whose interval leaves out zero.
        hint: what a reader may ask of it: the chain, the number of documents, or why there is no number.
    """

    main: str = EMPTY
    detail: str = ""
    beyond: bool = False
    decided: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Block:
    """One quantity: rows of (run name, one cell for each context length)."""

    title: str
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class ResultsTable:
    """The whole table.

    Attributes:
        lengths: context lengths, tokens, one column each.
        order: how the rows are ordered, in words.
        blocks: quantities, each with a row for every run.
    """

    lengths: list[int]
    order: str
    blocks: list[Block]


def results_table(runs: list[Run], baseline: Run) -> ResultsTable:
    """Losses, paired differences and needle accuracies of all runs, rows from the lowest loss."""
    lengths = sorted(
        {length for run in runs for length in losses(run)} | {n for run in runs for n in needle_lengths(run)}
    )
    ordered, order = order_by_loss(runs)
    blocks = [
        _block(
            "Loss (nats/token) over the second half of the context, 95% interval over documents",
            ordered,
            lengths,
            _loss,
        ),
        _block(
            f"Difference to {baseline.name} (nats/token), paired by document, 95% interval",
            [run for run in ordered if run is not baseline],
            lengths,
            lambda run, length: _difference(run, baseline, length),
        ),
        _block("Needle: exact match, beside shuffled answers", ordered, lengths, _accuracy(EXACT_MATCH)),
        _block(
            "Needle: answer-token accuracy, beside shuffled answers",
            ordered,
            lengths,
            _accuracy(TOKEN_ACCURACY),
        ),
    ]
    return ResultsTable(lengths, order, [block for block in blocks if block.rows])


def losses(run: Run) -> dict[int, float]:
    """Context length in tokens -> loss over its second half, nats per token."""
    rows = run.task("loss_at_length", "nll")
    return {int(length): float(value) for length, value in zip(rows["context_length"], rows["value"], strict=True)}


def order_by_loss(runs: list[Run]) -> tuple[list[Run], str]:
    """Runs from the lowest loss at the longest length that all evaluated ones share, then the others."""
    evaluated = [run for run in runs if losses(run)]
    shared = set.intersection(*(set(losses(run)) for run in evaluated)) if evaluated else set()
    if not shared:
        return list(runs), "as given, since the runs share no context length"
    longest = max(shared)
    found = sorted(evaluated, key=lambda run: losses(run)[longest])
    return [
        *found,
        *(run for run in runs if run not in evaluated),
    ], f"from the lowest loss at {longest:,} tokens"


def as_text(table: ResultsTable) -> str:
    """The table for a terminal: an aligned grid for each block, a star at lengths past the trained one."""
    lines: list[str] = []
    for block in table.blocks:
        head = ["", *(tokens(length) for length in table.lengths)]
        rows = [head, *([name, *(_cell_text(cell) for cell in cells)] for name, cells in block.rows)]
        lines += [block.title, *aligned(rows), ""]
    return "\n".join([*lines, f"Rows {table.order}. *: longer than the run was trained at."])


def _cell_text(cell: Cell) -> str:
    star = "*" if cell.beyond and cell.main != EMPTY else ""
    return f"{cell.main}{star} {cell.detail}".rstrip()


def _block(title: str, runs: list[Run], lengths: list[int], cell: Callable[[Run, int], Cell]) -> Block:
    rows = [(run.name, [cell(run, length) for length in lengths]) for run in runs]
    return Block(title, rows if any(one.main != EMPTY or one.hint for _, cells in rows for one in cells) else [])


def _loss(run: Run, length: int) -> Cell:
    rows = run.task("loss_at_length", "nll")
    rows = rows[rows["context_length"] == length]
    if rows.empty:
        return Cell()
    row = rows.iloc[0]
    hint = f"{row['chain']}, {int(row['n'])} documents"
    return Cell(f"{row['value']:.3f}", interval(row["ci_low"], row["ci_high"]), run.is_beyond(length), hint=hint)


def _difference(run: Run, baseline: Run, length: int) -> Cell:
    if length not in losses(run) or length not in losses(baseline):
        return Cell()
    found = at_length(run, baseline, length)
    if isinstance(found, Unpaired):
        return Cell(hint=found.reason)
    hint = f"{found.n} documents that both scored"
    detail = interval(found.low, found.high, signed=True)
    return Cell(f"{found.value:+.4f}", detail, run.is_beyond(length), found.is_decided, hint)


def _accuracy(metric: str) -> Callable[[Run, int], Cell]:
    def cell(run: Run, length: int) -> Cell:
        found = pooled(run, metric, length)
        if found is None:
            return Cell()
        control = "" if math.isnan(found.control) else f"({found.control:.2f})"
        return Cell(f"{found.value:.2f}", control, run.is_beyond(length), hint=f"{found.n} prompts")

    return cell
