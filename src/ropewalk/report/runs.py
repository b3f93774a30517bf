"""The content of run directories, read once, and the base: the model that the runs were continued from.

Every part of a run but the directory itself may be missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ropewalk.errors import UserError
from ropewalk.evaluation.results import (
    OWN_HARNESS,
    VIDEO_HARNESS,
    as_shares,
    document_table,
    evaluation_directories,
    read_evaluations,
    results_table,
)
from ropewalk.files import read_object
from ropewalk.rope import Position
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_rows
from ropewalk.runs.record import recorded_at

METRIC_COLUMNS = ("step", "tokens", "loss", "tokens_per_second")


@dataclass(frozen=True, eq=False)
class Run:
    """One run; a missing part is an empty mapping or an empty table with its columns.

    Attributes:
        name: of the run in its results, else in run.json, else in config.yaml, else of the directory.
        directory: as given by the user.
        config: resolved TrainConfig, dotted key -> value.
        record: run.json.
        metrics: one row for each logged step, ascending.
        table: the results tables of the run's evaluations in one; scores in percent.
        documents: losses by document and bucket of positions.
        evaluation: evaluation.json, the record of the losses and needles.
        verification: export/verification.json.
        left_out: what its evaluations hold and this does not, and why.
        is_base: whether the other runs were continued from it.
        test_time: the test-time setting that ``table`` was measured under; "": not recorded.
        settings: where it was measured under several, each of them by name; every one is a run of its own here.
        folder: that the names of all runs here begin with, left out of ``name``; "" or ending in "/".
    """

    name: str
    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=partial(pd.DataFrame, columns=list(METRIC_COLUMNS)))
    table: pd.DataFrame = field(default_factory=partial(results_table, ()))
    documents: pd.DataFrame = field(default_factory=partial(document_table, ()))
    evaluation: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    is_base: bool = False
    test_time: str = ""
    settings: dict[str, Run] = field(default_factory=dict, repr=False)
    folder: str = ""

    @property
    def label(self) -> str:
        """The name without the test-time setting."""
        return self.name.removesuffix(f", {self.test_time}") if self.settings else self.name

    @property
    def full_label(self) -> str:
        """The label with its folder."""
        return self.folder + self.label

    @property
    def each_setting(self) -> list[Run]:
        """The run under each of its test-time settings; itself if there is one."""
        return list(self.settings.values()) or [self]

    @property
    def whole(self) -> Run:
        """The run with its numbers under all test-time settings."""
        tables = [run.table for run in self.each_setting]
        table = pd.concat(tables, ignore_index=True).drop_duplicates(ignore_index=True)
        return replace(self, name=self.label, table=table, test_time="", settings={})

    def beside(self, other: Run) -> Run:
        """This run under the test-time setting of another, where it was measured under that, too."""
        return self.settings.get(other.test_time, self)

    def is_same(self, other: Run) -> bool:
        """True if both are one run, under whichever settings."""
        return self.directory == other.directory and self.label == other.label

    @cached_property
    def results(self) -> pd.DataFrame:
        """The rows of losses and needles, in text and in videos; accuracies as shares of 1."""
        return as_shares(self.table[self.table["harness"].isin((OWN_HARNESS, VIDEO_HARNESS))])

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The rows of the other harnesses, in percent."""
        return self.table[~self.table["harness"].isin((OWN_HARNESS, VIDEO_HARNESS))]

    @cached_property
    def trained_length(self) -> int | None:
        """Tokens of the context that the run was trained at, as run.json or evaluation.json records it."""
        return self._length("trained_length")

    @cached_property
    def pretrained_length(self) -> int | None:
        """Tokens of the context that the starting model was trained at, from the same files."""
        return self._length("pretrained_length")

    def _length(self, name: str) -> int | None:
        length = self.record.get(name, self.evaluation.get(name))
        return None if length is None else int(length)

    @cached_property
    def inv_freq(self) -> NDArray[np.float64] | None:
        """Inverse frequencies, float64 (head_dim // 2,), radians per token; None where unknown.

        Those of training; for a model that was only evaluated, those of its shortest context length.
        """
        settings = self.evaluation.get("settings") or [{}]
        values = self.record.get("inv_freq", settings[0].get("inv_freq"))
        return np.asarray(values, dtype=np.float64) if values else None

    def task(self, task: str, metric: str) -> pd.DataFrame:
        """The rows of one task and metric."""
        return self.results[(self.results["task"] == task) & (self.results["metric"] == metric)]

    def number(self, task: str, metric: str, length: int) -> pd.Series | None:
        """The row of one task and metric at a context length; None where it was not measured."""
        rows = self.task(task, metric)
        rows = rows[rows["context_length"] == length]
        return None if rows.empty else rows.iloc[0]

    def harness(self, name: str) -> pd.DataFrame:
        """The rows of one harness without the cells of needle grids."""
        return self.table[(self.table["harness"] == name) & self.table["depth"].isna()]

    def is_called(self, name: str) -> bool:
        """True if ``name`` means this run: its name, label or run_name, its directory, or the end of one of these."""
        names = {self.name, self.folder + self.name, self.label, self.full_label}
        names |= {str(self.record.get("run_name")), str(self.directory.resolve())}
        return name in names | {own.rpartition("/")[2] for own in names} | {str(self.directory)}

    @property
    def begins_with_bos(self) -> bool | None:
        """True if the documents that it read began with BOS; None: not recorded."""
        trained = self.record.get("special_tokens") or {}
        begins: bool | None = self.evaluation.get("bos", trained.get("bos"))
        return begins

    @property
    def is_trained_here(self) -> bool:
        """True if train.py made it; else it was only evaluated."""
        return bool(self.record) or len(self.metrics) > 0

    @property
    def document_prefixes(self) -> dict[str, str]:
        """SHA-256 of the first tokens of each evaluated document, by its name."""
        return self.evaluation.get("document_prefixes", {})

    def is_beyond(self, length: int) -> bool:
        """True if ``length`` tokens is past the run's trained length."""
        return self.trained_length is not None and length > self.trained_length


