"""The base: the model before continued pretraining, which is a row of every table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation.results import document_table, results_table
from ropewalk.report.runs import METRIC_COLUMNS, Run, holds_run, load_run
from ropewalk.runs.directory import RunDirectory

MODEL_PATH = "model.path"


def with_bases(runs: list[Run], given: str | None) -> list[Run]:
    """The runs and, after them, the model that each was continued from, unless it is one of them already.

    A base that was never evaluated, or cannot be found here (a hub id), is a run without numbers, so that its row
    says so.

    Args:
        runs: as given by the user.
        given: directory of the base or of its evaluation; None: from model.path of the runs.

    Raises:
        UserError: where ``given`` is not a run directory.
    """
    if given is not None and not Path(given).is_dir():
        raise UserError(f"base={given} is not a directory; give the base's run directory, or that of its evaluation")
    rows = list(runs)
    for path in [given] if given is not None else _started_from(runs):
        at = next((i for i, run in enumerate(rows) if _is_at(run, path)), None)
        if at is not None:
            rows[at] = replace(rows[at], is_base=True)
            continue
        base = load_run(Path(path)) if given is not None else _look_up(path)
        if any(run.name == base.name for run in rows):
            base = replace(base, name=path)
        rows.append(replace(base, is_base=True))
    return rows


def how_to_evaluate(run: Run) -> str:
    """For a base without numbers, the command that makes them."""
    return (
        f"{run.name} was not evaluated here: python scripts/evaluate.py checkpoint={run.directory} output=DIR ..., "
        "then base=DIR."
    )


def _started_from(runs: list[Run]) -> list[str]:
    """Different starting models of the runs, in order; a run from random weights has none."""
    return list(dict.fromkeys(str(run.config[MODEL_PATH]) for run in runs if run.config.get(MODEL_PATH)))


def _is_at(run: Run, path: str) -> bool:
    """True if ``run`` is the model at ``path``: its directory, its export, or an evaluation of it."""
    paths = [str(run.directory), str(RunDirectory(run.directory).export)]
    paths += [str(run.evaluation["checkpoint"])] if "checkpoint" in run.evaluation else []
    return Path(path).resolve() in {Path(candidate).resolve() for candidate in paths}


def _look_up(path: str) -> Run:
    """The run whose export lies at ``path``; a run without numbers where there is none."""
    directory = Path(path)
    is_export = directory == RunDirectory(directory.parent).export
    for candidate in (directory.parent, directory) if is_export else (directory,):
        if holds_run(candidate):
            return load_run(candidate)
    return Run(
        name=path,
        directory=directory,
        config={},
        record={},
        metrics=pd.DataFrame(columns=list(METRIC_COLUMNS)),
        table=results_table([]),
        documents=document_table([]),
        evaluation={},
        verification={},
    )
