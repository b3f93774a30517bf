"""V-NIAH: exact matches by frames of the video, one table and one heat map a run for each question, on one scale."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.evaluation.bootstrap import extent
from ropewalk.evaluation.results import VIDEO_HARNESS
from ropewalk.figures.figure import Figure
from ropewalk.figures.needle_grid import EXACT_MATCH, needle_figures
from ropewalk.figures.style import interval
from ropewalk.report.figure_tables import needle_tables
from ropewalk.report.results_section import accuracy_cell
from ropewalk.report.runs import Run
from ropewalk.report.section import Block, Cell, Section, block_of
from ropewalk.report.seeds import Arm, Quantity, arms

LEGEND = (
    "Share of exact matches over all depths, in brackets of the same outputs against shuffled answers. A name with "
    "temporal_scale is the run with a frame at so many positions; without one, at its own. Exploratory: see Decisions."
)


def vision_section(runs: Sequence[Run]) -> Section | None:
    """The needles in videos of the runs; None if no run has any."""
    has_any = [run for run in runs if (run.table["harness"] == VIDEO_HARNESS).any()]
    if not has_any:
        return None
    tables = [run.results[run.results["frames"].notna()] for run in has_any]
    tasks = dict.fromkeys(str(task) for rows in tables for task in rows["task"] if not task.endswith("_at_length"))
    tokens = {
        int(n): int(frames) for rows in tables for n, frames in zip(rows["context_length"], rows["frames"], strict=True)
    }
    lengths = sorted(tokens)
    blocks: list[Block] = []
    figures: list[Figure] = []
    for task in tasks:
        cells, pooled = needle_tables(has_any, task)
        asked = task.removeprefix("vniah_")
        per_run = [(run.name, [accuracy_cell(run, EXACT_MATCH, n, task) for n in lengths]) for run in has_any]
        blocks += block_of(f"Question of {asked}, each run", per_run)
        several = [arm for arm in arms(has_any) if arm.seeds > 1]
        means = [(f"{arm.name} ({arm.seeds} seeds)", [_mean(arm, task, n) for n in lengths]) for arm in several]
        blocks += block_of(f"Question of {asked}, mean over seeds [lowest, highest seed]", means)
        figures += needle_figures(cells, pooled, {}, f"V-NIAH, {asked}")
    missing = [f"{run.name}: no V-NIAH in its results." for run in runs if run not in has_any]
    columns = [f"{tokens[length]:,}" for length in lengths]
    return Section("V-NIAH", LEGEND, columns, blocks, "frames", figures=figures, missing=missing, on_terminal=True)


def _mean(arm: Arm, task: str, length: int) -> Cell:
    values = arm.values(_share(task, length))
    if not values:
        return Cell()
    return Cell(f"{sum(values) / len(values):.2f}", interval(*extent(values)) if len(values) > 1 else "")


def _share(task: str, length: int) -> Quantity:
    """The quantity: a run's exact matches over all depths."""

    def share(run: Run) -> float | None:
        row = run.number(f"{task}_at_length", EXACT_MATCH, length)
        return None if row is None else float(row["value"])

    return share
