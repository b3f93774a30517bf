"""Evaluations in the runs of a tracker: the names of their metrics, and what is logged under them.

The trainer's own metrics (train/...) are logged by :mod:`ropewalk.training.tracker`, over the axis ``tokens``.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd

from ropewalk.config.evaluation import CompareConfig
from ropewalk.config.train import TrackerConfig
from ropewalk.figures.evaluation_curves import OWN
from ropewalk.figures.figure import compose, render
from ropewalk.figures.needle_grid import EXACT_MATCH, TOKEN_ACCURACY
from ropewalk.files import read_object, sha256_of_json, write_atomically
from ropewalk.report.benchmarks import HELMET, RULER, Scores, common_tasks, lengths_of, scores, short_scores
from ropewalk.report.differences import Unpaired, by_position, passes
from ropewalk.report.page import find_baseline, sections_of
from ropewalk.report.results_section import losses, needle_lengths, pooled
from ropewalk.report.runs import Run, load_runs, once, with_bases
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.tracker import wandb_mode

TOKENS, POSITION, LENGTH = "tokens", "eval/position", "eval/length"
LOSS, DIFFERENCE = "eval/loss/", "eval/difference/"
LOSS_AT_LENGTH = "eval/loss_at_length"
NEEDLE, RULER_SCORE, HELMET_SCORE = "eval/needle/", "eval/ruler/", "eval/helmet/"
SHORT = "eval/short/"
AVERAGE = "average"
# Axis -> the metrics over it, as define_metric takes them.
AXES = {
    POSITION: (f"{LOSS}*", f"{DIFFERENCE}*"),
    LENGTH: (LOSS_AT_LENGTH, f"{LOSS_AT_LENGTH}/*", f"{NEEDLE}*", f"{RULER_SCORE}*", f"{HELMET_SCORE}*"),
}
TABLES = {"results": "tables/results", "scores": "tables/scores"}
FIGURES = "figures/"
Row = dict[str, float]


def history_of(run: Run, baseline: Run) -> list[Row]:
    """The evaluation as history: rows over the position in the context, then rows over the context length.

    A test-time setting after the run's first is a level of its metrics' names: ``eval/needle/none/exact_match``.
    """
    over_position: dict[float, Row] = {}
    over_length: dict[float, Row] = {}
    for level, setting in _levels(run):
        _add_positions(over_position, level, setting, baseline.beside(setting))
        _add_lengths(over_length, level, setting)
    axes = ((POSITION, over_position), (LENGTH, over_length))
    return [{axis: x, **values} for axis, rows in axes for x, values in sorted(rows.items())]


def summary_of(run: Run) -> Row:
    """Numbers without an axis: short-context scores, percent."""
    return {
        f"{SHORT}{level}{word(task)}/{word(metric)}": float(score.value)
        for level, setting in _levels(run)
        for (task, metric, _), score in short_scores(setting).items()
    }


def word(text: str) -> str:
    """A name from data as one level of a metric's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_")


def _levels(run: Run) -> Iterator[tuple[str, Run]]:
    """Level in the names of metrics, and the run, for each of its test-time settings."""
    for number, setting in enumerate(run.each_setting):
        yield f"{word(setting.test_time)}/" if number else "", setting


def _add_positions(rows: dict[float, Row], level: str, run: Run, baseline: Run) -> None:
    reference = {made.kind: made for made in passes(baseline)}
    for made in passes(run):
        name, tables = level + ("trained" if made.kind == OWN else word(made.kind)), {LOSS: made.curve}
        if made.kind in reference and not run.is_same(baseline):
            differences = by_position(run, made, baseline, reference[made.kind])
            tables |= {} if isinstance(differences, Unpaired) else {DIFFERENCE: differences}
        for prefix, table in tables.items():
            for row in table.itertuples():
                middle = (int(row.position_start) + int(row.position_end)) / 2
                rows.setdefault(middle, {})[prefix + name] = float(row.value)


def _add_lengths(rows: dict[float, Row], level: str, run: Run) -> None:
    for length, loss in losses(run).items():
        rows.setdefault(length, {})[f"{LOSS_AT_LENGTH}/{level}".rstrip("/")] = loss
    for length in needle_lengths(run):
        for metric in (EXACT_MATCH, TOKEN_ACCURACY):
            if (whole := pooled(run, metric, length)) is not None:
                rows.setdefault(length, {})[f"{NEEDLE}{level}{metric}"] = 100 * whole.value
    for score in scores([run], RULER):
        tasks = common_tasks([score])
        _add(rows, score, RULER_SCORE + level, {AVERAGE: tasks, **{task: [task] for task in tasks}})
    for score in scores([run], HELMET):
        names = dict.fromkeys(str(name) for name in score.known["category"])
        by_category = {name: common_tasks([score.only("category", name)]) for name in names}
        _add(rows, score, HELMET_SCORE + level, by_category)


