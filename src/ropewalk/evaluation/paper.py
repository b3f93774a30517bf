"""A run's numbers beside the CoPE paper's (arXiv 2602.05258), each over the same tasks or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ropewalk.evaluation.helmet.datasets import CATEGORIES
from ropewalk.evaluation.ruler.tasks import TASKS

COLUMNS = ["source", "table", "benchmark", "method", "task", "context_length", "value"]
PAPER_LENGTH = 65_536  # trained; up to here the paper adds no scaling, past it YaRN with factor 4
HELMET_NAMES = {"Summ": "Summ", "QA": "LongQA", "ICL": "ICL", "Recall": "Recall", "RAG": "RAG"}
HELMET_AT_256K = ("Summ", "QA", "Recall")  # the published 256k average is over these three, the others over all five


@dataclass(frozen=True)
class Measure:
    """What a published cell is the mean of: groups of tasks, the mean of each first, then the mean of those.

    Attributes:
        harness: as in the table.
        groups: of task -> metric.
    """

    harness: str
    groups: tuple[Mapping[str, str], ...]


def _ruler(*names: str) -> Measure:
    return Measure("ruler", ({name: TASKS[name].metric for name in names},))


def _one(harness: str, task: str, metric: str) -> Measure:
    return Measure(harness, ({task: metric},))


def _helmet(*categories: str) -> Measure:
    return Measure("helmet", tuple({d.name: d.metrics[0] for d in CATEGORIES[c].datasets} for c in categories))


MEASURES = {
    ("RULER", "NIAH"): _ruler("niah_single_1", "niah_single_2", "niah_single_3"),
    ("RULER", "MK"): _ruler("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    ("RULER", "13-task average"): _ruler(*TASKS),
    ("InfiniteBench", "KV"): _one("lm-eval", "infinitebench_kv_retrieval", "score"),
    ("InfiniteBench", "Math.Find"): _one("lm-eval", "infinitebench_math_find", "score"),
    ("short-context", "MMLU"): _one("lm-eval", "mmlu", "acc"),
    ("short-context", "MMLU-Pro"): _one("lm-eval", "mmlu_pro", "exact_match,custom-extract"),
    ("short-context", "GPQA"): _one("lm-eval", "gpqa_main_zeroshot", "acc_norm"),
    ("short-context", "BBH"): _one("lm-eval", "bbh", "exact_match,get-answer"),
    ("short-context", "GSM8K"): _one("lm-eval", "gsm8k", "exact_match,strict-match"),
    **{("HELMET", theirs): _helmet(ours) for theirs, ours in HELMET_NAMES.items()},
    ("HELMET", "average"): _helmet(*HELMET_NAMES.values()),
}


def read_published(path: str | Path) -> pd.DataFrame:
    """Published numbers: source, table, benchmark, method, task, context_length (null: short context), value.

    Raises:
        ValueError: where the file is missing or lacks a column.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"suite.published={path} is not a file; the paper's is recipes/cope_llama3_8b_64k/expected.csv"
        )
    published = pd.read_csv(path)
    if missing := [name for name in COLUMNS if name not in published.columns]:
        raise ValueError(
            f"suite.published={path} lacks {', '.join(missing)}; it needs the columns {', '.join(COLUMNS)}"
        )
    return published.astype({"context_length": "Int64"})


def beside_published(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """One row for each published number of a method that was measured, and each scaling it was measured under.

    A mean counts only over all of its tasks: with one missing, ``measured`` is null and ``missing`` names it.

    Args:
        table: of evaluations, with the method of each run in ``method``.
        published: as :func:`read_published` gives it.

    Returns:
        benchmark, task, context_length, method, run, test_time_scaling, as_published (whether the scaling is the
        paper's at that length), published, measured, difference, n (least samples of a task), tasks, missing.
    """
    rows = []
    for (run, method), of_run in table.groupby(["run", "method"]):
        for _, cell in published[published["method"] == method].iterrows():
            measure = _measure(cell)
            if measure is None:
                continue
            at, length = of_run[of_run["harness"] == measure.harness], cell["context_length"]
            at = at[at["context_length"].isna() if pd.isna(length) else at["context_length"] == length]
            for scaling, scaled in at.groupby("test_time_scaling"):
                rows.append(_row(cell, measure, scaled) | {"run": run, "test_time_scaling": scaling})
    columns = ["benchmark", "task", "context_length", "method", "run", "test_time_scaling", "as_published"]
    return pd.DataFrame(rows, columns=[*columns, "published", "measured", "difference", "n", "tasks", "missing"])


def not_measured(table: pd.DataFrame, published: pd.DataFrame) -> str:
    """Which methods of the table have no published number, in words; empty where all have some."""
    unknown = sorted(set(table["method"]) - set(published["method"]))
    if not unknown:
        return ""
    known = ", ".join(sorted(set(published["method"])))
    return f"no published numbers for {', '.join(unknown)}; there are some for {known}"


def _measure(cell: pd.Series) -> Measure | None:
    if (cell["benchmark"], cell["task"]) == ("HELMET", "average") and cell["context_length"] > 131_072:
        return _helmet(*(HELMET_NAMES[name] for name in HELMET_AT_256K))
    return MEASURES.get((cell["benchmark"], cell["task"]))


def _row(cell: pd.Series, measure: Measure, rows: pd.DataFrame) -> dict[str, object]:
    means, counts, missing = [], [], []
    for group in measure.groups:
        found = {}
        for task, metric in group.items():
            match = rows[(rows["task"] == task) & (rows["metric"] == metric)].dropna(subset="value")
            if len(match):
                found[task] = float(match["value"].iloc[0])
                counts.append(int(match["n"].iloc[0]))
            else:
                missing.append(task)
        if found:
            means.append(sum(found.values()) / len(found))
    measured = sum(means) / len(means) if means and not missing else math.nan
    scaled = rows["test_time_scaling"].iloc[0] != "none"
    beyond = not pd.isna(cell["context_length"]) and cell["context_length"] > PAPER_LENGTH
    return {
        "benchmark": cell["benchmark"],
        "task": cell["task"],
        "context_length": cell["context_length"],
        "method": cell["method"],
        "as_published": scaled == beyond,
        "published": cell["value"],
        "measured": measured,
        "difference": measured - cell["value"],
        "n": min(counts, default=0),
        "tasks": ",".join(task for group in measure.groups for task in group),
        "missing": ",".join(missing),
    }
