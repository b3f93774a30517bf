"""Effective context: the longest length up to which a run stays at or above a stated threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ropewalk.report.benchmarks import RULER, Scores, common_tasks, lengths_of, named, scores
from ropewalk.report.needle import EXACT_MATCH, needle_lengths, pooled
from ropewalk.report.results_table import losses
from ropewalk.report.runs import Run
from ropewalk.report.table import Cell, Table, block_of
from ropewalk.report.text import counted, listed, tokens


@dataclass(frozen=True)
class Thresholds:
    """In percent: of exact match in the needle grid, and of RULER's average."""

    needle: float
    ruler: float


def effective_length(values: Mapping[int, float], threshold: float) -> int | None:
    """The longest length up to which every measured length is at ``threshold`` or above; None where none is.

    A length that recovers after one that failed does not count: nobody would serve it.
    """
    held = None
    for length in sorted(values):
        if values[length] < threshold:
            break
        held = length
    return held


def longest_falling(values: Mapping[int, float]) -> int | None:
    """The longest length up to which the loss falls at every step to a longer context; None without two lengths."""
    lengths = sorted(values)
    if len(lengths) < 2:
        return None
    held = lengths[0]
    for shorter, longer in pairwise(lengths):
        if values[longer] >= values[shorter]:
            break
        held = longer
    return held


def effective_table(runs: list[Run], thresholds: Thresholds) -> Table | None:
    """A row for each run; None where nothing was measured at a length."""
    ruler = scores(runs, RULER)
    tasks = common_tasks(ruler)
    columns: dict[str, Callable[[Run], list[Cell]]] = {
        "trained length": lambda run: [_trained(run)],
        f"needle: exact match ≥ {thresholds.needle:g}%": lambda run: [_needle(run, thresholds.needle)],
        "loss falls with every step to": lambda run: [_loss(run)],
    }
    if tasks:
        columns[f"RULER: average ≥ {thresholds.ruler:g}%"] = lambda run: _ruler(run, ruler, tasks, thresholds.ruler)
    rows = [(run.name, [_joined(cells(run)) for cells in columns.values()]) for run in runs]
    blocks = block_of("Longest length, tokens, up to which every measured length is at the threshold or above", rows)
    if not any(cell.hint for _, cells in rows for cell in cells):
        return None
    return Table("Effective context", _reading(rows, list(columns), tasks), list(columns), blocks, "run")


def _joined(cells: list[Cell]) -> Cell:
    """Several settings of one run in one cell."""
    if len(cells) < 2:
        return cells[0] if cells else Cell()
    return Cell("; ".join(f"{cell.main} {cell.detail}" for cell in cells), hint=cells[0].hint)


def _trained(run: Run) -> Cell:
    return Cell() if run.trained_length is None else Cell(tokens(run.trained_length))


def _needle(run: Run, threshold: float) -> Cell:
    found = {length: pooled(run, EXACT_MATCH, length) for length in needle_lengths(run)}
    values = {length: 100 * one.value for length, one in found.items() if one is not None}
    return _cell(effective_length(values, threshold), values, run)


def _loss(run: Run) -> Cell:
    values = losses(run)
    return _cell(longest_falling(values), values, run) if len(values) > 1 else Cell()


def _ruler(run: Run, found: list[Scores], tasks: list[str], threshold: float) -> list[Cell]:
    cells = []
    for one in found:
        if one.run is run:
            averages = {length: one.average(tasks, length) for length in lengths_of([one])}
            values = {length: value[0] for length, value in averages.items() if value is not None}
            cell = _cell(effective_length(values, threshold), values, run)
            scaling = named(one, found).removeprefix(run.name).lstrip(", ")
            cells.append(Cell(cell.main, scaling and f"({scaling})", cell.beyond, hint=cell.hint))
    return cells


def _cell(held: int | None, values: Mapping[int, float], run: Run) -> Cell:
    if not values:
        return Cell()
    measured = sorted(values)
    hint = ", ".join(f"{tokens(length)}: {values[length]:.3g}" for length in measured)
    if held is None:
        return Cell(f"< {tokens(measured[0])}", hint=hint)
    detail = "the longest measured" if held == measured[-1] else ""
    return Cell(f"{'≥ ' if detail else ''}{tokens(held)}", detail, run.is_beyond(held), hint=hint)


def _reading(rows: list[tuple[str, list[Cell]]], columns: list[str], tasks: list[str]) -> str:
    parts = []
    for i, column in enumerate(columns[1:], start=1):
        held: dict[str, list[str]] = {}
        for name, cells in rows:
            if cells[i].hint:
                held.setdefault(cells[i].main, []).append(name)
        if held:
            words = "; ".join(f"{length} {listed(names)}" for length, names in held.items())
            parts.append(f"{column[0].upper()}{column[1:]}: {words}.")
    ruler = f" RULER's average is over {counted(len(tasks), 'task')}: {listed(tasks)}." if tasks else ""
    return " ".join(parts) + ruler
