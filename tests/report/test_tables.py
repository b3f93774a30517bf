"""Numbers of the results table, against values worked out by hand from the fake runs' formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report.fake_runs import DOCUMENTS, FakeRun, write_run, write_table

from ropewalk.figures.evaluation_curves import OWN
from ropewalk.figures.needle_grid import EXACT_MATCH
from ropewalk.report.differences import Unpaired, at_length, by_position, passes
from ropewalk.report.overview import opening_section, runs_section
from ropewalk.report.results_section import Pooled, is_at_chance, pooled, results_section
from ropewalk.report.runs import Run, flatten, load_run
from ropewalk.report.section import Section


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    fakes = [
        FakeRun("base", chain="rope", trained_length=512, offset=0.2),
        FakeRun("rope", exact=lambda length, depth: 1.0 if length <= 2048 else 0.25),
        FakeRun("cope", chain="abf(theta=1e5) > cope(clip=11)", offset=0.1, beyond=-0.3, jitter=0.4),
    ]
    return {fake.name: load_run(write_run(root / fake.name, fake)) for fake in fakes}


def cells(table: Section, title: str) -> dict[str, list[tuple[str, str]]]:
    block = next(block for block in table.blocks if block.title.startswith(title))
    return {name: [(cell.main, cell.detail) for cell in row] for name, row in block.rows}


def loss_at(position: float) -> float:
    return 2 + 4 / math.log2(position + 8)


def test_losses_are_those_of_the_results_in_order_of_loss(runs: dict[str, Run]) -> None:
    table = results_section(list(runs.values()), runs["rope"])
    losses = cells(table, "Loss")
    assert list(losses) == ["cope", "rope", "base"]  # at 8,192: 0.1 - 0.3, 0, 0.2 above the common curve
    middles = [384, 768, 1536, 3072, 6144]
    assert [main for main, _ in losses["rope"]] == [f"{loss_at(middle):.3f}" for middle in middles]
    assert losses["rope"][0] == ("2.464", "[2.414, 2.514]")


def test_cells_beyond_the_trained_length_are_marked(runs: dict[str, Run]) -> None:
    table = results_section(list(runs.values()), runs["rope"])
    marks = {name: [cell.beyond for cell in row] for name, row in table.blocks[0].rows}
    assert marks["base"] == [False, True, True, True, True]
    assert marks["rope"] == [False, False, False, True, True]


def test_constant_difference_has_no_width(runs: dict[str, Run]) -> None:
    # Every document is 0.2 worse, so each resample gives 0.2, under unlike settings as well.
    for length in (512, 2048, 8192):
        found = at_length(runs["base"], runs["rope"], length)
        assert not isinstance(found, Unpaired)
        assert found[["value", "ci_low", "ci_high"]].tolist() == pytest.approx([0.2, 0.2, 0.2], abs=1e-9)
        assert found["n"] == DOCUMENTS


def test_alternating_difference_has_the_normal_interval(runs: dict[str, Run]) -> None:
    # 16 documents at 0.1 +- 0.4: a standard error of 0.4 / sqrt(16) = 0.1, a 95% interval of 1.96 of them.
    found = at_length(runs["cope"], runs["rope"], 512)
    assert not isinstance(found, Unpaired)
    assert found["value"] == pytest.approx(0.1, abs=1e-9)
    assert found["ci_low"] == pytest.approx(0.1 - 1.96 * 0.1, abs=0.03)
    assert found["ci_high"] == pytest.approx(0.1 + 1.96 * 0.1, abs=0.03)


def test_difference_without_documents_says_why(runs: dict[str, Run], tmp_path: Path) -> None:
    directory = write_run(tmp_path / "bare", FakeRun("bare"))
    (directory / "evaluation" / "documents.parquet").unlink()
    found = at_length(load_run(directory), runs["rope"], 512)
    assert found == Unpaired("bare has no per-document losses at those positions")


def test_passes_pair_by_the_kind_of_their_setting(runs: dict[str, Run]) -> None:
    kinds = {name: [(one.length, one.kind) for one in passes(run)] for name, run in runs.items()}
    assert kinds == {
        "base": [(512, OWN), (8192, "yarn")],
        "rope": [(2048, OWN), (8192, "yarn")],
        "cope": [(2048, OWN), (8192, "yarn")],
    }
    found = by_position(runs["base"], passes(runs["base"])[0], runs["rope"], passes(runs["rope"])[0])
    assert isinstance(found, pd.DataFrame)
    assert found["position_end"].tolist() == [64, 128, 256, 512]  # what both passes cover
    np.testing.assert_allclose(found["value"], 0.2, atol=1e-9)


def test_method_put_on_without_training_is_the_runs_own_setting(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", FakeRun("a")))
    renamed = {
        "none": "cope(clip=10)",
        "yarn(factor=4, original_max_position_embeddings=2048)": "cope(clip=10) > yarn(factor=4)",
    }
    run.evaluation["settings"] = [one | {"setting": renamed[one["setting"]]} for one in run.evaluation["settings"]]
    assert [one.kind for one in passes(run)] == [OWN, "yarn"]


def test_needle_accuracies_by_hand(runs: dict[str, Run]) -> None:
    table = results_section(list(runs.values()), runs["rope"])
    exact = cells(table, "Needle: exact match")
    assert exact["rope"] == [("1.00", "(0.00)")] * 3 + [("0.25", "(0.00)")] * 2
    accuracy = cells(table, "Needle: answer-token accuracy")
    assert accuracy["rope"][3] == ("0.33", "(0.10)")  # 0.1 + 0.9 / 4 = 0.325
    assert list(exact) == ["rope"]  # the others find nothing: their rows of 0.00 are folded away
    folded = {block.title: [name for name, _ in block.rows] for block in table.folded}
    assert folded["Needle: exact match, beside shuffled answers"] == ["cope", "base"]
    assert "Exact match in the needle grid is at chance: cope, base." in table.missing
    whole = pooled(runs["rope"], EXACT_MATCH)
    assert whole == Pooled(pytest.approx((3 * 1.0 + 2 * 0.25) / 5), 0.0, 100)


@pytest.mark.parametrize(
    ("value", "control", "n", "at_chance"),
    [
        (0.0, 0.0, 100, True),
        (0.01, 0.0, 100, True),  # one hit: 2 x sqrt(0.01 x 0.99 / 100) = 0.0199
        (0.05, 0.0, 100, False),  # 2 x sqrt(0.05 x 0.95 / 100) = 0.0436
        (0.30, 0.20, 100, True),  # 2 x sqrt((0.21 + 0.16) / 100) = 0.1217
        (0.33, 0.20, 100, False),  # 2 x sqrt((0.2211 + 0.16) / 100) = 0.1235
        (0.05, math.nan, 100, False),
    ],
)
def test_chance_is_two_standard_errors_from_the_control(value: float, control: float, n: int, at_chance: bool) -> None:
    assert Pooled(value, control, n).at_chance is at_chance


def test_runs_are_at_chance_or_not(runs: dict[str, Run]) -> None:
    assert is_at_chance(runs["base"]) is True
    assert is_at_chance(runs["rope"]) is False


def test_steps_logged_again_after_a_resume_count_once(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", FakeRun("run", steps=4))
    again = '{"step": 3, "tokens": 24576, "loss": 9.5, "tokens_per_second": 1.0}\n'
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(again + '{"step": 5, "tok')  # and a row that is still being written
    metrics = load_run(directory).metrics
    assert metrics["step"].tolist() == [1, 2, 3, 4]
    assert metrics["loss"].iloc[2] == 9.5


def test_commit_keeps_its_mark_of_uncommitted_changes(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", FakeRun("run")))
    run.record["git_commit"] += "+changes"
    rows = {name: cells[0].main for name, cells in runs_section([run], run).blocks[0].rows}
    assert rows["git commit"] == "0123456789ab+changes"
    assert rows["throughput"] == "5.02k tokens/s (median step)"  # 5,001 to 5,044


def test_flatten_gives_dotted_keys_and_keeps_lists() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [1, 2], "e": {}}


def test_other_text_under_the_same_names_is_not_paired(tmp_path):
    runs = []
    for name, prefix in (("a", "0" * 64), ("b", "1" * 64)):
        directory = write_run(tmp_path / name, FakeRun(name))
        record = directory / "evaluation" / "evaluation.json"
        content = json.loads(record.read_text())
        record.write_text(json.dumps({**content, "document_prefixes": {"doc": prefix}}))
        runs.append(load_run(directory))
    found = at_length(runs[1], runs[0], 2048)
    assert isinstance(found, Unpaired)
    assert "read other text, or other tokens" in found.reason


def test_runs_whose_documents_begin_otherwise_are_told_apart(tmp_path):
    """By the evaluation, else by the run's own record; nothing is said where neither knows."""
    runs = []
    for name, bos in (("a", True), ("b", False), ("c", None), ("d", True)):
        directory = write_run(tmp_path / name, FakeRun(name))
        evaluation, record = directory / "evaluation" / "evaluation.json", directory / "run.json"
        if name == "d":
            record.write_text(json.dumps({**json.loads(record.read_text()), "special_tokens": {"bos": bos}}))
        elif bos is not None:
            evaluation.write_text(json.dumps({**json.loads(evaluation.read_text()), "bos": bos}))
        runs.append(load_run(directory))
    rows = {name: [cell.main for cell in cells] for name, cells in runs_section(runs, runs[0]).blocks[0].rows}
    assert rows["documents begin with BOS"] == ["yes", "no", "not recorded", "yes"]
    sentence = "Documents and prompts begin with BOS in a, d, and not in b: the tokens are others."
    assert sentence in opening_section(runs, runs[0]).missing
    assert not any("BOS" in line for line in opening_section(runs[2:], runs[3]).missing)
    unpaired = at_length(runs[1], runs[0], 2048)
    assert isinstance(unpaired, Unpaired)
    assert unpaired.reason == "the documents of one of b and a begin with BOS, those of the other not"
    assert isinstance(at_length(runs[3], runs[0], 2048), pd.Series)


