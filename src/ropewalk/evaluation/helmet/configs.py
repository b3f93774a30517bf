"""The YAML that HELMET's eval.py takes: one for each category and length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ropewalk.evaluation.helmet.datasets import LENGTHS, Category, Dataset
from ropewalk.files import write_atomically


def published(dataset: Dataset, length: int) -> bool:
    """Whether the inputs of ``dataset`` at ``length`` are HELMET's own, or can be made anew."""
    return length in LENGTHS or dataset.rebuilt


def helmet_yaml(category: Category, datasets: Sequence[Dataset], length: int, data: Path, made: Path) -> dict[str, Any]:
    """The content of a YAML: parallel comma-separated lists, one entry for each dataset.

    Args:
        category: whose settings apply.
        datasets: of it.
        length: tokens of prompt and answer.
        data: HELMET's data directory.
        made: directory of inputs that were made anew, below which the same names stand.
    """
    rows = [dataset.at(length) for dataset in datasets]
    for row in rows:
        root = data if length in LENGTHS else made
        row["test_files"] = str(root / str(row["test_files"])) if row["test_files"] else ""
        if row["demo_files"] and not str(row["demo_files"]).startswith("prompts/"):
            row["demo_files"] = str(data / str(row["demo_files"]))
    return {
        **{name: ",".join(str(row[name]) for row in rows) for name in rows[0]},
        "use_chat_template": category.chat,
        "max_test_samples": category.samples,
        "shots": category.shots,
        "stop_new_line": category.newline,
    }


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration that eval.py's ``--config`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(content, sort_keys=False))
