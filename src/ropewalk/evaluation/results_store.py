"""The store of finished cells: a file for each task, length and scaling, which a repeated command does not redo."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation.results import (
    DOCUMENT_COLUMNS,
    KEY,
    OWN_HARNESS,
    TABLE,
    check_form,
    read_typed,
    results_table,
    write_results,
)
from ropewalk.files import read_object, replace_atomically, write_atomically, writing

CELLS = "cells"
SAMPLES, DOCUMENTS = ".samples.jsonl", ".documents.parquet"  # beside a cell
TEST_TIMES = "test_time.json"  # test-time setting -> lengths, their scaling, and passes
SHARED = ("harness_version", "windows", "lengths")  # of an identity: what all cells of a harness have in common
LABELS = ("run", "method")  # names, which earlier cells had in their identity and no number depends on


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
        run: name of the run in the tables, whatever it was called when a cell was measured.
    """

    def __init__(self, output: Path, overwrite: bool, run: str) -> None:
        self.output = output
        self.overwrite = overwrite
        self.run = run

    def is_finished(self, cell: Cell, identity: Mapping[str, Any]) -> bool:
        """True if ``cell`` was measured under this very identity.

        Raises:
            UserError: it was measured under another one and may not be replaced, or lies beside cells of its harness
                that one table cannot hold together with it.
        """
        check_form(self.output)
        path = self.output / cell.file
        known = _read(path)
        if known is not None:
            return not self._differing(path, known["identity"], identity, {*identity, *known["identity"]})
        for path in self._files():
            if (known := _read(path)) is not None and (path.is_relative_to(self.output / CELLS / cell.harness)):
                self._differing(path, known["identity"], identity, SHARED)
            elif known is not None and known["identity"].get("checkpoint") != identity.get("checkpoint"):
                raise UserError(
                    f"{path} was measured on another checkpoint, and one table is of one: name another output, or "
                    "move what is in this one away"
                )
        return False

    def _differing(
        self, path: Path, known: Mapping[str, Any], identity: Mapping[str, Any], names: Collection[str]
    ) -> list[str]:
        """Those of ``names`` that differ; an error unless they may be replaced."""
        differing = sorted(n for n in names if n not in LABELS and known.get(n) != identity.get(n))
        if differing and not self.overwrite:
            both = "; ".join(f"{name}={known.get(name)}, not {identity.get(name)}" for name in differing)
            raise UserError(
                f"{path} was measured with {both}, and the two do not compare; name another output, or replace it with "
                "overwrite=true"
            )
        return differing

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
        with writing(f"output={self.output}", self.output):
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

    def _remove_unlike(self, cell: Cell, identity: Mapping[str, Any]) -> None:
        """Delete the cells of a harness that one table cannot hold beside ``cell``."""
        for path in self._files(cell.harness):
            known = _read(path)
            if known is not None and any(known["identity"].get(name) != identity.get(name) for name in SHARED):
                for file in (path, path.with_suffix(SAMPLES), path.with_suffix(DOCUMENTS)):
                    file.unlink(missing_ok=True)

    def _files(self, harness: str = "") -> list[Path]:
        """Cells by task and length, of one harness or of all."""
        paths = (self.output / CELLS / harness).rglob("*.json")
        return sorted(paths, key=lambda path: (path.parent, _length(path), path.name))

    def record_test_time(self, name: str, lengths: Mapping[int | None, str], passes: Sequence[int]) -> None:
        """Record which cells a test-time setting is made of, so that the table can name it.

        Args:
            name: of the setting; a number is added to it where it means another scaling than before.
            lengths: tokens (None: tasks without a length) -> the scaling of the setting there.
            passes: tokens of its passes over the documents.
        """
        path = self.output / TEST_TIMES
        known = self._test_times()
        scalings = {str(length): scaling for length, scaling in lengths.items()}
        names = (name if i == 1 else f"{name}-{i}" for i in count(1))
        name = next(
            n for n in names if all(scalings.get(k, v) == v for k, v in known.get(n, {}).get("lengths", {}).items())
        )
        earlier = known.get(name, {"lengths": {}, "passes": []})
        entry = {"lengths": earlier["lengths"] | scalings, "passes": sorted({*earlier["passes"], *passes})}
        write_atomically(path, json.dumps(known | {name: entry}, indent=2) + "\n")

    def _test_times(self) -> dict[str, Any]:
        return read_object(self.output / TEST_TIMES)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table's rows of every finished cell; of a number that two passes measured alike, the shorter's.

        Raises:
            UserError: two cells measured one number otherwise.
        """
        settings = self._test_times()
        sources: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
        for path in self._files():
            if (known := _read(path)) is None:
                continue
            identity = {name: value for name, value in known["identity"].items() if name not in (*LABELS, "length")}
            for row in known["rows"]:
                key = tuple(row.get(name) for name in KEY if name != "run")
                other, other_identity = sources.setdefault(key, (path, identity))
                if other_identity != identity:
                    differing = sorted(n for n in identity if identity[n] != other_identity.get(n))
                    raise UserError(
                        f"{other} and {path} hold {row['task']} ({row['metric']}) at {row['context_length']} tokens "
                        f"and differ in {', '.join(differing)}; move one of them away, or name another output"
                    )
                if other == path:
                    names = [name for name, setting in settings.items() if _is_of(row, setting)]
                    yield {**row, "run": self.run, "test_time": ",".join(names)}

    def settings(self, records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """``records`` of settings and those of all losses in the store, each once, those of shorter lengths first."""
        known = {(setting["chain"], setting["lengths"][-1]): setting for setting in records}
        for path in self._files(OWN_HARNESS):
            if setting := (_read(path) or {"about": {}})["about"].get("setting"):
                known.setdefault((setting["chain"], setting["lengths"][-1]), setting)
        return sorted(known.values(), key=lambda setting: (setting["lengths"][0], setting["lengths"][-1]))

    def write_tables(self) -> None:
        """Make table.parquet, table.csv and documents.parquet anew from all cells; a change of the run's name is said.

        Raises:
            UserError: cells of two versions of a harness lie together.
        """
        files = [path.with_suffix(DOCUMENTS) for path in self._files()]
        losses = [read_typed(file, DOCUMENT_COLUMNS) for file in files if file.is_file()]
        documents = pd.concat(losses, ignore_index=True).assign(run=self.run) if losses else None
        table = self.output / TABLE
        earlier: set[str] = set()
        with suppress(UserError):  # damaged, it is made anew
            earlier = set(read_typed(table, {"run": "str"})["run"]) - {self.run} if table.is_file() else set()
        write_results(self.output, results_table(self.rows()), documents)
        if earlier:
            print(f"{table} calls the run {self.run} now, not {', '.join(sorted(earlier))}", flush=True)


def _is_of(row: Mapping[str, Any], setting: Mapping[str, Any]) -> bool:
    """True if a number is part of a test-time setting."""
    length = row.get("context_length")
    is_pass = row["task"] != "loss_by_position" or length in setting["passes"]
    return is_pass and setting["lengths"].get(str(length)) == row["test_time_scaling"]


def _length(path: Path) -> int:
    length = path.name.partition(".")[0]
    return int(length) if length.isdigit() else 0


def _read(path: Path) -> dict[str, Any] | None:
    """A cell's identity, rows and what else it says; None: there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"about": {}, **content, "identity": content["identity"], "rows": content["rows"]}
    except FileNotFoundError:  # or another process has just replaced it
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is measured again") from error