def of_text(runs: Sequence[Run]) -> bool:
    """True unless all that the runs were evaluated on is videos, so that text has nothing to show or to miss."""
    harnesses = {harness for run in runs for harness in run.table["harness"]}
    return harnesses != {VIDEO_HARNESS}


def holds_run(directory: Path) -> bool:
    """True if anything of a run lies in ``directory``, so that :func:`load_run` would read it."""
    run = RunDirectory(directory)
    is_trained = any(path.is_file() for path in (run.config, run.record, run.metrics))
    return is_trained or bool(evaluation_directories(directory))


def load_runs(directories: Sequence[str]) -> list[Run]:
    """The runs at ``directories``, in that order.

    Raises:
        UserError: for no directory, one that does not exist or holds nothing of a run, a damaged file, or
            two runs of one name.
    """
    if not directories:
        raise UserError("runs=[] names no run; give at least one run directory: runs=[outputs/a,outputs/b]")
    loaded = [load_run(Path(directory)) for directory in directories]
    for name, count in Counter(run.name for run in loaded).items():
        if count > 1:
            where = ", ".join(str(run.directory) for run in loaded if run.name == name)
            raise UserError(
                f"{count} runs are called {name} ({where}), and a run's name must be its own here; leave one "
                "out, or evaluate one again under another name (scripts/evaluate.py name=...)"
            )
    folder = _shared_folder([run.name for run in loaded])
    return [setting for run in loaded for setting in by_test_time(_without(folder, run))]


