"""The results table: a row for each number, with what it was measured on, by and under; and the losses by document.

Scores are percentages (0 to 100), as papers print them; losses are nats per token. A number that could not be measured
(a judge is needed, the inputs were never published) is a row with a null value and ``n`` of 0, and its metric says why.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ropewalk.errors import UserError, in_one_line
from ropewalk.evaluation.bootstrap import BUCKET, weighted_mean
from ropewalk.files import read_object, replace_atomically, write_atomically, writing
from ropewalk.runs.directory import RunDirectory

RESULT_COLUMNS = {
    "run": "str",
    "method": "str",  # rope name
    "chain": "str",  # printed chain, test-time part included
    "test_time_scaling": "str",  # printed test-time part of the chain at this length, or none
    "harness": "str",  # ropewalk, ruler, lm-eval, helmet
    "harness_version": "str",
    "task": "str",
    "category": "str",
    "context_length": "Int64",  # tokens; null: the task has no length of its own (short-context tasks)
    "position_start": "Int64",  # first position that a loss is over; of a score, the fewest tokens of its prompts
    "position_end": "Int64",  # one past the last; null: a score over all prompts of the task
    "depth": "float64",  # share of the context before the needle; NaN: the task has none
    "metric": "str",
    "value": "float64",  # percent or nats; NaN: the metric says why there is none
    "ci_low": "float64",  # 95% interval; NaN: unknown
    "ci_high": "float64",
    "stderr": "float64",  # of the value, over documents, prompts or samples; NaN: unknown
    "n": "int64",  # documents, prompts or samples
    "source_file": "str",  # the harness's own file that the row was made from
    "test_time": "str",  # names of the test-time settings that the number is part of, by commas; empty: not recorded
    "frames": "Int64",  # of a video, the needle's included, whose tokens context_length counts; null: there is none
}
DOCUMENT_COLUMNS = {
    "run": "str",
    "setting": "str",  # printed extra chain, or none
    "context_length": "int64",  # tokens of the pass
    "document": "str",
    "position_start": "int64",
    "position_end": "int64",
    "nll_sum": "float64",  # nats
    "tokens": "int64",
}
ESTIMATE = ["value", "ci_low", "ci_high", "stderr"]
TABLE, DOCUMENTS, RECORD = "table.parquet", "documents.parquet", "evaluation.json"
EARLIER = "results.parquet"  # losses and needles of an evaluation by an earlier ropewalk
ADDED = (*BUCKET, "ci_low", "ci_high", "test_time", "frames")  # columns that earlier tables lack
OWN_HARNESS = "ropewalk"  # of the losses and needles
VIDEO_HARNESS = "v-niah"  # of needles in videos
# nats; every other metric is a percentage
LOSS_METRICS = ("nll", "answer_nll", "answer_nll_oracle", "answer_nll_none", "first_less_last_nll")
NEEDS_JUDGE = "needs_judge"  # metric of a task that only a judge model scores
UNPUBLISHED = "inputs_unpublished"  # metric of a task whose inputs nobody can rebuild
NOTHING_TO_RECOVER = "recovery_undefined"  # metric of answers that are no better known with their facts
TOO_FEW = "too_few_key_tokens"  # metric of LongPPL over fewer than 200
UNPARSED = "unparsed"  # metric: percent of a task's answers in which the harness found nothing to score
REASONS = (
    NEEDS_JUDGE,
    UNPUBLISHED,
    NOTHING_TO_RECOVER,
    TOO_FEW,
)  # metrics of rows that have no value because nothing was measured
KEY = ["run", "chain", "test_time_scaling", "harness", "task", "context_length", *BUCKET, "depth", "metric"]
RELATIVE = 1e-4  # by which two passes over the same tokens may differ: chunks of another length round otherwise
GROUP = ["run", "method", "chain", "test_time_scaling", "harness", "harness_version", "context_length"]


def results_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the results table: its columns in their order and dtypes, absent ones null.

    Raises:
        UserError: for a column that the table does not have, a number twice, or a run measured by two versions of
            one harness.
    """
    table = typed_table(
        ({"n": 0, "test_time": ""} | {k: v for k, v in row.items() if v is not None} for row in rows), RESULT_COLUMNS
    )
    check_unmixed(table)
    return table


