"""Evaluations logged into the runs of a tracker, read back by another program."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report.fake_runs import FakeRun, benchmark_row, write_fake_evaluation, write_run, write_table

from ropewalk.config.evaluation import CompareConfig
from ropewalk.evaluation.results import read_document_losses, read_results, write_results
from ropewalk.report import tracked
from ropewalk.report.runs import load_run, load_runs, once
from ropewalk.report.tracked import track


def made(root: Path, name: str, tracker: str, **fake: Any) -> Path:
    config = {"tracker": f"{{name: {tracker}, project: p, group: arm}}"}
    directory = write_run(root / name, FakeRun(name, config=config, **fake))
    rows = [benchmark_row(name, "ruler", task, 4096, value) for task, value in (("vt", 80), ("cwe", 60))]
    write_table(directory / "evaluation", [*rows, benchmark_row(name, "lm-eval", "mmlu", None, 61, metric="acc")])
    return directory


def test_rows_are_the_reports_numbers(tmp_path: Path) -> None:
    baseline = load_run(made(tmp_path, "a", "none"))
    run = load_run(made(tmp_path, "b", "none", offset=0.1, exact=lambda length, depth: depth))
    rows = tracked.history_of(run, baseline)
    over_position = [row for row in rows if tracked.POSITION in row]
    assert {"eval/loss/trained", "eval/loss/yarn"} < {name for row in over_position for name in row}
    assert all(row["eval/difference/yarn"] == pytest.approx(0.1) for row in over_position if "eval/loss/yarn" in row)
    assert [row[tracked.POSITION] for row in over_position if "eval/loss/trained" in row][:2] == [32, 96]
    at = {row[tracked.LENGTH]: row for row in rows if tracked.LENGTH in row}
    assert sorted(at) == [512, 1024, 2048, 4096, 8192]
    assert at[512]["eval/needle/exact_match"] == 50  # depths 0, 1/4, 1/2, 3/4, 1
    assert at[4096]["eval/ruler/average"] == 70
    assert at[4096]["eval/ruler/vt"] == 80
    assert "eval/ruler/average" not in at[512]
    assert tracked.summary_of(run) == {"eval/short/mmlu/acc": 61}


def test_a_second_test_time_setting_is_a_level_of_its_own(tmp_path: Path) -> None:
    """Past the trained 2,048 tokens both settings have numbers, and neither hides the other's."""
    plain = FakeRun("b", exact=lambda length, depth: 0.25)
    directory = write_run(tmp_path / "b", replace(plain, exact=lambda length, depth: 0.75))
    write_fake_evaluation(directory / "evaluation_none", replace(plain, offset=0.5), "none")
    table = read_results(directory / "evaluation_none")
    past = table["context_length"] > 2048  # the numbers up to there would be two of one kind
    write_results(directory / "evaluation_none", table[past], read_document_losses(directory / "evaluation_none"))
    (run,) = once(load_runs([str(directory)]))
    at = {row[tracked.LENGTH]: row for row in tracked.history_of(run, run) if tracked.LENGTH in row}
    assert (at[8192]["eval/needle/exact_match"], at[8192]["eval/needle/none/exact_match"]) == (75, 25)
    assert at[8192]["eval/loss_at_length/none"] == pytest.approx(at[8192]["eval/loss_at_length"] + 0.5)


def test_runs_without_a_tracker_or_an_evaluation_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, bare = made(tmp_path, "plain", "none"), made(tmp_path, "bare", "trackio")
    shutil.rmtree(bare / "evaluation")
    missing = made(tmp_path, "missing", "wandb")
    assert track(CompareConfig(runs=[str(plain), str(bare), str(missing)])) == []
    said = capsys.readouterr().out
    assert "plain: not logged, as it was trained without a tracker" in said
    assert "bare: not logged, as it has no finished evaluation" in said
    assert "missing: not logged, as it has no tracker.json with the id of its W&B run" in said


@pytest.mark.slow
def test_an_offline_wandb_run_goes_on_and_wandbs_own_reader_finds_it(tmp_path: Path) -> None:
    directory = made(tmp_path, "run", "wandb")
    (directory / "tracker.json").write_text('{"wandb_id": "abc12345"}\n')
    config = CompareConfig(runs=[str(directory)])
    assert track(config) == ["run"]
    assert track(config) == []  # the same numbers are logged once
    (written,) = (directory / "wandb").glob("offline-run-*-abc12345/*.wandb")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(written)],
        capture_output=True,
        text=True,
        check=True,
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    run = next(record["run"] for record in records if "run" in record)
    assert (run["run_id"], run["project"], run["run_group"]) == ("abc12345", "p", "arm")
    globs = [record["metric"] for record in records if "glob_name" in record.get("metric", {})]
    defined = {metric["glob_name"]: metric["step_metric"] for metric in globs}
    history = [record["history"]["item"] for record in records if "history" in record]
    again = load_run(directory)
    expected = tracked.history_of(again, again)
    assert [{k: v for k, v in row.items() if k.startswith("eval/")} for row in history[: len(expected)]] == expected
    assert [row["_step"] for row in history] == list(range(len(expected) + 1))  # W&B's own count: nothing is dropped
    shown = history[len(expected)]
    assert shown["eval/short/mmlu/acc"] == 61
    files = written.parent / "files"
    table = json.loads((files / shown["tables/scores.path"]).read_text())
    assert [row[table["columns"].index("value")] for row in table["data"]] == [80, 60, 61]
    assert len(json.loads((files / shown["tables/results.path"]).read_text())["data"]) == len(again.results)
    for name in ("figures/loss_by_position", "figures/needle_in_a_haystack", "figures/what_the_spectra_do_3"):
        assert (files / shown[f"{name}.path"]).read_bytes().startswith(b"\x89PNG")
    assert defined["eval/loss/*"] == tracked.POSITION
    assert defined["eval/loss_at_length/*"] == tracked.LENGTH
    assert defined["eval/ruler/*"] == tracked.LENGTH
