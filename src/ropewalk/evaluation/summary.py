"""What an evaluation says in the terminal: scores by length, and averages with the tasks that they are over."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.evaluation.table import averages

SHOWN = ("ruler", "lm-eval", "helmet")


def summarize(table: pd.DataFrame, suites: Sequence[SuiteConfig]) -> str:
    """One block for each harness of ``suites`` and scaling: task by length, then the averages, tasks named."""
    blocks = []
    scored = table[table["harness"].isin(SHOWN) & table["depth"].isna()]
    for (harness, scaling), rows in scored.groupby(["harness", "test_time_scaling"]):
        shown = rows.assign(length=rows["context_length"].astype("string").fillna("own"))
        scores = shown.groupby(["task", "metric", "length"], sort=False)["value"].first().unstack(sort=False)
        blocks.append(
            f"{harness}, test-time scaling {scaling}\n{scores.to_string(float_format='{:.2f}'.format, na_rep='-')}"
        )
    blocks += [line for suite in suites for line in average_lines(table, suite)]
    return "\n\n".join(blocks)


def average_lines(table: pd.DataFrame, suite: SuiteConfig) -> list[str]:
    """Each average of a suite in words: value, length, how many tasks, which, and which are missing."""
    lines = []
    for name, tasks in suite.averages.items():
        for _, row in averages(chosen_metrics(table, suite), tasks).iterrows():
            at = "" if pd.isna(row["context_length"]) else f" at {row['context_length']:,}"
            missing = f"; missing: {row['missing']}" if row["missing"] else ""
            lines.append(
                f"{name}{at}, scaling {row['test_time_scaling']}: {row['value']:.2f} over {row['n_tasks']} of "
                f"{len(tasks)} tasks: {row['tasks']}{missing}"
            )
    return lines


def chosen_metrics(table: pd.DataFrame, suite: SuiteConfig) -> pd.DataFrame:
    """The rows of the table that averages may take: for a task with a chosen metric, that metric's alone."""
    wanted = table["task"].map(suite.metrics)
    return table[wanted.isna() | (table["metric"] == wanted)]
