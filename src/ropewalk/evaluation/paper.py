"""A run's numbers beside published ones (a recipe's expected.csv), each over the same tasks or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation.harness.helmet.helmet_datasets import CATEGORIES
from ropewalk.evaluation.harness.ruler_tasks import TASKS
from ropewalk.evaluation.results import is_whole_score

COLUMNS = ["source", "table", "benchmark", "method", "task", "context_length", "value"]
COPE = "2602.05258"  # the paper's number on arXiv
PAPER_LENGTH = 65_536  # that it trains at; up to here it adds no scaling, past it YaRN by 4
HELMET_NAMES = {"Summ": "Summ", "QA": "LongQA", "ICL": "ICL", "Recall": "Recall", "RAG": "RAG"}
HELMET_AT_256K = ("Summ", "QA", "Recall")  # the published 256k average is over these three, the others over all five

LONGBENCH = {  # its 14 English tasks by category, as RoPE-ID's table has them (arXiv 2603.18017)
    "single_doc_qa": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi_doc_qa": ("2wikimqa", "hotpotqa", "musique"),
    "summarization": ("gov_report", "multi_news", "qmsum"),
    "few_shot": ("samsum", "trec", "triviaqa"),
    "code": ("lcc", "repobench-p"),
}
COMMON_SENSE = {"ARC-C": "arc_challenge", "HellaSwag": "hellaswag", "PIQA": "piqa"}  # RoPE-ID's (arXiv 2603.18017)


@dataclass(frozen=True)
class Measure:
    """The tasks that a published number is the mean of: first over each group, then over the groups.

    Attributes:
        harness: as in the table.
        groups: of task -> metric.
    """

    harness: str
    groups: tuple[Mapping[str, str], ...]


def _ruler(*names: str) -> Measure:
    return Measure("ruler", ({name: TASKS[name].metric for name in names},))


def _single(harness: str, task: str, metric: str) -> Measure:
    return Measure(harness, ({task: metric},))


def _longbench(*categories: str) -> Measure:
    return Measure("lm-eval", ({f"longbench_{task}": "score" for name in categories for task in LONGBENCH[name]},))


def _helmet(*categories: str) -> Measure:
    return Measure("helmet", tuple({d.name: d.metrics[0] for d in CATEGORIES[c].datasets} for c in categories))


MEASURES = {
    ("RULER", "NIAH"): _ruler("niah_single_1", "niah_single_2", "niah_single_3"),
    ("RULER", "MK"): _ruler("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    ("RULER", "13-task average"): _ruler(*TASKS),
    **{("RULER", name): _ruler(name) for name in TASKS},
    ("InfiniteBench", "KV"): _single("lm-eval", "infinitebench_kv_retrieval", "score"),
    ("InfiniteBench", "Math.Find"): _single("lm-eval", "infinitebench_math_find", "score"),
    ("short-context", "MMLU"): _single("lm-eval", "mmlu", "acc"),
    ("short-context", "MMLU-Pro"): _single("lm-eval", "mmlu_pro", "exact_match,custom-extract"),
    ("short-context", "GPQA"): _single("lm-eval", "gpqa_main_zeroshot", "acc_norm"),
    ("short-context", "BBH"): _single("lm-eval", "bbh", "exact_match,get-answer"),
    ("short-context", "GSM8K"): _single("lm-eval", "gsm8k", "exact_match,strict-match"),
    **{("short-context", column): _single("lm-eval", task, "acc_norm") for column, task in COMMON_SENSE.items()},
    ("short-context", "average"): Measure("lm-eval", (dict.fromkeys(COMMON_SENSE.values(), "acc_norm"),)),
    ("LongBench", "14-task average"): _longbench(*LONGBENCH),
    **{("LongBench", name): _longbench(name) for name in LONGBENCH},
    **{("HELMET", column): _helmet(category) for column, category in HELMET_NAMES.items()},
    ("HELMET", "average"): _helmet(*HELMET_NAMES.values()),
}


def read_published(path: str | Path, key: str = "suite.published") -> pd.DataFrame:
    """Published numbers: source, table, benchmark, method, task, context_length (null: short context), value.

    A column ``run`` may name the run that a number is to stand beside; without it, it is every run of the method. What
    follows a comma in ``task`` says under which setting (13-task average, shortest_period=16).

    Raises:
        UserError: the file is missing, is not a table, lacks a column, or has a row without a cell that it needs.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}={path} is not a file; the paper's is recipes/cope_llama3_8b_64k/expected.csv")
    try:
        published = pd.read_csv(path)
    except ValueError as error:
        raise UserError(f"{key}={path} is not a table: {' '.join(str(error).split())}; correct it") from error
    if missing := [name for name in COLUMNS if name not in published.columns]:
        raise UserError(f"{key}={path} lacks {', '.join(missing)}; it needs the columns {','.join(COLUMNS)}")
    if "run" not in published.columns:
        published["run"] = pd.Series(pd.NA, index=published.index, dtype="string")
    try:
        published = published.astype({"context_length": "Int64", "value": "float64"})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key}={path}: context_length must be whole numbers or nothing and value numbers ({error}); "
            "quote a name that has a comma"
        ) from error
    empty = published[[name for name in COLUMNS if name not in ("table", "context_length")]].isna().any(axis=1)
    out_of_range = np.isinf(published["value"]) | (published["context_length"] < 1).fillna(False)
    if (wrong := (empty | out_of_range).to_numpy(bool)).any():
        raise UserError(
            f"{key}={path}: row {int(wrong.argmax()) + 1} lacks a cell or has a number out of range; only "
            "table, run and context_length may be empty, value is finite, context_length 1 or more: complete it"
        )
    return published


