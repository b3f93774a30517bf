"""Finished pieces of an evaluation, a file for each task, length and scaling: what a second run need not redo."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation.table import tidy_table, write_table
from ropewalk.files import write_atomically

CELLS = "cells"


@dataclass(frozen=True)
class Cell:
    """One task at one context length under one scaling.

    Attributes:
        harness: as in the table.
        task: as in the table; a group of tasks that run together counts as one.
        length: tokens; None where the task has no length of its own.
        scaling: the printed test-time part of the chain, or none.
    """

    harness: str
    task: str
    length: int | None
    scaling: str

    @property
    def file(self) -> Path:
        """Below the output directory."""
        under = re.sub(r"[^\w.=]+", "-", self.scaling).strip("-")
        return Path(CELLS) / self.harness / self.task / f"{self.length or 'short'}.{under}.json"

    def __str__(self) -> str:
        at = f" at {self.length:,}" if self.length else ""
        return f"{self.harness} {self.task}{at}, scaling {self.scaling}"


class CellStore:
    """The cells of one output directory.

    Args:
        output: directory.
        overwrite: measure again what was measured otherwise; a cell of the same identity is kept all the same.
    """

    def __init__(self, output: Path, overwrite: bool) -> None:
        self.output = output
        self.overwrite = overwrite

    def is_finished(self, cell: Cell, identity: Mapping[str, Any]) -> bool:
        """Whether ``cell`` was measured under this very identity.

        Raises:
            UserError: where it was measured under another one and may not be replaced, or lies beside cells of
                another version of its harness.
        """
        path = self.output / cell.file
        if not path.is_file():
            self._require_version(cell.harness, identity)
            return False
        found = _read(path)["identity"]
        differing = sorted(k for k in {*identity, *found} if identity.get(k) != found.get(k))
        if differing and not self.overwrite:
            raise UserError(
                f"{path} was measured with another {', '.join(differing)} "
                f"({'; '.join(f'{k}: {found.get(k)} there, {identity.get(k)} now' for k in differing)}), and the two "
                "do not compare; name another output, or replace it with overwrite=true"
            )
        return not differing

    def _require_version(self, harness: str, identity: Mapping[str, Any]) -> None:
        """Nothing is measured beside cells of another version, which one table could not hold."""
        if self.overwrite:
            return
        wanted = identity.get("harness_version")
        for path in sorted((self.output / CELLS / harness).rglob("*.json")):
            found = _read(path)["identity"].get("harness_version")
            if found != wanted:
                raise UserError(
                    f"{path} was measured with {harness} {found}, and this is {wanted}; the two do not compare: name "
                    "another output, or measure all of it again with overwrite=true"
                )

    def write(
        self,
        cell: Cell,
        identity: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        about: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write a finished cell, its samples first, and the table of all cells.

        Args:
            cell: which.
            identity: what its numbers depend on, as JSON.
            rows: of the table; ``source_file`` is filled in.
            about: counts and settings for people.
            samples: one JSON object for each prompt.

        Raises:
            UserError: where the disk takes no more; what was finished before stays.
        """
        path = self.output / cell.file
        rows = [{"source_file": cell.file.as_posix(), **row} for row in rows]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if samples:
                lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
                write_atomically(path.with_suffix(".samples.jsonl"), lines)
            record = {"cell": str(cell), "identity": dict(identity), "about": dict(about), "rows": rows}
            write_atomically(path, json.dumps(record, indent=2) + "\n")
            self.write_table()
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}); every cell finished before is kept: make room and "
                "repeat the command"
            ) from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table's rows of every finished cell, in the order of their files."""
        for path in sorted((self.output / CELLS).rglob("*.json")):
            yield from _read(path)["rows"]

    def write_table(self) -> pd.DataFrame:
        """Make table.parquet and table.csv anew from all cells.

        Raises:
            UserError: where cells of two versions of a harness lie together.
        """
        table = tidy_table(self.rows())
        write_table(self.output, table)
        return table


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"identity": content["identity"], "rows": content["rows"]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is measured again") from error
