"""Benchmark averages against context length, the same numbers as the tables of RULER and HELMET."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from ropewalk.report.benchmarks import Scores, Suite, benchmark_table, common_tasks, lengths_of, scores
from ropewalk.report.figures.style import (
    DASHES,
    Figure,
    Panel,
    Row,
    RunStyle,
    add_curve,
    canvas,
    log2_axis,
    mark_lengths,
)
from ropewalk.report.runs import Run
from ropewalk.report.text import counted

Z = 1.96  # of the 95% interval


def benchmark_figure(runs: list[Run], suite: Suite, styles: dict[str, RunStyle]) -> Figure | None:
    """A line for each run and test-time setting, over the tasks that all have; None without two lengths of them.

    A suite of categories has a panel for each.
    """
    found, table = scores(runs, suite), benchmark_table(runs, suite)
    if table is None or len(lengths_of(found)) < 2:
        return None
    panels = [panel for title, parts in _groups(found, suite) if (panel := _panel(title, parts, found, styles))]
    names = [run.name for run in runs if any(one.run is run for one in found)]
    reading = table.reading.partition(" Percent;")[0]
    return Figure(f"{suite.title} against context length", reading, [Row(panels)], names) if panels else None


def _groups(found: list[Scores], suite: Suite) -> list[tuple[str, list[Scores]]]:
    if not suite.by_category:
        return [("", found)]
    categories = dict.fromkeys(str(name) for one in found for name in one.known["category"])
    return [(name, [part for one in found if len((part := one.only("category", name)).known)]) for name in categories]


def _panel(title: str, parts: list[Scores], found: list[Scores], styles: dict[str, RunStyle]) -> Panel | None:
    tasks, lengths = common_tasks(parts), lengths_of(parts)
    if not tasks:
        return None
    plot = canvas("context length (tokens)", "percent", height=320)
    for one in parts:
        known = {length: value for length in lengths if (value := one.average(tasks, length)) is not None}
        rows = pd.DataFrame(
            [(n, value, value - Z * error, value + Z * error) for n, (value, error) in known.items()],
            columns=["x", "value", "ci_low", "ci_high"],
        )
        hover = [f"{n:,} tokens: {value:.1f} ± {Z * error:.1f}, {one.scaling}" for n, (value, error) in known.items()]
        add_curve(plot, one.run.name, _style(one, found, styles), rows, hover)
    log2_axis(plot, lengths[0] / 1.3, lengths[-1] * 1.3)
    trained = {one.run.trained_length for one in parts if one.run.trained_length}
    mark_lengths(plot, sorted(length for length in trained if lengths[0] <= length <= lengths[-1]))
    note = f"Mean of {counted(len(tasks), 'task')}: {', '.join(tasks)}. Band: 95% over samples, not training noise."
    return Panel(title, plot, note)


def _style(one: Scores, found: list[Scores], styles: dict[str, RunStyle]) -> RunStyle:
    """The run's own; another dash for each further test-time setting of it."""
    turn = [other.scaling for other in found if other.run is one.run].index(one.scaling)
    own = styles[one.run.name]
    return replace(own, dash=DASHES[(DASHES.index(own.dash) + turn) % len(DASHES)])