def published_of(published: pd.DataFrame, run: str, method: str | None) -> pd.DataFrame:
    """The rows to set beside a run: those that name it or the last part of its name, and those of its method alone."""
    named = published["run"].isin([run, run.rpartition("/")[2]])
    return published[(named | (published["run"].isna() & (published["method"] == method))).fillna(False)]


def beside_published(table: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """One row for each published number of a method that was measured, and each scaling it was measured under.

    A mean counts only over all of its tasks: with one missing, ``measured`` is null and ``missing`` names it.

    Args:
        table: of evaluations, with the method of each run in ``method``.
        published: as :func:`read_published` gives it.

    Returns:
        benchmark, task, context_length, method, run, test_time_scaling, as_published (whether the scaling is the CoPE
        paper's at that length; null beside other papers), published, measured, difference, stderr (of the measured one
        over samples; null if a task has none), n (least samples of a task), tasks, missing.
    """
    rows = []
    for (run, method), of_run in table.groupby(["run", "method"]):
        for _, cell in published_of(published, run, method).iterrows():
            rows += [row | {"run": run} for row in measured_beside(cell, of_run)]
    columns = ["benchmark", "task", "context_length", "method", "run", "test_time_scaling", "as_published"]
    return pd.DataFrame(
        rows, columns=[*columns, "published", "measured", "difference", "stderr", "n", "tasks", "missing"]
    )


def measured_beside(cell: pd.Series, of_run: pd.DataFrame) -> list[dict[str, Any]]:
    """One published number beside one run's, for each scaling that it was measured under; see beside_published."""
    measure = _measure(cell)
    if measure is None:
        return []
    at, length = of_run[(of_run["harness"] == measure.harness) & is_whole_score(of_run)], cell["context_length"]
    at = at[at["context_length"].isna() if pd.isna(length) else at["context_length"] == length]
    return [
        _row(cell, measure, scaled) | {"test_time_scaling": scaling}
        for scaling, scaled in at.groupby("test_time_scaling")
    ]


def not_measured(table: pd.DataFrame, published: pd.DataFrame) -> str:
    """A sentence that names the methods of the table without a published number; empty if all have some."""
    pairs = table[["run", "method"]].drop_duplicates().itertuples(index=False)
    unknown = sorted({method for run, method in pairs if published_of(published, run, method).empty})
    if not unknown:
        return ""
    known = ", ".join(sorted(set(published["method"])))
    return f"no published numbers for {', '.join(unknown)}; there are some for {known}"


def _measure(cell: pd.Series) -> Measure | None:
    if (cell["benchmark"], cell["task"]) == ("HELMET", "average") and cell["context_length"] > 131_072:
        return _helmet(*(HELMET_NAMES[name] for name in HELMET_AT_256K))
    return MEASURES.get((cell["benchmark"], cell["task"].partition(",")[0]))


def _row(cell: pd.Series, measure: Measure, rows: pd.DataFrame) -> dict[str, Any]:
    means, variances, counts, missing = [], [], [], []
    for group in measure.groups:
        values, errors = {}, []
        for task, metric in group.items():
            match = rows[(rows["task"] == task) & (rows["metric"] == metric)].dropna(subset="value")
            if len(match):
                values[task] = float(match["value"].iloc[0])
                errors.append(float(match["stderr"].iloc[0]))
                counts.append(int(match["n"].iloc[0]))
            else:
                missing.append(task)
        if values:
            means.append(sum(values.values()) / len(values))
            variances.append(sum(error**2 for error in errors) / len(values) ** 2)
    measured = sum(means) / len(means) if means and not missing else math.nan
    scaled = rows["test_time_scaling"].iloc[0] != "none"
    beyond = not pd.isna(cell["context_length"]) and cell["context_length"] > PAPER_LENGTH
    return {
        "benchmark": cell["benchmark"],
        "task": cell["task"],
        "context_length": cell["context_length"],
        "method": cell["method"],
        "as_published": scaled == beyond if COPE in str(cell["source"]) else None,
        "published": cell["value"],
        "measured": measured,
        "difference": measured - cell["value"],
        "stderr": math.sqrt(sum(variances)) / len(means) if means and not missing else math.nan,
        "n": min(counts, default=0),
        "tasks": ",".join(task for group in measure.groups for task in group),
        "missing": ",".join(missing),
    }
