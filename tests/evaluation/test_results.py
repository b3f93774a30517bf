"""The results table: what is written is read back, mixed numbers are refused, runs are paired by document."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from ropewalk.errors import UserError
from ropewalk.evaluation import averages, paired_difference, read_document_losses, read_record, read_results
from ropewalk.evaluation.results import (
    NEEDS_JUDGE,
    RESULT_COLUMNS,
    as_shares,
    document_table,
    read_evaluations,
    results_table,
    writable_directory,
    write_record,
    write_results,
)

SCORE = {
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
    return {**SCORE, **changes}


ROWS = [
    {"run": "a", "task": "loss_by_position", "metric": "nll", "context_length": 512, "position_start": 0}
    | {"position_end": 64, "value": 2.5, "ci_low": 2.0, "ci_high": 3.0, "stderr": 0.2, "n": 4},
    {"run": "a", "task": "needle", "metric": "exact_match", "context_length": 512, "depth": 0.5}
    | {"value": 100.0, "n": 8},
]


def sums(offset: float = 0.0, documents: str = "xyz", tokens: int = 64) -> pd.DataFrame:
    """Loss 2 + place of the document + offset in [0, 64), and 1 less in [64, 128)."""
    return document_table(
        {"run": "a", "setting": "none", "context_length": 128, "document": name, "position_start": start}
        | {
            "position_end": start + 64,
            "nll_sum": tokens * (2 + place + offset - start / 64),
            "tokens": tokens,
        }
        for place, name in enumerate(documents)
        for start in (0, 64)
    )


def test_tables_come_back_as_they_were(tmp_path) -> None:
    results, documents = results_table(ROWS), sums()
    write_results(tmp_path, results, documents)
    write_record(tmp_path, {"run": "a"})
    back = read_results(tmp_path)
    assert list(back.columns) == list(RESULT_COLUMNS)
    pd.testing.assert_frame_equal(back, results)
    pd.testing.assert_frame_equal(read_document_losses(tmp_path), documents)
    assert read_record(tmp_path) == {"run": "a"}
    assert str(back["context_length"].dtype) == "Int64"
    assert back["position_start"].tolist() == [0, pd.NA]
    assert math.isnan(back["depth"][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "documents.parquet",
        "evaluation.json",
        "table.csv",
        "table.parquet",
    ]
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == ",".join(RESULT_COLUMNS)


def test_a_column_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="columns mood are not of the table"):
        results_table([{"run": "a", "mood": "good"}])


def test_losses_without_their_record_are_unfinished(tmp_path) -> None:
    own = [row | {"harness": "ropewalk", "harness_version": "1"} for row in ROWS]
    (tmp_path / "evaluation").mkdir()
    write_results(tmp_path / "evaluation", results_table([*own, SCORE]), sums())
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path / "evaluation", {"value": math.nan})
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        read_record(tmp_path / "evaluation")
    unfinished = read_evaluations(tmp_path)
    assert (unfinished.results["harness"].tolist(), len(unfinished.documents)) == (["ruler"], 0)
    write_record(tmp_path / "evaluation", {"run": "a"})
    finished = read_evaluations(tmp_path)
    assert (len(finished.results), len(finished.documents), finished.record) == (3, 6, {"run": "a"})


def test_evaluations_inside_training_are_not_those_of_the_run(tmp_path) -> None:
    for name in ("evaluation", "evaluation_long/ruler", "evaluations/step-00000004"):
        (tmp_path / name).mkdir(parents=True)
        write_results(tmp_path / name, results_table([row(task=name)]))
    assert read_evaluations(tmp_path).results["task"].tolist() == ["evaluation", "evaluation_long/ruler"]
    assert read_evaluations(tmp_path / "evaluations" / "step-00000004").results["task"].tolist() == [
        "evaluations/step-00000004"
    ]


def test_a_number_that_two_evaluations_hold_is_one_or_refused(tmp_path) -> None:
    for name, setting in (("evaluation", "auto"), ("evaluation_b", "none")):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, results_table([row(test_time=setting)]))
    (kept,) = read_evaluations(tmp_path).results.to_dict("records")
    assert (kept["value"], kept["test_time"]) == (row()["value"], "auto,none")
    write_results(tmp_path / "evaluation_b", results_table([row(value=row()["value"] + 0.1)]))
    message = r"evaluation and .*evaluation_b both hold ruler's vt \(string_match_all\) at 8,192 tokens, under none: .*"
    with pytest.raises(ValueError, match=message + "move one"):
        read_evaluations(tmp_path)


def test_a_table_of_other_columns_is_named(tmp_path) -> None:
    pd.DataFrame({"run": ["a"]}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet lacks the columns method, chain, .*; write it again with"):
        read_results(tmp_path)


def test_a_damaged_table_is_named(tmp_path) -> None:
    (tmp_path / "table.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"table\.parquet cannot be read .*; copy it again, or evaluate again"):
        read_results(tmp_path)
    write_results(tmp_path, results_table(ROWS))
    table = pd.read_parquet(tmp_path / "table.parquet")
    table.assign(value="much").to_parquet(tmp_path / "table.parquet")
    with pytest.raises(UserError, match=r"table\.parquet has a column of another type .*'much'"):
        read_results(tmp_path)


def test_an_evaluation_of_an_earlier_ropewalk_is_refused_by_name(tmp_path) -> None:
    """It had losses and needles in results.parquet, beside a table.parquet or without one."""
    directory = tmp_path / "evaluation"
    directory.mkdir()
    write_results(directory, results_table(ROWS))
    (directory / "results.parquet").write_bytes(b"")
    message = r"evaluation/results\.parquet holds losses .*; move .*evaluation away, and run"
    for read in (lambda: read_results(directory), lambda: read_evaluations(tmp_path)):
        with pytest.raises(UserError, match=message):
            read()
    (directory / "table.parquet").unlink()
    with pytest.raises(UserError, match=message):
        read_evaluations(tmp_path)


def test_scores_of_an_earlier_ropewalk_are_read(tmp_path) -> None:
    """Its table had neither positions nor intervals."""
    table = results_table([row(), row(task="cwe")])
    earlier = table.drop(columns=["position_start", "position_end", "ci_low", "ci_high"])
    earlier.to_parquet(tmp_path / "table.parquet", index=False)
    pd.testing.assert_frame_equal(read_results(tmp_path), table)


def test_shares_are_hundredths_of_percent_and_losses_stay() -> None:
    shares = as_shares(results_table(ROWS))
    assert shares["value"].tolist() == [2.5, 1.0]
    assert shares["ci_low"].tolist()[0] == 2.0


def test_an_output_that_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output=.*file/below cannot be written \(Not a directory: .*below"):
        writable_directory("output", str(tmp_path / "file" / "below"))


def test_paired_difference_by_bucket() -> None:
    found = paired_difference(sums(offset=-0.25), sums())
    assert found[["position_start", "position_end", "n"]].to_numpy().tolist() == [[0, 64, 3], [64, 128, 3]]
    # Documents differ by whole nats, the runs by 0.25 on each: pairing leaves no spread.
    for column in ("value", "ci_low", "ci_high"):
        assert found[column].tolist() == pytest.approx([-0.25, -0.25])


def test_paired_difference_is_over_shared_documents() -> None:
    a, b = sums(offset=1.0, documents="xyz"), sums(documents="xy")
    assert paired_difference(a, b)["n"].tolist() == [2, 2]
    assert paired_difference(a, b)["value"].tolist() == pytest.approx([1.0, 1.0])
    assert paired_difference(sums(documents="x"), sums(documents="q")).empty


def test_paired_difference_has_the_spread_of_the_differences() -> None:
    a = sums()
    a.loc[a["document"] == "y", "nll_sum"] += 64 * 3.0
    found = paired_difference(a, sums(), seed=0, resamples=20_000).iloc[0]
    assert found["value"] == pytest.approx(1.0)
    # k of 3 draws are document y: the resampled value is k, and P(0) = 8/27, P(3) = 1/27.
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.0, 3.0))


def test_mixed_passes_are_refused() -> None:
    twice = pd.concat([sums(), sums()])
    with pytest.raises(ValueError, match="several rows for one bucket"):
        paired_difference(twice, sums())


def test_the_columns_are_those_that_other_tools_rely_on() -> None:
    first = ["run", "method", "chain", "test_time_scaling", "harness", "harness_version", "task", "category"]
    second = ["context_length", "position_start", "position_end", "depth", "metric", "value", "ci_low", "ci_high"]
    assert list(RESULT_COLUMNS) == [*first, *second, "stderr", "n", "source_file", "test_time", "frames"]


def test_parquet_and_csv_hold_the_same_numbers(tmp_path) -> None:
    table = results_table([row(), row(task="mmlu", context_length=None), row(task="n", depth=0.25)])
    write_results(tmp_path, table)
    pd.testing.assert_frame_equal(read_results(tmp_path), table)
    csv = pd.read_csv(tmp_path / "table.csv", dtype={"harness_version": str}).fillna({"test_time": ""})
    csv = csv.astype(RESULT_COLUMNS)
    pd.testing.assert_frame_equal(csv, table)
    assert table["context_length"].isna().tolist() == [False, True, False]


def test_a_number_that_could_not_be_had_is_null_and_no_zero(tmp_path) -> None:
    table = results_table([row(task="summ", metric=NEEDS_JUDGE, value=None, n=None, stderr=None)])
    write_results(tmp_path, table)
    assert math.isnan(read_results(tmp_path)["value"][0])
    assert read_results(tmp_path)["n"][0] == 0


def test_an_average_names_its_tasks_and_what_it_lacks() -> None:
    table = results_table(
        [
            row(task="vt", value=60.0, stderr=3.0),
            row(task="cwe", value=80.0, stderr=4.0),
            row(task="vt", value=10.0, context_length=16384),
            row(task="cwe", value=None, stderr=None, metric=NEEDS_JUDGE, context_length=16384),
            row(task="other", value=0.0),
            row(task="vt", value=1.0, metric="unparsed"),
            row(task="vt", value=2.0, position_start=4096, position_end=8192),  # of prompts of these lengths alone
        ]
    )
    found = averages(table, ["vt", "cwe", "fwe"]).set_index("context_length")
    assert found.loc[8192, "value"] == 70.0
    assert found.loc[8192, "stderr"] == pytest.approx(2.5)  # sqrt(3^2 + 4^2) / 2
    assert found.loc[8192, ["tasks", "missing"]].tolist() == ["vt,cwe", "fwe"]
    assert found.loc[16384, "value"] == 10.0
    assert found.loc[16384, ["tasks", "missing"]].tolist() == ["vt", "cwe,fwe"]


def test_an_average_over_two_metrics_of_a_task_is_refused() -> None:
    table = results_table([row(metric="acc"), row(metric="acc_norm")])
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
        results_table([row(), row(**changes)])


def test_the_same_task_under_two_scalings_is_two_rows() -> None:
    assert len(results_table([row(), row(test_time_scaling="yarn(factor=4)", chain="x")])) == 2


def test_a_directory_without_a_table_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds no table.parquet; run scripts/evaluate.py"):
        read_results(tmp_path)
