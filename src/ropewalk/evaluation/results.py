"""The tidy results table and what is written beside it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation.bootstrap import RESAMPLES, paired_ratio_difference
from ropewalk.files import replace_atomically, write_atomically

COLUMNS = {
    "run": "str",
    "method": "str",  # rope name
    "chain": "str",  # printed chain, test-time part included
    "test_time": "str",  # name of the test_time group
    "harness": "str",
    "harness_version": "str",
    "task": "str",
    "category": "str",
    "context_length": "Int64",  # tokens
    "position_start": "Int64",  # first position of the bucket; null where the task has none
    "position_end": "Int64",  # one past the last
    "depth": "float64",  # share of the context before the needle; NaN where the task has none
    "metric": "str",
    "value": "float64",
    "ci_low": "float64",  # 95% interval
    "ci_high": "float64",
    "stderr": "float64",
    "n": "int64",  # documents or prompts
    "source": "str",  # file the row was made from
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
BUCKET = ["position_start", "position_end"]
RESULTS_CSV = "results.csv"
RESULTS = "results.parquet"
DOCUMENTS = "documents.parquet"
RECORD = "evaluation.json"


def results_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the results table: its columns in their order and dtypes, absent ones null.

    Raises:
        UserError: for a column that the table does not have.
    """
    return _table(rows, COLUMNS)


def document_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the table of per-document sums.

    Raises:
        UserError: for a column that the table does not have.
    """
    return _table(rows, DOCUMENT_COLUMNS)


def write_evaluation(output: Path, results: pd.DataFrame, documents: pd.DataFrame, record: Mapping[str, Any]) -> None:
    """Write results.csv, results.parquet, documents.parquet and, last, evaluation.json into ``output``.

    Each file is written beside and renamed. An earlier evaluation.json goes first, so that where one stands,
    the tables beside it are its own.
    """
    (output / RECORD).unlink(missing_ok=True)
    replace_atomically(output / RESULTS_CSV, lambda path: results.to_csv(path, index=False))
    replace_atomically(output / RESULTS, lambda path: results.to_parquet(path, index=False))
    replace_atomically(output / DOCUMENTS, lambda path: documents.to_parquet(path, index=False))
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_atomically(output / RECORD, text)


def read_results(directory: str | Path) -> pd.DataFrame:
    """The results table of a finished evaluation, columns and dtypes as in ``COLUMNS``.

    Raises:
        UserError: where ``directory`` holds no finished evaluation.
    """
    return pd.read_parquet(_finished(directory) / RESULTS).astype(COLUMNS)[list(COLUMNS)]


def read_document_losses(directory: str | Path) -> pd.DataFrame:
    """The per-document sums of a finished evaluation, columns and dtypes as in ``DOCUMENT_COLUMNS``.

    Raises:
        UserError: where ``directory`` holds no finished evaluation.
    """
    return pd.read_parquet(_finished(directory) / DOCUMENTS).astype(DOCUMENT_COLUMNS)[list(DOCUMENT_COLUMNS)]


def read_record(directory: str | Path) -> dict[str, Any]:
    """evaluation.json of a finished evaluation.

    Raises:
        UserError: where ``directory`` holds no finished evaluation.
    """
    return json.loads((_finished(directory) / RECORD).read_text(encoding="utf-8"))


def paired_difference(
    documents_a: pd.DataFrame, documents_b: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Mean NLL of a minus that of b in each bucket that both have, paired document by document.

    Documents differ far more from one another than methods do on one document; pairing takes that out.
    Losses per token compare only between runs with one tokenizer.

    Args:
        documents_a: per-document sums of one run under one setting: document, position_start, position_end,
            nll_sum and tokens at least.
        documents_b: those of the other.
        seed: of the bootstrap over documents.
        resamples: number of resamples.

    Returns:
        position_start, position_end, value, ci_low, ci_high (nats per token), n (documents that both scored).
        Negative where a predicts better; the interval is NaN with one document; no rows where none is shared.

    Raises:
        UserError: where a document has two rows for one bucket, so that settings or runs are mixed.
    """
    both = documents_a.merge(documents_b, on=["document", *BUCKET], suffixes=("_a", "_b")).sort_values("document")
    if both.duplicated(["document", *BUCKET]).any():
        raise UserError(
            "a document has several rows for one bucket; select one run, setting and context_length of "
            f"{DOCUMENTS} before comparing"
        )
    rows = []
    for (start, end), bucket in both.groupby(BUCKET):
        a, b = ((bucket[f"nll_sum_{side}"], bucket[f"tokens_{side}"]) for side in "ab")
        estimate = paired_ratio_difference(a, b, seed, resamples)
        rows.append((start, end, estimate.value, estimate.ci_low, estimate.ci_high, estimate.n))
    return pd.DataFrame(rows, columns=[*BUCKET, "value", "ci_low", "ci_high", "n"])


def writable_directory(name: str, path: str) -> Path:
    """The directory at ``path``, made if absent, after a file has been written in it and removed.

    Raises:
        UserError: where that fails.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"{name}={path} cannot be written ({error.strerror}); name a writable directory") from error
    return directory


def _table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows))
    unknown = [name for name in table.columns if name not in columns]
    if unknown:
        raise UserError(f"columns {', '.join(unknown)} are not of the table; it has: {', '.join(columns)}")
    return table.reindex(columns=list(columns)).astype(dict(columns))


def _finished(directory: str | Path) -> Path:
    path = Path(directory)
    if not (path / RECORD).is_file():
        raise UserError(
            f"{path} holds no finished evaluation (no {RECORD}); run scripts/evaluate.py with output={path}"
        )
    return path
