from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from ropewalk.evaluation.harness.helmet.helmet_datasets import CATEGORIES
from ropewalk.evaluation.harness.ruler_tasks import TASKS
from ropewalk.evaluation.paper import LONGBENCH, MEASURES, beside_published, not_measured, read_published
from ropewalk.evaluation.results import NEEDS_JUDGE, results_table

EXPECTED = Path(__file__).parents[2] / "recipes" / "cope_llama3_8b_64k" / "expected.csv"
YARN = "yarn(factor=4, original_max_position_embeddings=65536)"


@pytest.fixture
def published() -> pd.DataFrame:
    return read_published(EXPECTED)


def row(task: str, value: float | None, length: int | None, **changes) -> dict:
    common = {"run": "mine", "method": "cope20", "chain": "c", "test_time_scaling": "none", "harness": "ruler"}
    common |= {"harness_version": "1", "category": "x", "metric": "string_match_all", "n": 100, "source_file": "f"}
    return {**common, "task": task, "context_length": length, "value": value, **changes}


def cell(found: pd.DataFrame, benchmark: str, task: str, length: int | None, scaling: str = "none") -> pd.Series:
    chosen = found[
        (found["benchmark"] == benchmark) & (found["task"] == task) & (found["test_time_scaling"] == scaling)
    ]
    chosen = chosen[chosen["context_length"].isna()] if length is None else chosen[chosen["context_length"] == length]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_a_mean_stands_beside_the_papers(published) -> None:
    table = results_table([row(f"niah_single_{i}", value, 65536) for i, value in ((1, 100.0), (2, 90.0), (3, 80.0))])
    found = cell(beside_published(table, published), "RULER", "NIAH", 65536)
    assert (found["published"], found["measured"], found["n"]) == (99.67, 90.0, 100)
    assert found["difference"] == pytest.approx(-9.67)
    assert found["as_published"]
    assert found["missing"] == ""


def test_a_mean_that_lacks_a_task_is_none(published) -> None:
    table = results_table([row("niah_single_1", 100.0, 65536), row("niah_single_2", None, 65536)])
    found = cell(beside_published(table, published), "RULER", "NIAH", 65536)
    assert math.isnan(found["measured"])
    assert found["missing"] == "niah_single_2,niah_single_3"
    assert cell(beside_published(table, published), "RULER", "13-task average", 65536)["missing"].count(",") == 11


def test_beside_another_paper_nothing_is_said_of_its_scaling(published) -> None:
    table = results_table([row(f"niah_single_{i}", 90.0, 65536) for i in (1, 2, 3)])
    other = published.assign(source="RoPE-ID, arXiv 2603.18017")
    assert cell(beside_published(table, other), "RULER", "NIAH", 65536)["as_published"] is None


def test_past_the_trained_length_the_paper_scales(published) -> None:
    tasks = [f"niah_multikey_{i}" for i in (1, 2, 3)]
    rows = [row(task, 50.0, 131072) for task in tasks]
    rows += [row(task, 60.0, 131072, test_time_scaling=YARN, chain="c > yarn") for task in tasks]
    found = beside_published(results_table(rows), published)
    assert not cell(found, "RULER", "MK", 131072)["as_published"]
    scaled = cell(found, "RULER", "MK", 131072, YARN)
    assert (scaled["as_published"], scaled["measured"], scaled["published"]) == (True, 60.0, 59.67)


def test_helmets_average_is_over_categories_and_three_of_them_at_256k(published) -> None:
    def category(name: str, value: float, length: int) -> list[dict]:
        datasets = CATEGORIES[name].datasets
        return [row(d.name, value, length, harness="helmet", metric=d.metrics[0], category=name) for d in datasets]

    rows = [
        r for name, value in (("Summ", 30.0), ("LongQA", 20.0), ("Recall", 40.0)) for r in category(name, value, 262144)
    ]
    rows += [r for name in ("Summ", "LongQA", "Recall") for r in category(name, 50.0, 65536)]
    found = beside_published(results_table(rows), published)
    assert cell(found, "HELMET", "average", 262144)["measured"] == 30.0  # of three means, whatever their tasks
    assert cell(found, "HELMET", "average", 262144)["published"] == 28.48
    assert math.isnan(cell(found, "HELMET", "average", 65536)["measured"])
    assert "kilt_nq" in cell(found, "HELMET", "average", 65536)["missing"]


