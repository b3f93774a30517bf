from __future__ import annotations

import math

import pandas as pd
import pytest

from ropewalk.evaluation.table import (
    NEEDS_JUDGE,
    TABLE_COLUMNS,
    averages,
    read_table,
    tidy_table,
    write_table,
)

ROW = {
    "run": "a",
    "method": "cope20",
    "chain": "abf(theta=1e7) > cope(clip=20)",
    "test_time_scaling": "none",
    "harness": "ruler",
    "harness_version": "0.4.13",
    "task": "vt",
    "category": "aggregation",
    "context_length": 8192,
    "metric": "string_match_all",
    "value": 60.0,
    "n": 100,
    "stderr": 3.0,
    "source_file": "cells/ruler/vt/8192.json",
}


def row(**changes) -> dict:
    return {**ROW, **changes}


def test_the_columns_are_those_that_other_tools_rely_on() -> None:
    first = ["run", "method", "chain", "test_time_scaling", "harness", "harness_version", "task", "category"]
    second = ["context_length", "depth", "metric", "value", "n", "stderr", "source_file"]
    assert list(TABLE_COLUMNS) == first + second


def test_parquet_and_csv_hold_the_same_numbers(tmp_path) -> None:
    table = tidy_table([row(), row(task="mmlu", context_length=None), row(task="n", depth=0.25)])
    write_table(tmp_path, table)
    pd.testing.assert_frame_equal(read_table(tmp_path), table)
    csv = pd.read_csv(tmp_path / "table.csv", dtype={"harness_version": str}).astype(TABLE_COLUMNS)
    pd.testing.assert_frame_equal(csv, table)
    assert table["context_length"].isna().tolist() == [False, True, False]


def test_a_number_that_could_not_be_had_is_null_and_no_zero(tmp_path) -> None:
    table = tidy_table([row(task="summ", metric=NEEDS_JUDGE, value=None, n=None, stderr=None)])
    write_table(tmp_path, table)
    assert math.isnan(read_table(tmp_path)["value"][0])
    assert read_table(tmp_path)["n"][0] == 0


def test_an_average_names_its_tasks_and_what_it_lacks() -> None:
    table = tidy_table(
        [
            row(task="vt", value=60.0, stderr=3.0),
            row(task="cwe", value=80.0, stderr=4.0),
            row(task="vt", value=10.0, context_length=16384),
            row(task="cwe", value=None, stderr=None, metric=NEEDS_JUDGE, context_length=16384),
            row(task="other", value=0.0),
        ]
    )
    found = averages(table, ["vt", "cwe", "fwe"]).set_index("context_length")
    assert found.loc[8192, "value"] == 70.0
    assert found.loc[8192, "stderr"] == pytest.approx(2.5)  # sqrt(3^2 + 4^2) / 2
    assert found.loc[8192, ["tasks", "missing"]].tolist() == ["vt,cwe", "fwe"]
    assert found.loc[16384, "value"] == 10.0
    assert found.loc[16384, ["tasks", "missing"]].tolist() == ["vt", "cwe,fwe"]


def test_an_average_over_two_metrics_of_a_task_is_refused() -> None:
    table = tidy_table([row(metric="acc"), row(metric="acc_norm")])
    with pytest.raises(ValueError, match="vt has several rows in one average"):
        averages(table, ["vt"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "cwe", "harness_version": "0.4.12"}, r"run a has numbers of ruler 0.4.12 and 0.4.13"),
        ({"value": 61.0}, r"run a has ruler's vt \(string_match_all\) at 8192 twice"),
        ({"task": "cwe", "note": "x"}, "columns note are not of the table"),
    ],
)
def test_mixed_results_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tidy_table([row(), row(**changes)])


def test_the_same_task_under_two_scalings_is_two_rows() -> None:
    assert len(tidy_table([row(), row(test_time_scaling="yarn(factor=4)", chain="x")])) == 2


def test_a_directory_without_a_table_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds no table.parquet; run scripts/evaluate.py"):
        read_table(tmp_path)
