"""Benchmark averages against context length, the numbers of the tables of RULER and HELMET."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import ALONE, PANEL, Figure, Panel, file_name, rows_of
from ropewalk.figures.style import Style, draw_curve, mark_lengths, tokens_axis
from ropewalk.figures.training_curves import each_run

Z = 1.96  # of the 95% interval


def benchmark_figure(
    suite: str,
    averages: pd.DataFrame,
    tasks: Mapping[str, Sequence[str]],
    trained_lengths: Mapping[str, int | None],
    styles: Mapping[str, Style],
) -> Figure | None:
    """A line for each run and test-time setting, a panel for each category; None without two lengths.

    Args:
        suite: name of the benchmark.
        averages: over the tasks that all rows have: run, scaling (test-time setting), category ("" for a suite without
            any), context_length (tokens), value, stderr (percent).
        tasks: category -> the tasks of its averages.
        trained_lengths: run -> tokens.
        styles: run -> style; each further setting of a run gets another dash.
    """
    if averages["context_length"].nunique() < 2:
        return None
    turns = {
        (name, scaling): turn
        for name, rows in each_run(averages)
        for turn, scaling in enumerate(dict.fromkeys(rows["scaling"]))
    }
    panels = [
        Panel(
            partial(_draw, rows=averages[averages["category"] == category], turns=turns, styles=styles,
                    trained=[n for run in dict.fromkeys(averages["run"]) if (n := trained_lengths.get(str(run)))]),
            category,
            f"Mean of {len(names)}: {', '.join(names)}.",
        )
        for category, names in tasks.items()
    ]  # fmt: skip
    title = f"{suite} against context length"
    of_runs = {name: styles[name] for name, _ in each_run(averages)}
    size = ALONE if len(panels) == 1 else PANEL
    caption = "Band: 95% over samples, not training noise."
    return Figure(file_name(title), title, rows_of(panels), caption, of_runs, size=size) if panels else None


def _draw(
    axes: Axes,
    rows: pd.DataFrame,
    turns: Mapping[tuple[str, str], int],
    styles: Mapping[str, Style],
    trained: Iterable[int],
) -> None:
    for name, of_run in each_run(rows):
        for scaling, part in of_run.groupby("scaling", sort=False):
            curve = part.rename(columns={"context_length": "x"}).sort_values("x")
            error = Z * curve["stderr"]
            curve = curve.assign(ci_low=curve["value"] - error, ci_high=curve["value"] + error)
            tips = [
                f"{int(row.x):,} tokens, {row.value:.1f} ± {Z * row.stderr:.1f}, {scaling}"
                for row in curve.itertuples()
            ]
            draw_curve(axes, name, styles[name].dashed(turns[name, str(scaling)]), curve, tips)
    low, high = int(rows["context_length"].min()), int(rows["context_length"].max())
    tokens_axis(axes, low / 1.3, high * 1.3, "context length (tokens)")
    mark_lengths(axes, trained, low, high)
    axes.set_ylabel("percent")