def document_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the table of losses by document: NLL sums in nats for each document and bucket of positions."""
    return typed_table(rows, DOCUMENT_COLUMNS)


def typed_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Rows as a table of ``columns`` (name -> dtype), in their order, absent ones null.

    Raises:
        UserError: for a column that is not among them.
    """
    table = pd.DataFrame(list(rows))
    unknown = [name for name in table.columns if name not in columns]
    if unknown:
        raise UserError(f"columns {', '.join(unknown)} are not of the table; it has: {', '.join(columns)}")
    return table.reindex(columns=list(columns)).astype(dict(columns))


def check_unmixed(table: pd.DataFrame) -> None:
    """Raise UserError if one run has numbers of two versions of a harness, or one number twice."""
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


def write_table(directory: Path, name: str, table: pd.DataFrame) -> None:
    """Write ``name``.csv and ``name``.parquet, each beside and renamed."""
    replace_atomically(directory / f"{name}.csv", lambda path: table.to_csv(path, index=False))
    replace_atomically(directory / f"{name}.parquet", lambda path: table.to_parquet(path, index=False))


def write_results(output: Path, results: pd.DataFrame, documents: pd.DataFrame | None = None) -> None:
    """Write table.csv, table.parquet and, of losses, documents.parquet; each is written beside and renamed."""
    write_table(output, Path(TABLE).stem, results)
    if documents is not None:
        replace_atomically(output / DOCUMENTS, lambda path: documents.to_parquet(path, index=False))


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    """Write evaluation.json: the losses and needles beside it are finished."""
    write_atomically(output / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_results(directory: str | Path) -> pd.DataFrame:
    """The results table of an evaluation, columns and dtypes as in ``RESULT_COLUMNS``.

    Raises:
        UserError: for a directory that holds none, or one by an earlier ropewalk.
    """
    check_form(Path(directory))
    path = Path(directory) / TABLE
    if not path.is_file():
        raise UserError(f"{directory} holds no {TABLE}; run scripts/evaluate.py with output={directory}")
    return read_typed(path, RESULT_COLUMNS, ADDED).fillna({"test_time": ""})


def check_form(directory: Path) -> None:
    """Raise UserError for an evaluation by an earlier ropewalk, which kept losses and needles in results.parquet."""
    if (directory / EARLIER).is_file():
        raise UserError(
            f"{directory / EARLIER} holds losses and needles as an earlier ropewalk wrote them, which is no longer "
            f"read; move {directory} away, and run scripts/evaluate.py again"
        )


def read_document_losses(directory: str | Path) -> pd.DataFrame:
    """The losses by document of an evaluation, columns and dtypes as in ``DOCUMENT_COLUMNS``.

    Raises:
        UserError: for a directory that holds none.
    """
    path = Path(directory) / DOCUMENTS
    if not path.is_file():
        raise UserError(f"{directory} holds no {DOCUMENTS}; run scripts/evaluate.py suite=quick output={directory}")
    return read_typed(path, DOCUMENT_COLUMNS)


def read_record(directory: str | Path) -> dict[str, Any]:
    """evaluation.json: the checkpoint, the documents and the spectra of an evaluation's losses and needles.

    Raises:
        UserError: for a directory that holds none, so that its losses and needles are not finished, or a damaged one.
    """
    path = Path(directory) / RECORD
    if not path.is_file():
        raise UserError(
            f"{directory} holds no finished evaluation (no {RECORD}); run scripts/evaluate.py with output={directory}"
        )
    return read_object(path)


@dataclass(frozen=True, eq=False)
class Evaluations:
    """Every evaluation of a run directory; without any, empty tables and an empty record.

    Attributes:
        results: the results tables in one; losses and needles of finished evaluations alone.
        documents: the losses by document.
        record: evaluation.json of the first finished evaluation, with the settings of all of them.
        left_out: what the directories hold besides, and why it is not here.
    """

    results: pd.DataFrame
    documents: pd.DataFrame
    record: dict[str, Any]
    left_out: list[str]


def read_evaluations(run_directory: Path) -> Evaluations:
    """The evaluations at ``run_directory``: what evaluate.py wrote there itself, or in ``evaluation*/`` of a run.

    A number that two evaluations hold alike is one.

    Raises:
        UserError: for a damaged file, or a number that two of the evaluations hold otherwise.
    """
    results: list[pd.DataFrame] = []
    documents: list[pd.DataFrame] = []
    records: list[dict[str, Any]] = []
    left_out: list[str] = []
    for directory in evaluation_directories(run_directory):
        table = read_results(directory)
        own = table["harness"] == OWN_HARNESS
        if (directory / RECORD).is_file():
            records.append(read_record(directory))
            documents += [read_document_losses(directory)] if (directory / DOCUMENTS).is_file() else []
            name = records[-1].get("config", {}).get("test_time", {}).get("name", "")
            table.loc[own & (table["test_time"] == ""), "test_time"] = name
        elif own.any():
            left_out.append(f"{directory}: its losses and needles are not finished; repeat its evaluation.")
            table = table[~own]
        results.append(table.assign(directory=str(directory)))
    whole = pd.concat([typed_table([], {**RESULT_COLUMNS, "directory": "str"}), *results], ignore_index=True)
    passes = ["setting", "context_length"]
    losses = pd.concat([typed_table([], DOCUMENT_COLUMNS), *documents], ignore_index=True)
    first = losses.assign(part=np.repeat(range(len(documents)), [len(d) for d in documents]).astype(int))
    losses = losses[first["part"] == first.groupby(passes)["part"].transform("min")]
    record = dict(records[0]) if records else {}
    if len(records) > 1:
        settings = [setting for other in records for setting in other.get("settings", [])]
        record["settings"] = list({(s["chain"], s["lengths"][-1]): s for s in reversed(settings)}.values())[::-1]
        for other in records:
            record["document_prefixes"] = other.get("document_prefixes", {}) | record.get("document_prefixes", {})
    return Evaluations(_collapsed(whole), losses.reset_index(drop=True), record, left_out)


def _collapsed(table: pd.DataFrame) -> pd.DataFrame:
    """Results of several directories (column ``directory``), a number that several hold alike once.

    Raises:
        UserError: two of them hold one number otherwise.
    """
    key = [name for name in KEY if name != "run"]
    twice = table.duplicated(key, keep=False)
    for _, rows in table[twice].groupby(key, dropna=False, sort=False):
        first = rows.iloc[0]
        for _, other in rows.iloc[1:].iterrows():
            if not (first["n"] == other["n"] and np.isclose(first["value"], other["value"], RELATIVE, equal_nan=True)):
                at = "" if pd.isna(first["context_length"]) else f" at {first['context_length']:,} tokens"
                raise UserError(
                    f"{first['directory']} and {other['directory']} both hold {first['harness']}'s {first['task']} "
                    f"({first['metric']}){at}, under {first['test_time_scaling']}: {first['value']:.6g} over "
                    f"{first['n']} and {other['value']:.6g} over {other['n']}; move one of them away"
                )
        names = dict.fromkeys(name for cell in rows["test_time"] for name in cell.split(",") if name)
        table.loc[rows.index, "test_time"] = ",".join(names)
    return table[~table.duplicated(key)].drop(columns="directory").reset_index(drop=True)


def evaluation_directories(run_directory: Path) -> list[Path]:
    """Directories with a results table: ``run_directory`` itself, and those in ``evaluation*/`` below it.

    Evaluations inside training are not among them: each measures the run at another step.
    """
    tables = [path for path in (run_directory / TABLE, run_directory / EARLIER) if path.is_file()]
    for name in (TABLE, EARLIER):
        tables += sorted(run_directory.glob(f"evaluation*/**/{name}"))
    in_training = RunDirectory(run_directory).evaluations
    return list(dict.fromkeys(path.parent for path in tables if in_training not in path.parents))


def as_shares(results: pd.DataFrame) -> pd.DataFrame:
    """The rows with accuracies as shares of 1 in place of percent; losses stay nats per token."""
    shares = results.copy()
    shares.loc[~shares["metric"].map(is_loss).astype(bool), ESTIMATE] /= 100
    return shares


def is_loss(metric: str) -> bool:
    """True if a metric is in nats per token; every other is an accuracy or score."""
    return metric.removesuffix("_shuffled") in LOSS_METRICS


def is_whole_score(table: pd.DataFrame) -> pd.Series:
    """True for a row of the results table that is a loss or score, over all prompts of its task.

    False for a cell of a needle grid, the score of prompts of one length stratum, and the share of unparsed answers.
    """
    is_stratum = table["position_start"].notna() & (table["harness"] != OWN_HARNESS)
    return table["depth"].isna() & ~is_stratum & (table["metric"] != UNPARSED)


def stratum_words(row: Mapping[str, Any]) -> str:
    """The prompts that a score is over if they are of one length stratum, to put behind its metric; else nothing."""
    if pd.isna(row["position_start"]):
        return ""
    return f", prompts of {row['position_start']:,} to {row['position_end'] - 1:,} tokens"


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a results table that were measured, those whose number is none (NaN, inf) included."""
    return table[~table["metric"].isin(REASONS)]


def not_finite(directory: str | Path) -> list[str]:
    """Numbers of an evaluation that are NaN or infinite, a line for each kind; empty if there are none."""
    rows = measured(read_results(directory))
    rows = rows[~np.isfinite(rows["value"].astype(float)) & (rows["task"] != "loss_by_position")]
    lines = [
        f"{harness} {task} ({metric}) at {', '.join(f'{n:,}' for n in part['context_length'].dropna().unique())} tokens"
        for (harness, task, metric), part in rows.groupby(["harness", "task", "metric"], sort=False)
    ]
    has_documents = (Path(directory) / DOCUMENTS).is_file()
    documents = read_document_losses(directory) if has_documents else typed_table([], DOCUMENT_COLUMNS)
    for (length, setting), part in documents.groupby(["context_length", "setting"], sort=False):
        sums = part.groupby("document")["nll_sum"].sum(skipna=False)
        if count := int((~np.isfinite(sums)).sum()):
            lines.append(f"losses of {count} of {len(sums)} documents, read to {length:,} tokens under {setting}")
    return lines


def averages(table: pd.DataFrame, tasks: Sequence[str], by: Sequence[str] = GROUP) -> pd.DataFrame:
    """The mean over ``tasks`` of each group, with the tasks that it is over.

    Only whole scores of these tasks count (see is_whole_score), with one metric a task: choose among several metrics
    first. A group that lacks a task gets a mean of the others, and ``missing`` names what it lacks.

    Returns:
        the columns ``by``, value, stderr (of the mean of independent tasks), n_tasks, tasks and missing (both
        comma-separated, in the order of ``tasks``).

    Raises:
        UserError: for a group with several rows of one task.
    """
    chosen = table[table["task"].isin(tasks) & is_whole_score(table)]
    rows = []
    for key, group in chosen.groupby(list(by), dropna=False):
        if group["task"].duplicated().any():
            name = group["task"][group["task"].duplicated()].iloc[0]
            raise UserError(f"{name} has several rows in one average; choose one metric a task first")
        known = measured(group).set_index("task")
        present = [task for task in tasks if task in known.index]
        errors = known["stderr"].to_numpy()
        rows.append(
            {
                **dict(zip(by, key, strict=True)),
                "value": weighted_mean(known["value"]),
                "stderr": float(np.sqrt((errors**2).sum()) / len(known)) if len(known) else np.nan,
                "n_tasks": len(present),
                "tasks": ",".join(present),
                "missing": ",".join(task for task in tasks if task not in present),
            }
        )
    return pd.DataFrame(rows, columns=[*by, "value", "stderr", "n_tasks", "tasks", "missing"])


def writable_directory(name: str, path: str) -> Path:
    """The directory at ``path``, made if absent, after a file has been written in it and removed.

    Raises:
        UserError: it cannot be written.
    """
    directory = Path(path)
    with writing(f"{name}={path}", directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    return directory


def read_typed(path: Path, columns: Mapping[str, str], absent: Collection[str] = ()) -> pd.DataFrame:
    """The table at ``path`` with these columns alone; those of ``absent`` may be missing and are null then."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({in_one_line(error)}); copy it again, or evaluate again") from error
    missing = [name for name in columns if name not in table.columns and name not in absent]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; write it again with this version of ropewalk")
    try:
        return table.reindex(columns=list(columns)).astype(dict(columns))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a column of another type ({in_one_line(error)}); evaluate again") from error