def test_a_category_without_its_judge_is_none(published) -> None:
    rows = [row("infbench_sum_eng", None, 8192, harness="helmet", metric=NEEDS_JUDGE, n=0)]
    found = cell(beside_published(results_table(rows), published), "HELMET", "Summ", 8192)
    assert math.isnan(found["measured"])
    assert found["missing"] == "infbench_sum_eng,multi_lexsum"


def test_short_context_has_no_length(published) -> None:
    table = results_table([row("gsm8k", 52.0, None, harness="lm-eval", metric="exact_match,strict-match")])
    found = cell(beside_published(table, published), "short-context", "GSM8K", None)
    assert found["difference"] == pytest.approx(-0.46)
    assert found["as_published"]


def test_an_unknown_method_is_named(published) -> None:
    table = results_table([row("vt", 1.0, 8192, method="resonance")])
    assert len(beside_published(table, published)) == 0
    assert "no published numbers for resonance; there are some for cope20" in not_measured(table, published)


def test_every_published_number_but_the_ablations_has_a_measure(published) -> None:
    cells = {(row["benchmark"], row["task"]) for _, row in published.iterrows()}
    assert cells - set(MEASURES) == {("HELMET", "average (ablation)")}
    assert len(published) == 219
    assert set(MEASURES[("RULER", "13-task average")].groups[0]) == set(TASKS)


def test_a_wrong_file_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        read_published(tmp_path / "none.csv")
    (tmp_path / "short.csv").write_text("method,value\nrope,1\n")
    with pytest.raises(ValueError, match="lacks source, table, benchmark"):
        read_published(tmp_path / "short.csv")


@pytest.mark.parametrize(
    "row", ["s,1,RULER", "s,1,RULER,,qa,8192,1", "s,1,RULER,rope,qa,8192,inf", "s,1,RULER,rope,qa,0,1"]
)
def test_a_row_without_a_number_is_named(tmp_path, row) -> None:
    (tmp_path / "e.csv").write_text(
        f"source,table,benchmark,method,task,context_length,value\ns,,RULER,rope,qa,,1\n{row}\n"
    )
    with pytest.raises(ValueError, match=r"row 2 lacks a cell or has a number out of range"):
        read_published(tmp_path / "e.csv")


ROPE_ID = EXPECTED.parents[1] / "rope_id_1b"


@pytest.mark.parametrize("name", ["expected.csv", "expected_3b.csv"])
def test_rope_ids_tasks_and_categories_add_up_to_its_averages(name) -> None:
    """The paper's tables by task and by category give its table of averages, to what their two digits leave."""
    published = read_published(ROPE_ID / name)
    for benchmark, table, mean, weights in (
        ("RULER", "by task", "13-task average", dict.fromkeys(TASKS, 1)),
        ("LongBench", "by category", "14-task average", {name: len(tasks) for name, tasks in LONGBENCH.items()}),
    ):
        rows = published[(published["benchmark"] == benchmark) & (published["table"] == table)]
        assert set(rows["task"]) == set(weights)
        means = published[(published["benchmark"] == benchmark) & (published["task"] == mean)]
        means = means[means["table"] != "5"].set_index(["method", "context_length"])["value"]
        for key, parts in rows.groupby(["method", "context_length"]):
            weighed = parts["value"] * parts["task"].map(weights)
            assert weighed.sum() / sum(weights.values()) == pytest.approx(means[key], abs=0.02)


@pytest.mark.parametrize("path", sorted(ROPE_ID.glob("expected*.csv")), ids=lambda path: path.name)
def test_every_number_of_rope_id_can_stand_beside_a_measured_one(path) -> None:
    published = read_published(path)
    known = [(row.benchmark, row.task.partition(",")[0]) in MEASURES for row in published.itertuples()]
    assert all(known)
    assert published["run"].notna().all()


def test_a_published_run_is_that_of_a_longer_name_or_a_setting() -> None:
    """A run's name begins with its study's, and an ablation's task says what was changed."""
    published = read_published(ROPE_ID / "expected.csv")
    run = "rope_id_1b/rope_id_shortest_period_16_4k"
    rows = [row(task, 30.0, 8192, run=run, method="rope_id", metric=TASKS[task].metric) for task in TASKS]
    found = beside_published(results_table(rows), published)
    measured = found[found["measured"].notna()]
    assert measured[["task", "published", "measured"]].to_numpy().tolist() == [
        ["13-task average, shortest_period=16", 36.52, 30.0]
    ]
