"""Training loss on a token axis."""

from __future__ import annotations

import pandas as pd

from ropewalk.report.figures.breakdown import domain_row, final_mean, position_row
from ropewalk.report.figures.style import Figure, Panel, Row, RunStyle, add_line, canvas
from ropewalk.report.runs import Run
from ropewalk.report.text import amount, listed, ranked


def training_figure(runs: list[Run], styles: dict[str, RunStyle]) -> Figure:
    """Loss against tokens seen, a panel for each trained length: arms share one, the base has its own.

    Under it, where the runs logged them, the same by domain and by position in the context.
    """
    drawn = [run for run in runs if len(run.metrics)]
    missing = [f"{run.name}: no metrics.jsonl, so no training curve." for run in runs if not len(run.metrics)]
    by_length: dict[int | None, list[Run]] = {}
    for run in drawn:
        by_length.setdefault(run.trained_length, []).append(run)
    groups = sorted(by_length.items(), key=lambda item: item[0] or 0)
    rows = [Row([_panel(length, group, styles) for length, group in groups])] if groups else []
    for length, group in groups:
        rows += domain_row(_title(length), group, styles) + position_row(_title(length), group, styles)
    reading = " ".join(_reading(length, group) for length, group in groups)
    return Figure("Training curves", reading, rows, [run.name for run in drawn], missing)


def _title(length: int | None) -> str:
    return "Trained length not recorded" if length is None else f"Trained at {length:,} tokens"


def _panel(length: int | None, runs: list[Run], styles: dict[str, RunStyle]) -> Panel:
    plot = canvas("tokens seen", "loss (nats/token)")
    plot.update_xaxes(rangemode="tozero", nticks=6)
    for run in runs:
        style, seen, losses = styles[run.name], run.metrics["tokens"], run.metrics["loss"]
        smooth = _smoothed(losses)
        if smooth is not None:
            add_line(plot, run.name, style, seen, losses, faint=True)
        add_line(plot, run.name, style, seen, losses if smooth is None else smooth)
    smoothed = any(_smoothed(run.metrics["loss"]) is not None for run in runs)
    note = "Bold: mean of the last fiftieth of the steps; faint: each step." if smoothed else ""
    return Panel(_title(length), plot, note)


def _smoothed(losses: pd.Series) -> pd.Series | None:
    window = len(losses) // 50
    return losses.rolling(window, min_periods=1).mean() if window > 1 else None


def _reading(length: int | None, runs: list[Run]) -> str:
    ends = [(final_mean(run, "loss"), run.name) for run in runs]
    counts = sorted({int(run.metrics["tokens"].iloc[-1]) for run in runs})
    seen = f"after {listed(amount(count) for count in counts)} tokens"
    unequal = " The amounts of training differ, so the ends do not compare." if len(counts) > 1 else ""
    return f"{_title(length)}, {seen}: {ranked(ends)} (training loss, mean of the last tenth of the steps).{unequal}"
