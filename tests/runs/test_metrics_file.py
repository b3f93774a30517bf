"""Rows of metrics: what a crash or a full disk leaves, and what a resumed session drops."""

import resource

import pytest

from ropewalk.errors import UserError
from ropewalk.runs.metrics_file import MetricsFile, read_metrics, read_rows


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", [b'{"step": 3', b'{"step": 3}', b"\xff\x00"])
def test_a_last_line_without_its_end_is_left_out(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", [b"\xff\xfe\xff", b"[1]", b"3", b'{"loss": 1}', b'{"step": "2"}', b"[" * 100_000])
def test_a_line_that_is_not_a_row_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match="line 2 is not what was written"):
        read_metrics(tmp_path)


def test_a_resumed_session_drops_the_rows_past_its_checkpoint(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    MetricsFile(path, 2, print).append({"step": 3, "loss": None})
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


def test_metrics_that_could_not_be_written_are_written_later(tmp_path):
    warnings = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, warnings.append)
    metrics.append({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    metrics.append({"step": 2})
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert len(warnings) == 1
    assert "its rows are kept for later" in warnings[0]
    metrics.append({"step": 3})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_row_that_is_not_what_was_written_is_named(tmp_path):
    """A node that dies may leave zeros in a file."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\0\0\0\n{"step": 3}\n{"st')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not what was written .*; remove it"):
        MetricsFile(tmp_path / "metrics.jsonl", 3, print)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n{"st')
    MetricsFile(tmp_path / "metrics.jsonl", 3, print).append({"step": 4})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
