"""Names of an evaluation in a tracker: the ones that the panels show and the logger writes.

The trainer's own metrics (train/...) are logged by :mod:`ropewalk.training.tracker`, over the axis ``tokens``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pandas as pd

from ropewalk.figures.loss_curves import OWN
from ropewalk.figures.needle_grid import EXACT_MATCH, TOKEN_ACCURACY
from ropewalk.report.benchmarks import HELMET, RULER, Scores, common_tasks, lengths_of, scores, short_scores
from ropewalk.report.differences import Pass, by_position, passes
from ropewalk.report.results_table import losses, needle_lengths, pooled
from ropewalk.report.runs import Run

TOKENS, POSITION, LENGTH = "tokens", "eval/position", "eval/length"
LOSS, DIFFERENCE = "eval/loss/", "eval/difference/"
LOSS_AT_LENGTH = "eval/loss_at_length"
NEEDLE, RULER_SCORE, HELMET_SCORE = "eval/needle/", "eval/ruler/", "eval/helmet/"
SHORT = "eval/short/"
AVERAGE = "average"
# Axis -> the metrics over it, as define_metric takes them.
AXES = {
    POSITION: (f"{LOSS}*", f"{DIFFERENCE}*"),
    LENGTH: (LOSS_AT_LENGTH, f"{NEEDLE}*", f"{RULER_SCORE}*", f"{HELMET_SCORE}*"),
}
TABLES = {"results": "tables/results", "scores": "tables/scores"}
FIGURES = "figures/"
Row = dict[str, float]


def rows_of(run: Run, baseline: Run) -> list[Row]:
    """The evaluation as history: rows over the position in the context, then rows over the context length."""
    return [*_by_position(run, baseline), *_by_length(run)]


def summary_of(run: Run) -> Row:
    """Numbers without an axis: short-context scores, percent."""
    scores_of = short_scores(run)
    return {f"{SHORT}{word(task)}/{word(metric)}": one.value for (task, metric, _), one in scores_of.items()}


def word(text: str) -> str:
    """A name from data as one level of a metric's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_")


def _by_position(run: Run, baseline: Run) -> Iterator[Row]:
    theirs = {one.kind: one for one in passes(baseline)}
    for one in passes(run):
        name = "trained" if one.kind == OWN else word(one.kind)
        rows: dict[tuple[int, int], Row] = {}
        for row in one.curve.itertuples():
            rows[int(row.position_start), int(row.position_end)] = {LOSS + name: float(row.value)}
        for bucket, difference in _differences(run, one, baseline, theirs.get(one.kind)):
            rows.setdefault(bucket, {})[DIFFERENCE + name] = difference
        for (start, end), values in sorted(rows.items()):
            yield {POSITION: (start + end) / 2, **values}


def _differences(run: Run, one: Pass, baseline: Run, other: Pass | None) -> Iterator[tuple[tuple[int, int], float]]:
    found = by_position(run, one, baseline, other) if other is not None and run is not baseline else None
    if isinstance(found, pd.DataFrame):
        for row in found.itertuples():
            yield (int(row.position_start), int(row.position_end)), float(row.value)


def _by_length(run: Run) -> Iterator[Row]:
    rows: dict[int, Row] = {}
    for length, loss in losses(run).items():
        rows.setdefault(length, {})[LOSS_AT_LENGTH] = loss
    for length in needle_lengths(run):
        for metric in (EXACT_MATCH, TOKEN_ACCURACY):
            if (whole := pooled(run, metric, length)) is not None:
                rows.setdefault(length, {})[NEEDLE + metric] = 100 * whole.value
    for one in scores([run], RULER):
        _add(rows, one, RULER_SCORE, {AVERAGE: common_tasks([one]), **{task: [task] for task in common_tasks([one])}})
    for one in scores([run], HELMET):
        names = dict.fromkeys(str(name) for name in one.known["category"])
        _add(rows, one, HELMET_SCORE, {name: common_tasks([one.only("category", name)]) for name in names})
    for length, values in sorted(rows.items()):
        yield {LENGTH: length, **values}


def _add(rows: dict[int, Row], one: Scores, prefix: str, averages: dict[str, list[str]]) -> None:
    """Averages over tasks at each length; a setting that the run has beside others is part of the name."""
    several = len(scores([one.run], RULER if prefix == RULER_SCORE else HELMET)) > 1
    setting = f"{word(one.scaling)}/" if several else ""
    for name, tasks in averages.items():
        for length in lengths_of([one]):
            if (value := one.average(tasks, length)) is not None:
                rows.setdefault(length, {})[f"{prefix}{setting}{word(name)}"] = value[0]
