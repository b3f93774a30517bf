"""The store of finished cells: a file for each task, length and scaling, which a repeated command does not redo."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation.results import EARLIER, OWN_HARNESS, RECORD, results_table, write_results
from ropewalk.files import replace_atomically, write_atomically

CELLS = "cells"
SAMPLES, DOCUMENTS = ".samples.jsonl", ".documents.parquet"  # beside a cell
SHARED = ("harness_version", "windows", "lengths")  # of an identity: what all cells of a harness have in common


@dataclass(frozen=True)
class Cell:
    """One task at one context length under one scaling.

    Attributes:
        harness: as in the table.
        task: as in the table; a group of tasks that run together counts as one.
        length: tokens; None: the task has no length of its own.
        scaling: the printed test-time part of the chain, or none.
    """

    harness: str
    task: str
    length: int | None
    scaling: str

    @property
    def file(self) -> Path:
        """Below the output directory."""
        scaling = re.sub(r"[^\w.=]+", "-", self.scaling).strip("-")
        return Path(CELLS) / self.harness / self.task / f"{self.length or 'short'}.{scaling}.json"

    def __str__(self) -> str:
        length = f" at {self.length:,}" if self.length else ""
        return f"{self.harness} {self.task}{length}, scaling {self.scaling}"


class ResultsStore:
    """The finished cells of one output directory, and the tables made of them.

    Args:
        output: directory.
        overwrite: measure again what was measured otherwise; a cell of the same identity is kept all the same.
    """

    def __init__(self, output: Path, overwrite: bool) -> None:
        self.output = output
        self.overwrite = overwrite

    def is_finished(self, cell: Cell, identity: Mapping[str, Any]) -> bool:
        """True if ``cell`` was measured under this very identity.

        Raises:
            UserError: it was measured under another one and may not be replaced, or lies beside cells of its harness
                that one table cannot hold together with it.
        """
        self._check_earlier_form(cell)
        path = self.output / cell.file
        known = _read(path)
        if known is not None:
            return not self._differing(path, known["identity"], identity, {*identity, *known["identity"]})
        for path in self._files(cell.harness):
            if (known := _read(path)) is not None:
                self._differing(path, known["identity"], identity, SHARED)
        return False

    def _differing(
        self, path: Path, known: Mapping[str, Any], identity: Mapping[str, Any], names: Collection[str]
    ) -> list[str]:
        """Those of ``names`` that differ; an error unless they may be replaced."""
        differing = sorted(name for name in names if known.get(name) != identity.get(name))
        if differing and not self.overwrite:
            both = "; ".join(f"{name}={known.get(name)}, not {identity.get(name)}" for name in differing)
            raise UserError(
                f"{path} was measured with {both}, and the two do not compare; name another output, or replace it with "
                "overwrite=true"
            )
        return differing

    def _check_earlier_form(self, cell: Cell) -> None:
        if cell.harness == OWN_HARNESS and (self.output / EARLIER).is_file() and not self.overwrite:
            raise UserError(
                f"{self.output / EARLIER} holds losses and needles as an earlier ropewalk wrote them; reports read "
                "it, and nothing is added to it: name another output, or measure them again with overwrite=true"
            )

    def write(
        self,
        cell: Cell,
        identity: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        about: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]] = (),
        documents: pd.DataFrame | None = None,
    ) -> None:
        """Write a finished cell, its samples and documents first, and the tables of all cells.

        Args:
            cell: which.
            identity: what its numbers depend on, as JSON.
            rows: of the results table; ``source_file`` is filled in.
            about: counts and settings for people.
            samples: one JSON object for each prompt.
            documents: losses by document that the rows were made from.

        Raises:
            UserError: the disk takes no more; what was finished before stays.
        """
        path = self.output / cell.file
        rows = [{"source_file": cell.file.as_posix(), **row} for row in rows]
        record = {"cell": str(cell), "identity": dict(identity), "about": dict(about), "rows": rows}
        try:
            if self.overwrite:
                self._remove_unlike(cell, identity)
            path.parent.mkdir(parents=True, exist_ok=True)
            if samples:
                lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
                write_atomically(path.with_suffix(SAMPLES), lines)
            if documents is not None:
                replace_atomically(path.with_suffix(DOCUMENTS), lambda file: documents.to_parquet(file, index=False))
            write_atomically(path, json.dumps(record, indent=2) + "\n")
            self.write_tables()
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}); every cell finished before is kept: make room and "
                "repeat the command"
            ) from error

    def _remove_unlike(self, cell: Cell, identity: Mapping[str, Any]) -> None:
        """Delete the cells of a harness that one table cannot hold beside ``cell``."""
        if cell.harness == OWN_HARNESS and (self.output / EARLIER).is_file():
            shutil.rmtree(self.output / CELLS / OWN_HARNESS, ignore_errors=True)
            for name in (EARLIER, "results.csv", RECORD):
                (self.output / name).unlink(missing_ok=True)
        for path in self._files(cell.harness):
            known = _read(path)
            if known is not None and any(known["identity"].get(name) != identity.get(name) for name in SHARED):
                for file in (path, path.with_suffix(SAMPLES), path.with_suffix(DOCUMENTS)):
                    file.unlink(missing_ok=True)

    def _files(self, harness: str = "") -> list[Path]:
        """Cells by task and length, of one harness or of all."""
        paths = (self.output / CELLS / harness).rglob("*.json")
        return sorted(paths, key=lambda path: (path.parent, _length(path), path.name))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table's rows of every finished cell."""
        for path in self._files():
            if (known := _read(path)) is not None:
                yield from known["rows"]

    def write_tables(self) -> None:
        """Make table.parquet, table.csv and documents.parquet anew from all cells.

        Raises:
            UserError: cells of two versions of a harness lie together.
        """
        files = [path.with_suffix(DOCUMENTS) for path in self._files()]
        losses = [pd.read_parquet(file) for file in files if file.is_file()]
        documents = pd.concat(losses, ignore_index=True) if losses else None
        write_results(self.output, results_table(self.rows()), documents)


def _length(path: Path) -> int:
    length = path.name.partition(".")[0]
    return int(length) if length.isdigit() else 0


def _read(path: Path) -> dict[str, Any] | None:
    """A cell's identity and rows; None: there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"identity": content["identity"], "rows": content["rows"]}
    except FileNotFoundError:  # or another process has just replaced it
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is measured again") from error
