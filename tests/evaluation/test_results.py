from __future__ import annotations

import math

import pandas as pd
import pytest

from ropewalk.evaluation import paired_difference, read_document_losses, read_record, read_results
from ropewalk.evaluation.results import (
    COLUMNS,
    document_table,
    results_table,
    writable_directory,
    write_evaluation,
)

ROWS = [
    {"run": "a", "task": "loss_by_position", "metric": "nll", "context_length": 512, "position_start": 0}
    | {"position_end": 64, "value": 2.5, "ci_low": 2.0, "ci_high": 3.0, "stderr": 0.2, "n": 4},
    {"run": "a", "task": "needle", "metric": "exact_match", "context_length": 512, "depth": 0.5}
    | {"value": 1.0, "n": 8},
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
    write_evaluation(tmp_path, results, documents, {"run": "a"})
    back = read_results(tmp_path)
    assert list(back.columns) == list(COLUMNS)
    pd.testing.assert_frame_equal(back, results)
    pd.testing.assert_frame_equal(read_document_losses(tmp_path), documents)
    assert read_record(tmp_path) == {"run": "a"}
    assert str(back["context_length"].dtype) == "Int64"
    assert back["position_start"].tolist() == [0, pd.NA]
    assert math.isnan(back["depth"][0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "documents.parquet",
        "evaluation.json",
        "results.csv",
        "results.parquet",
    ]
    assert (tmp_path / "results.csv").read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_column_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="columns mood are not of the table"):
        results_table([{"run": "a", "mood": "good"}])


def test_an_interrupted_write_leaves_no_finished_evaluation(tmp_path) -> None:
    write_evaluation(tmp_path, results_table(ROWS), sums(), {"run": "old"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_evaluation(tmp_path, results_table(ROWS), sums(), {"value": math.nan})
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        read_results(tmp_path)


def test_an_output_that_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output=.*file/below cannot be written \(Not a directory\)"):
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
