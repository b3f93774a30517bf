"""HELMET's .score files as rows of the table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.evaluation.harness.helmet.helmet_datasets import Dataset
from ropewalk.evaluation.results import NEEDS_JUDGE, UNPUBLISHED

JUDGED = "-gpt4eval_o.json"  # what HELMET's own judge scripts write beside the outputs
PERCENT_OF = {
    "gpt-4-f1": 100.0,
    "gpt-4-score": 100.0 / 3,
}  # of what those hold; every .score file is in percent already


def score_rows(dataset: Dataset, length: int, output: Path, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of one dataset at one length: its scores, or a row without a value whose metric says why.

    Args:
        dataset: which.
        length: tokens.
        output: directory that eval.py wrote into.
        common: columns that all rows share.

    Raises:
        UserError: eval.py wrote no score for a dataset that it scores.
    """
    task = dataset.name
    row = {**common, "task": task, "context_length": length}
    stem = find_output(dataset, length, output)
    judged = stem.with_name(stem.name.removesuffix(".json") + JUDGED)
    if dataset.judge and not judged.is_file():
        return [{**row, "metric": NEEDS_JUDGE, "value": None, "n": 0, "source_file": stem.name}]
    source = judged if dataset.judge else stem.with_name(stem.name + ".score")
    if not source.is_file():
        raise UserError(f"{output}: HELMET wrote no score for {task} at {length}; its log says why ({stem.name})")
    return list(_scored(dataset, source, stem, row))


def unpublished_row(dataset: Dataset, length: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a dataset whose inputs at ``length`` nobody can rebuild."""
    return {**common, "task": dataset.name, "context_length": length, "metric": UNPUBLISHED, "value": None, "n": 0}


def find_output(dataset: Dataset, length: int, output: Path) -> Path:
    """The JSON of outputs that eval.py wrote for a dataset at a length.

    Raises:
        UserError: there is none, or several of different settings.
    """
    tail = dataset.at(length)["datasets"]
    outputs = sorted(output.glob(f"{tail}_*_in{length}_*.json"))
    outputs = [path for path in outputs if not path.name.endswith(JUDGED)]
    if len(outputs) != 1:
        names = ", ".join(path.name for path in outputs) or "none"
        raise UserError(
            f"{output} must hold one output of HELMET for {tail} at {length}, and holds: {names}; delete what other "
            "settings left there, or look into its log"
        )
    return outputs[0]


def _scored(dataset: Dataset, source: Path, stem: Path, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    scores = json.loads(source.read_text(encoding="utf-8"))
    scores = scores.get("averaged_metrics", scores)
    outputs = json.loads(stem.read_text(encoding="utf-8"))
    for metric in dataset.metrics:
        if metric not in scores:
            raise UserError(f"{source} has no {metric}; it holds: {', '.join(scores)}")
        values = outputs.get("metrics", {}).get(metric, [])
        yield {
            **row,
            "metric": metric,
            "value": scores[metric] * PERCENT_OF.get(metric, 1.0),
            "n": len(outputs["data"]),
            "stderr": _stderr(values),
            "source_file": source.name,
        }


def _stderr(values: list[float]) -> float | None:
    """Standard error, in percent, of the mean of per-sample scores of 0 to 1; None: there are fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return float(100 * (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5)
