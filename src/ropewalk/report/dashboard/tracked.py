"""Evaluations into the runs that training logged to: history over position and length, tables, figures.

The trainer leaves the id of its W&B run in tracker.json, and names its trackio run by run_name; this goes on in the
same run, so the panels of the dashboard find training and evaluation in one place.
"""

from __future__ import annotations

import io
import json
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd

from ropewalk.config.evaluation import CompareConfig
from ropewalk.config.train import TrackerConfig
from ropewalk.figures.figure import compose, render
from ropewalk.files import sha256_of_json, write_atomically
from ropewalk.report.base import with_bases
from ropewalk.report.dashboard import metrics
from ropewalk.report.page import find_baseline, sections_of
from ropewalk.report.runs import Run, load_runs
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.tracker import wandb_mode


def track(config: CompareConfig) -> list[str]:
    """Log the evaluation of each run into its tracker's run; print what was done with each.

    Returns:
        Names of the runs that were logged now.

    Raises:
        UserError: for runs that :func:`ropewalk.report.compare` refuses.
    """
    runs = with_bases(load_runs(config.runs), config.base)
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
    if run.results.empty and run.table.empty:
        return "not logged, as it has no finished evaluation"
    known = RunDirectory(run.directory).tracked
    if known.is_file() and json.loads(known.read_text())["sha256"] == _digest(run, baseline):
        return "logged before"
    return None


def _digest(run: Run, baseline: Run) -> str:
    """Of the numbers that are logged."""
    numbers = [metrics.rows_of(run, baseline), metrics.summary_of(run)]
    return sha256_of_json(numbers)


def _log(config: CompareConfig, run: Run, baseline: Run) -> None:
    """History after the last step of training, then tables, figures and the summary."""
    tracker, live = _opened(run)
    last = int(run.metrics["step"].max()) if len(run.metrics) else 0
    rows = metrics.rows_of(run, baseline)
    for number, row in enumerate(rows, start=1):
        live.log(row, **_at(run, last + number))
    tables = {metrics.TABLES["results"]: run.results, metrics.TABLES["scores"]: run.scores}
    shown: dict[str, Any] = {
        name: tracker.Table(dataframe=_plain(frame)) for name, frame in tables.items() if len(frame)
    }
    shown |= _figures(config, run, baseline, tracker)
    shown |= metrics.summary_of(run)
    live.log(shown, **_at(run, last + len(rows) + 1))
    live.finish()


def _at(run: Run, step: int) -> dict[str, int]:
    """Step at which trackio puts a row; W&B counts rows by itself, and drops those whose step it has passed."""
    return {"step": step} if run.config["tracker.name"] == "trackio" else {}


def _opened(run: Run) -> tuple[Any, Any]:
    """The tracker's module, and its run for the training run, opened again."""
    settings = TrackerConfig(
        name=run.config["tracker.name"],
        project=run.config["tracker.project"],
        group=run.config.get("tracker.group"),
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
        id=json.loads(RunDirectory(run.directory).tracker.read_text())["wandb_id"],
        resume="allow",
        dir=run.directory,
        mode=wandb_mode(),
        settings=wandb.Settings(silent=True, console="off"),
    )
    for axis, names in metrics.AXES.items():
        live.define_metric(axis, hidden=True)
        for one in names:
            live.define_metric(one, step_metric=axis)
    return wandb, live


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """A table without pandas' own null, which trackers do not know."""
    return frame.astype(object).where(frame.notna(), None)


def _figures(config: CompareConfig, run: Run, baseline: Run, tracker: Any) -> dict[str, Any]:
    """The run's own figures as images with their captions: the first of a section by its name, then _2, _3."""
    alone = [run] if run is baseline else [run, baseline]
    images: dict[str, Any] = {}
    for section in sections_of(config, alone, baseline):
        key = metrics.FIGURES + metrics.word(section.title.lower())
        for number, figure in enumerate(section.figures, start=1):
            pixels = _pixels(compose(figure, words=False))
            images[key if number == 1 else f"{key}_{number}"] = tracker.Image(
                pixels, caption=f"{figure.title}. {figure.explanation}"
            )
    return images


def _pixels(drawing: Any) -> np.ndarray:
    """uint8 (height, width, 4)."""
    return (matplotlib.image.imread(io.BytesIO(render(drawing, "png", crop=True))) * 255).astype(np.uint8)