def test_an_evaluation_without_its_record_is_unfinished(tmp_path):
    directory = write_run(tmp_path / "a", FakeRun("a"))
    (directory / "evaluation" / "evaluation.json").unlink()
    assert load_run(directory).results.empty


def test_answers_order_and_longppl_are_rows_with_their_intervals(tmp_path: Path) -> None:
    about = {"category": "long_context", "context_length": 2048, "n": 512, "run": "a", "method": "a", "chain": "c"}
    about |= {"test_time_scaling": "none", "harness": "ropewalk", "harness_version": "1", "source_file": "x"}
    values = {
        ("answers", "recovery"): (81.0, 78.0, 84.0), ("order", "answers_last"): (25.0, 21.0, 29.0),
        ("longppl", "nll"): (1.5, 1.4, 1.6),
    }  # fmt: skip
    rows = [
        about | {"task": task, "metric": metric, "value": value, "ci_low": low, "ci_high": high}
        for (task, metric), (value, low, high) in values.items()
    ]
    write_run(tmp_path / "a", FakeRun("a"))
    write_table(tmp_path / "a" / "evaluation", rows)
    run = load_run(tmp_path / "a")
    blocks = {block.title.partition(":")[0]: block.rows[0][1][2] for block in results_section([run], run).blocks}
    shown = {name: (blocks[name].main, blocks[name].detail) for name in ("Answers", "Order probe", "LongPPL")}
    assert shown == {  # scores as shares of 1, as everywhere in this table
        "Answers": ("0.810", "[0.780, 0.840]"), "Order probe": ("0.250", "[0.210, 0.290]"),
        "LongPPL": ("1.500", "[1.400, 1.600]"),
    }  # fmt: skip
    assert blocks["Answers"].hint == "c, n = 512"