def _shared_folder(names: Sequence[str]) -> str:
    """The folders that all of several names begin with (``study/regime/``); "": none."""
    levels = zip(*(name.split("/")[:-1] for name in names), strict=False) if len(names) > 1 else ()
    return "".join(f"{level[0]}/" for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _without(folder: str, run: Run) -> Run:
    return replace(run, name=run.name.removeprefix(folder), folder=folder) if run.name.startswith(folder) else run


def by_test_time(run: Run) -> list[Run]:
    """The run under each test-time setting that its numbers were measured under; itself if there is one.

    Settings that have all their numbers in common are one. Numbers of no recorded setting stay with the first.
    """
    parts: dict[tuple[int, ...], list[str]] = {}
    cells = run.table["test_time"].str.split(",")
    names = list(dict.fromkeys(name for cell in cells for name in cell if name))
    for name in names:
        rows = [i for i, cell in cells.items() if name in cell or (not any(cell) and name == names[0])]
        parts.setdefault(tuple(rows), []).append(name)
    if len(parts) < 2:
        return [replace(run, test_time=" = ".join(names))]
    settings: dict[str, Run] = {}
    for numbers, alike in parts.items():
        name = " = ".join(alike)
        table = run.table.loc[list(numbers)].reset_index(drop=True)
        settings[name] = replace(run, name=f"{run.name}, {name}", table=table, test_time=name, settings=settings)
    return list(settings.values())


def once(runs: Sequence[Run]) -> list[Run]:
    """Each run once and by its label, under whichever setting: for what test time does not change."""
    first = [run for i, run in enumerate(runs) if not any(run.is_same(other) for other in runs[:i])]
    return [run if run.label == run.name else replace(run, name=run.label) for run in first]


def load_run(directory: Path) -> Run:
    """The run at ``directory``.

    Raises:
        UserError: where there is no such directory, nothing of a run in it, or a damaged file.
    """
    if not directory.is_dir():
        raise UserError(f"runs: {directory} is not a directory; give run directories, as train.py writes them")
    run = RunDirectory(directory)
    config = flatten(recorded_at(directory) or {})
    record = read_object(run.record)
    record |= _learned(run, config, record)
    metrics = _metrics(run.metrics)
    evaluations = read_evaluations(directory)
    if not any((config, record, len(metrics), len(evaluations.results))):
        raise UserError(
            f"runs: {directory} holds none of config.yaml, run.json, metrics.jsonl and evaluation/table.parquet; give "
            "a directory that train.py or scripts/evaluate.py wrote"
        )
    return Run(
        name=_name(directory, evaluations.results["run"], record, config),
        directory=directory,
        config=config,
        record=record,
        metrics=metrics,
        table=evaluations.results,
        documents=evaluations.documents,
        evaluation=evaluations.record,
        verification=read_object(run.export / "verification.json"),
        left_out=evaluations.left_out,
    )


def _learned(run: RunDirectory, config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The frequencies that a run has learned, from its newest checkpoint: run.json has those that it began with.

    Its base does not follow from them any more, so that is named beside them.
    """
    steps = config.get("rope.chain") or []
    if not any(step["method"] == "learned" and step.get("alpha") is None for step in steps):
        return {}
    checkpoint = run.newest_checkpoint()
    learned = None if checkpoint is None else Position.from_pretrained(checkpoint).spectrum().inv_freq.tolist()
    return {"inv_freq": learned, "learned_from": record.get("rope_theta")}


def _name(directory: Path, run_column: pd.Series, record: dict[str, Any], config: dict[str, Any]) -> str:
    """The run's name: that of training, unless an evaluation gave it another; see :func:`ropewalk.runs.run_name`."""
    trained = record.get("run_name") or config.get("run_name")
    root = directory.resolve()
    made = {trained, root.name, *(path.name for path in RunDirectory(root).exports.glob("*"))}  # not given by anybody
    names = sorted(set(run_column.astype(str)) - (made if trained else set()))
    if len(names) > 1:
        raise UserError(
            f"{directory}: its evaluations are of {len(names)} runs ({', '.join(names)}), and a run directory is one "
            "run; evaluate each into a directory of its own, or repeat the command under one name (it measures "
            "nothing again)"
        )
    return str((names or [trained or root.name])[0])


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys; lists and empty mappings stay values."""
    if not isinstance(node, dict) or not node:
        return {prefix: node} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _metrics(path: Path) -> pd.DataFrame:
    rows = read_rows(path)
    frame = pd.DataFrame(rows, columns=None if rows else list(METRIC_COLUMNS))
    missing = [column for column in METRIC_COLUMNS if column not in frame.columns]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; write it again with this version of ropewalk")
    # A run that was killed logs the steps since its last checkpoint again: the later record is what it kept.
    return frame.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


MODEL_PATH = "model.path"


def with_bases(runs: list[Run], given: str | None) -> list[Run]:
    """The runs and, after them, the model that each was continued from, unless it is one of them already.

    A base that was never evaluated, or cannot be found here (a hub id), is a row without numbers.

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
        if not any(_is_at(run, path) for run in rows):
            base = load_run(Path(path)) if given is not None else _look_up(path)
            base = _without(runs[0].folder, base)
            if any(run.label == base.name for run in rows):
                base = replace(base, name=path)
            rows += by_test_time(base)
        rows = [replace(run, is_base=run.is_base or _is_at(run, path)) for run in rows]
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
    return Run(path, directory)
