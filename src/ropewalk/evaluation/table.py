"""The one tidy table that every harness ends in: a row is one number, with what it was measured on, by and under.

Scores of tasks are percentages, as papers print them (0 to 100); losses are nats per token. A number that could not
be had (a judge is needed, the inputs were never published) is a row of its own with a null value and ``n`` of 0, and
its metric says why; it is never a 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ropewalk.errors import UserError
from ropewalk.files import replace_atomically

TABLE_COLUMNS = {
    "run": "str",
    "method": "str",  # rope name
    "chain": "str",  # printed chain, test-time part included
    "test_time_scaling": "str",  # printed test-time part of the chain at this length, or none
    "harness": "str",  # ropewalk, ruler, lm-eval, helmet
    "harness_version": "str",
    "task": "str",
    "category": "str",
    "context_length": "Int64",  # tokens; null where the task has none of its own (short-context tasks)
    "depth": "float64",  # share of the context before the needle; NaN where the task has none
    "metric": "str",
    "value": "float64",  # percent or nats; NaN where the metric says why there is none
    "n": "int64",  # documents, prompts or samples
    "stderr": "float64",  # of the value, over those; NaN where unknown
    "source_file": "str",  # the harness's own file that the row was made from
}
TABLE = "table.parquet"
TABLE_CSV = "table.csv"
NEEDS_JUDGE = "needs_judge"  # metric of a task that only a judge model scores
UNPUBLISHED = "inputs_unpublished"  # metric of a task whose inputs nobody can rebuild
LOSS_METRICS = ("nll", "answer_nll")  # nats; every other metric is a percentage
KEY = ["run", "chain", "test_time_scaling", "harness", "task", "context_length", "depth", "metric"]
GROUP = ["run", "method", "chain", "test_time_scaling", "harness", "harness_version", "context_length"]


def tidy_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the table: its columns in their order and dtypes, absent ones null.

    Raises:
        UserError: for a column that the table does not have, a number twice, or a run measured by two versions of
            one harness.
    """
    table = pd.DataFrame(list(rows))
    unknown = [name for name in table.columns if name not in TABLE_COLUMNS]
    if unknown:
        raise UserError(f"columns {', '.join(unknown)} are not of the table; it has: {', '.join(TABLE_COLUMNS)}")
    table = table.reindex(columns=list(TABLE_COLUMNS)).fillna({"n": 0}).astype(TABLE_COLUMNS)
    require_unmixed(table)
    return table


def require_unmixed(table: pd.DataFrame) -> None:
    """Raise UserError where one run has numbers of two versions of a harness, or one number twice."""
    for (run, harness), rows in table.groupby(["run", "harness"]):
        versions = sorted(set(rows["harness_version"]))
        if len(versions) > 1:
            raise UserError(
                f"run {run} has numbers of {harness} {' and '.join(versions)}, which do not compare; measure them "
                "again with one version (overwrite=true), or name another output"
            )
    twice = table[table.duplicated(KEY)]
    if len(twice):
        row = twice.iloc[0]
        raise UserError(
            f"run {row['run']} has {row['harness']}'s {row['task']} ({row['metric']}) at {row['context_length']} "
            "twice; keep the results of one setting, or give the other run another name"
        )


def write_table(directory: Path, table: pd.DataFrame) -> None:
    """Write table.parquet and table.csv, each beside and renamed."""
    replace_atomically(directory / TABLE_CSV, lambda path: table.to_csv(path, index=False))
    replace_atomically(directory / TABLE, lambda path: table.to_parquet(path, index=False))


def read_table(directory: str | Path) -> pd.DataFrame:
    """The table of an evaluation's directory, columns and dtypes as in ``TABLE_COLUMNS``.

    Raises:
        UserError: where ``directory`` holds none.
    """
    path = Path(directory) / TABLE
    if not path.is_file():
        raise UserError(f"{directory} holds no {TABLE}; run scripts/evaluate.py with output={directory}")
    return pd.read_parquet(path).astype(TABLE_COLUMNS)[list(TABLE_COLUMNS)]


def averages(table: pd.DataFrame, tasks: Sequence[str], by: Sequence[str] = GROUP) -> pd.DataFrame:
    """The mean over ``tasks`` of each group, with the tasks that it is over.

    Only rows of these tasks without a depth count, one metric a task: rows of several metrics must be chosen from
    before. A group that lacks a task gets a mean of the others, and ``missing`` names what it lacks.

    Returns:
        the columns ``by``, value, stderr (of the mean of independent tasks), n_tasks, tasks and missing (both
        comma-separated, in the order of ``tasks``).

    Raises:
        UserError: where a group has several rows of one task.
    """
    chosen = table[table["task"].isin(tasks) & table["depth"].isna()]
    rows = []
    for key, group in chosen.groupby(list(by), dropna=False):
        if group["task"].duplicated().any():
            name = group["task"][group["task"].duplicated()].iloc[0]
            raise UserError(f"{name} has several rows in one average; choose one metric a task first")
        known = group.dropna(subset="value").set_index("task")
        present = [task for task in tasks if task in known.index]
        errors = known["stderr"].to_numpy()
        rows.append(
            {
                **dict(zip(by, key, strict=True)),
                "value": known["value"].mean(),
                "stderr": float(np.sqrt((errors**2).sum()) / len(known)) if len(known) else np.nan,
                "n_tasks": len(present),
                "tasks": ",".join(present),
                "missing": ",".join(task for task in tasks if task not in present),
            }
        )
    return pd.DataFrame(rows, columns=[*by, "value", "stderr", "n_tasks", "tasks", "missing"])
