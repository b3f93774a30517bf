"""Tables of RULER, HELMET and short context, and effective context, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from figures.drawings import axes_of, curve, marked
from report.fake_runs import FakeRun, benchmark_row, write_run, write_table

from ropewalk.figures.evaluation_curves import benchmark_figure
from ropewalk.figures.style import method_styles
from ropewalk.report.benchmarks import HELMET, LONG, RULER, Suite, benchmark_section, short_context_section
from ropewalk.report.figure_tables import average_table, trained_lengths
from ropewalk.report.results_section import effective_length, effective_section, longest_falling
from ropewalk.report.runs import Run, load_run
from ropewalk.report.section import Block, Section

YARN = "yarn(factor=4)"


def with_rows(root: Path, name: str, *rows: dict, **fake: object) -> Run:
    directory = write_run(root / name, FakeRun(name, **fake))
    write_table(directory / "evaluation", [row | {"run": name} for row in rows])
    return load_run(directory)


def ruler(task: str, length: int, value: float | None, **more: object) -> dict:
    return benchmark_row("", "ruler", task, length, value, **more)


def cells(block: Block) -> dict[str, list[str]]:
    return {name: [cell.main for cell in row] for name, row in block.rows}


def table(runs: list[Run], suite: Suite) -> Section:
    found = benchmark_section(runs, suite)
    assert found is not None
    return found


def test_an_average_names_its_tasks_and_leaves_out_those_that_not_all_have(tmp_path: Path) -> None:
    a = with_rows(
        tmp_path, "a", ruler("vt", 4096, 80), ruler("cwe", 4096, 60), ruler("vt", 8192, 50), ruler("cwe", 8192, 30)
    )
    b = with_rows(
        tmp_path, "b", ruler("vt", 4096, 90), ruler("cwe", 4096, 50), ruler("fwe", 4096, 100), ruler("vt", 8192, 70),
        ruler("cwe", 8192, 30),
    )  # fmt: skip
    found = table([a, b], RULER)
    (block,) = found.blocks
    assert block.title == "Average over 2 tasks: vt, cwe"
    assert cells(block) == {"a": ["70.0", "40.0"], "b": ["70.0", "50.0"]}
    # two tasks with a standard error of 1 each: sqrt(1 + 1) / 2
    assert block.rows[0][1][0].detail == f"± {math.sqrt(2) / 2:.1f}"
    assert found.missing == ["In no average, as not every row and length has one number of them: fwe."]
    assert [one.title for one in found.folded] == ["vt (score)", "cwe (score)", "fwe (score)"]
    assert [[cell.beyond for cell in row] for _, row in block.rows] == [[True, True]] * 2  # trained at 2,048


def test_all_thirteen_are_called_so(tmp_path: Path) -> None:
    rows = [ruler(f"task{i}", length, 10 * i) for i in range(13) for length in (1024, 2048)]
    found = table([with_rows(tmp_path, "a", *rows)], RULER)
    assert found.blocks[0].title.startswith("Average over all 13 tasks: task0, task1, ")
    assert cells(found.blocks[0]) == {"a": ["60.0", "60.0"]}


def test_settings_at_one_length_are_rows_of_their_own_and_a_setting_by_length_is_one(tmp_path: Path) -> None:
    by_length = with_rows(tmp_path, "a", ruler("vt", 2048, 90), ruler("vt", 4096, 80, test_time_scaling=YARN))
    both = with_rows(
        tmp_path, "b", ruler("vt", 2048, 90), ruler("vt", 4096, 10), ruler("vt", 4096, 80, test_time_scaling=YARN)
    )
    (block,) = table([by_length, both], RULER).blocks
    assert cells(block) == {"a": ["90.0", "80.0"], "b, no scaling": ["90.0", "10.0"], f"b, {YARN}": ["-", "80.0"]}


def test_a_needed_judge_is_named_and_no_zero(tmp_path: Path) -> None:
    helmet = [
        benchmark_row("", "helmet", task, 8192, value, category=category)
        for task, category, value in (("json_kv", "recall", 80), ("nq", "rag", 40), ("hotpotqa", "rag", 50))
    ]
    judged = benchmark_row("", "helmet", "narrativeqa", 8192, None, category="longqa", metric="needs_judge", n=0)
    found = table([with_rows(tmp_path, "a", *helmet, judged)], HELMET)
    assert {block.title: cells(block)["a"] for block in found.blocks} == {
        "recall: average over json_kv": ["80.0"],
        "rag: average over nq, hotpotqa": ["45.0"],
        "Average over the 2 categories above: recall, rag": ["62.5"],  # (80 + 45) / 2
    }
    assert "No number, as only a judge model scores it: narrativeqa." in found.missing
    assert "0.0" not in [cell.main for block in found.blocks for _, row in block.rows for cell in row]


def test_shares_of_unparsed_answers_strata_and_json_kv_stand_by_themselves_and_in_no_average(tmp_path: Path) -> None:
    helmet = [benchmark_row("", "helmet", "nq", 8192, 40, category="RAG", metric="substring_exact_match")]
    unparsed = benchmark_row("", "helmet", "nq", 8192, 7, category="RAG", metric="unparsed")
    whole = benchmark_row("", "lm-eval", "longbench2", 8192, 30, metric="acc")
    strata = [
        whole | {"value": value, "n": n, "position_start": start, "position_end": 2 * start}
        for start, value, n in ((16384, 20, 25), (8192, 40, 75))
    ]
    kv = ruler("json_kv", 8192, 90)
    a = with_rows(tmp_path, "a", *helmet, unparsed, *strata, whole, kv, ruler("vt", 8192, 50))
    b = with_rows(tmp_path, "b", *helmet, whole, ruler("vt", 8192, 60))
    found = {suite.harness: table([a, b], suite) for suite in (HELMET, LONG, RULER)}
    assert [cells(block) for block in found["helmet"].blocks] == [{"a": ["40.0"], "b": ["40.0"]}]
    assert [cells(block) for block in found["lm-eval"].blocks] == [{"a": ["30.0"], "b": ["30.0"]}]
    assert [block.title for block in found["ruler"].blocks] == ["Average over 1 task: vt"]
    assert {block.title: cells(block)["a"] for one in found.values() for block in one.folded} == {
        "nq (substring_exact_match)": ["40.0"],
        "nq (unparsed)": ["7.0"],
        "longbench2 (acc)": ["30.0"],
        "longbench2 (acc), prompts of 8,192 to 16,383 tokens": ["40.0"],
        "longbench2 (acc), prompts of 16,384 to 32,767 tokens": ["20.0"],
        "vt (score)": ["50.0"],
        "json_kv (score)": ["90.0"],
    }
    assert [one.missing for one in found.values()] == [[], [], []]


def test_a_task_with_two_metrics_is_in_no_average(tmp_path: Path) -> None:
    rows = [
        benchmark_row("", "lm-eval", "babilong", 4096, value, metric=metric) for metric, value in (("em", 1), ("f1", 2))
    ]
    found = table([with_rows(tmp_path, "a", *rows)], LONG)
    assert not found.blocks
    assert [one.title for one in found.folded] == ["babilong (em)", "babilong (f1)"]


def test_the_figure_draws_the_averages_of_the_table(tmp_path: Path) -> None:
    rows = [ruler(task, length, value) for task, value in (("vt", 80), ("cwe", 60)) for length in (2048, 4096)]
    run = with_rows(tmp_path, "a", *rows)
    averages, tasks = average_table([run], RULER)
    figure = benchmark_figure("RULER", averages, tasks, trained_lengths([run]), method_styles(["a"]))
    assert figure is not None
    (axes,) = axes_of(figure)
    assert [values.tolist() for values in curve(axes, "a")] == [[2048, 4096], [70, 70]]
    assert averages["value"].tolist() == [70, 70]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(70 + 1.96 * math.sqrt(2) / 2)
    assert marked(axes, "length 2048")[0] == 2048  # trained
    assert "vt, cwe" in figure.panels[0].note
    assert benchmark_figure("HELMET", *average_table([run], HELMET), trained_lengths([run]), {}) is None


def test_short_context_compares_with_the_base_task_by_task(tmp_path: Path) -> None:
    def score(task: str, value: float, error: float) -> dict:
        return benchmark_row("", "lm-eval", task, None, value, metric="acc", stderr=error)

    base = with_rows(tmp_path, "base", score("mmlu", 60, 0.3), score("gsm8k", 50, 1.0), trained_length=512)
    arm = with_rows(tmp_path, "arm", score("mmlu", 59, 0.4), score("gsm8k", 48.5, 1.0), score("piqa", 70, 1.0))
    found = short_context_section([base, arm], base)
    assert found is not None
    assert found.columns == ["base", "arm"]
    rows = dict(found.blocks[0].rows)
    mmlu, gsm = rows["mmlu (acc)"][1], rows["gsm8k (acc)"][1]
    # sqrt(0.3^2 + 0.4^2) = 0.5; sqrt(2) = 1.4
    assert (mmlu.main, mmlu.detail) == ("59.0", "± 0.4 (-1.0 ± 0.5)")
    assert gsm.detail == "± 1.0 (-1.5 ± 1.4)"
    assert mmlu.noise == "training noise unknown"
    assert rows["piqa (acc)"][1].detail == "± 1.0"
    worse = with_rows(tmp_path, "worse", score("mmlu", 58.9, 0.4))
    lost = short_context_section([base, worse], base)
    assert lost is not None
    assert not lost.blocks[0].rows[0][1][1].marked  # past two standard errors, and exploratory all the same


@pytest.mark.parametrize(
    ("values", "held"),
    [
        ({512: 100, 1024: 90, 2048: 85}, 2048),
        ({512: 100, 1024: 84.9, 2048: 99}, 512),  # what recovers later does not count
        ({512: 84}, None),
        ({}, None),
    ],
)
def test_effective_length(values: dict[int, float], held: int | None) -> None:
    assert effective_length(values, 85) == held


def test_loss_falls_until_it_does_not() -> None:
    assert longest_falling({512: 3.0, 1024: 2.9, 2048: 2.8}) == 2048
    assert longest_falling({512: 3.0, 1024: 2.9, 2048: 2.95, 4096: 2.5}) == 1024
    assert longest_falling({512: 3.0, 1024: 3.0}) == 512
    assert longest_falling({512: 3.0}) is None


def test_effective_context_states_its_thresholds(tmp_path: Path) -> None:
    rows = [ruler("vt", length, value) for length, value in ((1024, 95), (2048, 86), (4096, 85))]
    run = with_rows(tmp_path, "a", *rows, exact=lambda length, depth: 1.0 if length <= 4096 else 0.5)
    bare = with_rows(tmp_path, "b", ruler("vt", 1024, 20), ruler("vt", 2048, 20), ruler("vt", 4096, 20))
    found = effective_section([run, bare], needle=85.0, ruler=85.6)
    assert found is not None
    assert found.columns[1] == "needle: exact match ≥ 85%"
    assert found.columns[3] == "RULER: average ≥ 85.6%"
    needle, loss, of_ruler = (dict(found.blocks[0].rows)["a"][i] for i in (1, 2, 3))
    assert (needle.main, needle.beyond) == ("4,096", True)
    assert (loss.main, loss.detail) == ("≥ 8,192", "the longest measured")  # the fake loss falls everywhere
    assert of_ruler.main == "2,048"
    assert dict(found.blocks[0].rows)["b"][3].main == "< 1,024"
    assert found.legend == "RULER's average is over vt."


def test_one_number_measured_twice_otherwise_is_an_error(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "a", FakeRun("a"))
    for name in ("evaluation", "evaluation-again"):
        write_table(directory / name, [ruler("vt", 4096, 80 + len(name)) | {"run": "a"}])
    with pytest.raises(ValueError, match=r"both hold ruler's vt \(score\) at 4,096 tokens.*move one"):
        load_run(directory)


def test_each_setting_of_a_run_has_a_dash_of_its_own(tmp_path: Path) -> None:
    rows = [ruler("vt", length, 80, test_time_scaling=scaling) for length in (2048, 4096) for scaling in ("none", YARN)]
    run = with_rows(tmp_path, "a", *rows)
    averages, tasks = average_table([run], RULER)
    figure = benchmark_figure("RULER", averages, tasks, trained_lengths([run]), method_styles(["a"]))
    lines = [line for line in axes_of(figure)[0].lines if line.get_label() == "a"]
    assert len({line.get_linestyle() for line in lines}) == 2
    assert len({line.get_color() for line in lines}) == 1


def test_a_length_without_a_number_holds_no_threshold() -> None:
    assert effective_length({512: 90.0, 1024: math.nan, 2048: 90.0}, 85) == 512
    assert longest_falling({512: 3.0, 1024: math.nan, 2048: 1.0}) == 512