def _add(rows: dict[float, Row], score: Scores, prefix: str, averages: dict[str, list[str]]) -> None:
    """Averages over tasks at each length; a scaling that the run has beside others is part of the name."""
    scaling = f"{word(score.scaling)}/" if score.name != score.run.name else ""
    for name, tasks in averages.items():
        for length in lengths_of([score]):
            if (value := score.average(tasks, length)) is not None:
                rows.setdefault(length, {})[f"{prefix}{scaling}{word(name)}"] = value[0]


def track(config: CompareConfig) -> list[str]:
    """Log the evaluation of each run into its tracker's run; print what was done with each.

    Returns:
        Names of the runs that were logged now.

    Raises:
        UserError: for runs that :func:`ropewalk.report.compare` refuses.
    """
    runs = once(with_bases(load_runs(config.runs), config.base))
    baseline = find_baseline(runs, config.baseline)
    logged = []
    for run in runs:
        refusal = _why_not(run, baseline)
        if refusal is None:
            _log(config, run, baseline)
            write_atomically(RunDirectory(run.directory).tracked, json.dumps({"sha256": _digest(run, baseline)}) + "\n")
            logged.append(run.name)
        print(f"tracker: {run.name}: {refusal or 'evaluation logged'}", flush=True)
    return logged


def _why_not(run: Run, baseline: Run) -> str | None:
    """Why a run is not logged; None where it is to be."""
    tracker = run.config.get("tracker.name", "none")
    if tracker not in ("wandb", "trackio"):
        return "not logged, as it was trained without a tracker"
    if tracker == "wandb" and not RunDirectory(run.directory).tracker.is_file():
        return "not logged, as it has no tracker.json with the id of its W&B run"
    if run.table.empty:
        return "not logged, as it has no finished evaluation"
    known = RunDirectory(run.directory).tracked
    if known.is_file() and read_object(known).get("sha256") == _digest(run, baseline):
        return "logged before"
    return None


def _digest(run: Run, baseline: Run) -> str:
    """Of the numbers that are logged."""
    return sha256_of_json([history_of(run, baseline), summary_of(run)])


def _log(config: CompareConfig, run: Run, baseline: Run) -> None:
    """History after the last step of training, then tables, figures and the summary."""
    tracker, live = _opened(run)
    last = int(run.metrics["step"].max()) if len(run.metrics) else 0
    rows = history_of(run, baseline)
    for number, row in enumerate(rows, start=1):
        live.log(row, **_at(run, last + number))
    tables = {TABLES["results"]: run.whole.results, TABLES["scores"]: run.whole.scores}
    shown: dict[str, Any] = {
        name: tracker.Table(dataframe=_plain(frame)) for name, frame in tables.items() if len(frame)
    }
    shown |= _figures(config, run, baseline, tracker)
    shown |= summary_of(run)
    live.log(shown, **_at(run, last + len(rows) + 1))
    live.finish()


def _at(run: Run, step: int) -> dict[str, int]:
    """Step at which trackio puts a row; W&B counts rows by itself, and drops those whose step it has passed."""
    return {"step": step} if run.config["tracker.name"] == "trackio" else {}


def _opened(run: Run) -> tuple[Any, Any]:
    """The tracker's module, and its run for the training run, opened again."""
    settings = TrackerConfig(
        name=run.config["tracker.name"], project=run.config["tracker.project"], group=run.config.get("tracker.group")
    )
    name = str(run.config.get("run_name", run.name))
    if settings.name == "trackio":
        import trackio

        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        return trackio, trackio.init(settings.project, name=name, group=settings.group, resume="allow", **quiet)
    import wandb

    live = wandb.init(
        project=settings.project,
        name=name,
        group=settings.group,
        id=read_object(RunDirectory(run.directory).tracker).get("wandb_id"),
        resume="allow",
        dir=run.directory,
        mode=wandb_mode(),
        settings=wandb.Settings(silent=True, console="off"),
    )
    for axis, names in AXES.items():
        live.define_metric(axis, hidden=True)
        for name in names:
            live.define_metric(name, step_metric=axis)
    return wandb, live


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """A table without pandas' own null, which trackers do not know."""
    return frame.astype(object).where(frame.notna(), None)


def _figures(config: CompareConfig, run: Run, baseline: Run, tracker: Any) -> dict[str, Any]:
    """The run's own figures as images with their captions: the first of a section by its name, then _2, _3."""
    shown = run.each_setting + ([] if run is baseline else baseline.each_setting)
    images: dict[str, Any] = {}
    for section in sections_of(config, shown, baseline.each_setting[0]):
        key = FIGURES + word(section.title.lower())
        for number, figure in enumerate([*section.figures, *section.folded_figures], start=1):
            pixels = _pixels(compose(figure, words=False))
            images[key if number == 1 else f"{key}_{number}"] = tracker.Image(
                pixels, caption=f"{figure.title}. {figure.explanation}"
            )
    return images


def _pixels(drawing: Any) -> np.ndarray:
    """uint8 (height, width, 4)."""
    return (matplotlib.image.imread(io.BytesIO(render(drawing, "png", crop=True))) * 255).astype(np.uint8)
