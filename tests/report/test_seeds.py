"""Arms over seeds, and the base that is always a row."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from report.fake_runs import FakeRun, write_run

from ropewalk.report.overview import config_differences
from ropewalk.report.results_section import loss_at, results_section
from ropewalk.report.runs import Run, by_test_time, load_run, with_bases
from ropewalk.report.seeds import UNKNOWN_NOISE, arm_of, arms, noise_words, one_run_each, styles_of, why_apart

COPE = "abf(theta=1e5) > cope(clip=11)"


def made(root: Path, *fakes: FakeRun) -> dict[str, Run]:
    return {fake.name: load_run(write_run(root / fake.name, fake)) for fake in fakes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return made(
        tmp_path_factory.mktemp("runs"),
        FakeRun("rope-s0"),
        FakeRun("rope-s1", offset=0.02, seed=1),
        FakeRun("cope-seed0", chain=COPE, offset=-0.1),
        FakeRun("cope-seed7", chain=COPE, offset=-0.15, seed=7),
        FakeRun("hard", chain="abf(theta=1e5) > hardclip(clip=11)", offset=0.1),
    )


def test_runs_that_differ_in_their_seed_alone_are_one_arm(runs: dict[str, Run]) -> None:
    found = arms(list(runs.values()))
    assert [(arm.name, len(arm.runs), arm.seeds) for arm in found] == [("rope", 2, 2), ("cope", 2, 2), ("hard", 1, 1)]
    assert [run.name for run in one_run_each(found)] == ["rope", "cope", "hard"]


def test_logging_and_saving_are_no_other_arm_but_a_learning_rate_is(tmp_path: Path) -> None:
    found = made(tmp_path, *(FakeRun(name, seed=i) for i, name in enumerate("abc")))
    for name, old, new in (("b", "trainer: {", "trainer: {log_every: 10, "), ("c", "1.0e-3", "2.0e-3")):
        config = tmp_path / name / "config.yaml"
        config.write_text(config.read_text().replace(old, new))
        found[name] = load_run(tmp_path / name)
    assert [[run.name for run in arm.runs] for arm in arms(list(found.values()))] == [["a", "b"], ["c"]]


def test_one_chain_under_two_names_is_one_arm_and_another_key_is_named(tmp_path: Path) -> None:
    runs = made(tmp_path, *(FakeRun(name, seed=i) for i, name in enumerate("abc")))
    for name, old, new in (("b", "rope: {name: abf", "rope: {name: native"), ("c", "1.0e-3", "2.0e-3")):
        config = tmp_path / name / "config.yaml"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new))
        runs[name] = load_run(tmp_path / name)
    all_arms = arms(list(runs.values()))
    assert [[run.name for run in arm.runs] for arm in all_arms] == [["a", "b"], ["c"]]
    assert why_apart(all_arms) == ["a and c have one chain and are two arms: they differ in trainer.learning_rate."]


def test_another_cluster_or_evaluation_is_no_other_arm(tmp_path: Path) -> None:
    found = made(tmp_path, *(FakeRun(name, seed=i) for i, name in enumerate("ab")))
    config = tmp_path / "b" / "config.yaml"
    config.write_text(config.read_text() + "\ncluster: {name: h100_8}\nevaluation: {every: 5}\n")
    found["b"] = load_run(tmp_path / "b")
    assert len(arms(list(found.values()))) == 1
    rows = config_differences(list(found.values()), found["a"])
    assert {key for key, cells in rows if any(cell.marked for cell in cells)} == {"trainer.seed"}


def test_the_same_seed_twice_says_nothing_of_noise(tmp_path: Path) -> None:
    found = made(tmp_path, FakeRun("a"), FakeRun("b"), FakeRun("c", chain=COPE))
    (arm, _) = arms(list(found.values()))
    assert arm.seeds == 1
    assert arm.spread(loss_at(512)) is None
    assert noise_words(found["c"], found["a"], arms(list(found.values())), loss_at(512)) == UNKNOWN_NOISE


def test_noise_is_the_larger_spread_and_unknown_with_one_seed(runs: dict[str, Run]) -> None:
    found = arms(list(runs.values()))
    # rope's seeds differ by 0.02, cope's by 0.05, at every length
    assert noise_words(runs["cope-seed0"], runs["rope-s0"], found, loss_at(2048)) == "seeds differ by up to 0.050"
    assert noise_words(runs["hard"], runs["rope-s0"], found, loss_at(2048)) == UNKNOWN_NOISE
    assert arm_of(runs["rope-s1"], found).spread(loss_at(8192)) == pytest.approx(0.02)


def test_the_table_has_means_over_seeds_and_noise_beside_every_difference(runs: dict[str, Run]) -> None:
    table = results_section(list(runs.values()), runs["rope-s0"])
    blocks = {block.title.partition(":")[0].partition(" (")[0]: dict(block.rows) for block in table.blocks}
    base = 2.3781  # 2 + 4 / log2(1536 + 8), rope's loss over 1,024..2,048, seed 0; seed 1 is 0.02 above
    mean = blocks["Loss of each arm"]["rope (2 seeds)"][2]
    assert (mean.main, mean.detail) == (f"{base + 0.01:.3f}", f"[{base:.3f}, {base + 0.02:.3f}]")
    apart = blocks["Difference to the arm rope"]["cope (2 seeds)"][2]
    assert (apart.main, apart.detail) == ("-0.1000", "one seed in common")  # seed 0; 1 and 7 have no partner
    hard = blocks["Difference to the arm rope"]["hard (1 seed)"][2]
    assert (hard.main, hard.noise) == ("+0.1000", UNKNOWN_NOISE)  # its seed 0 less rope's
    for title in ("Difference to rope-s0", "Difference to the arm rope"):
        for cells in blocks[title].values():
            assert all(cell.noise for cell in cells)
    assert {cell.noise for cell in blocks["Difference to rope-s0"]["hard"]} == {UNKNOWN_NOISE}


def test_arms_of_the_same_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    fakes = [FakeRun(f"rope-s{i}", seed=i, offset=0.04 * i) for i in range(2)]
    fakes += [FakeRun(f"cope-s{i}", chain=COPE, seed=i, offset=0.05 * i - 0.02) for i in range(2)]
    found = made(tmp_path, *fakes)
    of_seeds = arms(list(found.values()))
    # cope less rope is -0.02 with seed 0 and -0.01 with seed 1, while the seeds of an arm lie 0.04 and 0.05 apart
    words = noise_words(found["cope-s0"], found["rope-s0"], of_seeds, loss_at(512))
    assert words == "over 2 seeds -0.020 to -0.010"
    assert noise_words(found["cope-s1"], found["rope-s0"], of_seeds, loss_at(512)) == "seeds differ by up to 0.050"
    table = results_section(list(found.values()), found["rope-s0"])
    block = next(block for block in table.blocks if block.title.startswith("Difference to the arm rope"))
    cell = dict(block.rows)["cope (2 seeds)"][0]
    assert (cell.main, cell.detail, cell.marked) == ("-0.0150", "[-0.0200, -0.0100]", False)


def test_arms_are_compared_under_the_same_test_time_setting(tmp_path: Path) -> None:
    """At 4,096 tokens ``none`` loses 0.5 (rope) and 0.7 (cope) more than ``auto``, so cope is 0.1 and 0.3 behind."""
    fakes = [FakeRun("rope-s0"), FakeRun("rope-s1", seed=1), FakeRun("cope-s0", chain=COPE, offset=0.1)]
    found = made(tmp_path, *fakes)
    runs = []
    for name, extra in (("rope-s0", 0.5), ("rope-s1", 0.5), ("cope-s0", 0.7)):
        run = found[name]
        own = run.table.assign(test_time="auto,none")
        past = own["context_length"] > 2048
        plain = own[past].assign(test_time="none", value=own[past]["value"] + extra)
        table = pd.concat([own[~past], own[past].assign(test_time="auto"), plain], ignore_index=True)
        runs += by_test_time(replace(run, table=table))
    baseline = next(run for run in runs if run.label == "rope-s0")
    table = results_section(runs, baseline)
    block = next(block for block in table.blocks if block.title.startswith("Difference to the arm rope: mean"))
    column = [int(name.replace(",", "")) for name in table.columns].index(4096)
    assert {name: cells[column].main for name, cells in block.rows} == {
        "cope-s0, auto (1 seed)": "+0.1000", "cope-s0, none (1 seed)": "+0.3000",
    }  # fmt: skip


def test_seeds_share_a_colour_and_differ_in_their_dash(runs: dict[str, Run]) -> None:
    styles = styles_of(list(runs.values()))
    assert styles["rope-s0"].color == styles["rope-s1"].color != styles["cope-seed0"].color
    assert styles["rope-s0"].dash != styles["rope-s1"].dash
    assert styles["rope"] == styles["rope-s0"]


def arm_from(root: Path, name: str, base: Path, **more: object) -> Run:
    config = {"model": f"{{path: {base}}}"}
    return load_run(write_run(root / name, FakeRun(name, config=config, **more)))


def test_the_base_is_found_from_the_model_that_the_arms_started_from(tmp_path: Path) -> None:
    write_run(tmp_path / "base", FakeRun("base", chain="rope", trained_length=512, offset=0.2))
    arm = arm_from(tmp_path, "arm", tmp_path / "base" / "export")
    found = with_bases([arm], None)
    assert [(run.name, run.is_base) for run in found] == [("arm", False), ("base", True)]
    row = dict(results_section(found, arm).blocks[1].rows)["base"][0]
    assert row.main == "+0.2000"
    assert row.noise == UNKNOWN_NOISE  # the arm has one seed
    given = with_bases([load_run(tmp_path / "base"), arm], None)
    assert [(run.name, run.is_base) for run in given] == [("base", True), ("arm", False)]


def test_an_evaluation_of_the_starting_model_is_the_base(tmp_path: Path) -> None:
    write_run(tmp_path / "evaluated", FakeRun("published"))
    record = tmp_path / "evaluated" / "evaluation" / "evaluation.json"
    record.write_text(record.read_text().replace("{", f'{{"checkpoint": "{tmp_path}/model", ', 1))
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        (tmp_path / "evaluated" / name).unlink()
    evaluated, arm = load_run(tmp_path / "evaluated"), arm_from(tmp_path, "arm", tmp_path / "model")
    assert [run.is_base for run in with_bases([evaluated, arm], None)] == [True, False]


def test_a_base_that_nobody_evaluated_is_an_empty_row(tmp_path: Path) -> None:
    arm = arm_from(tmp_path, "arm", tmp_path / "meta-llama" / "Meta-Llama-3-8B")
    found = with_bases([arm], None)
    assert [run.name for run in found] == ["arm", str(tmp_path / "meta-llama" / "Meta-Llama-3-8B")]
    table = results_section(found, arm)
    assert {cell.main for cell in dict(table.blocks[0].rows)[found[1].name]} == {"-"}
    assert table.missing[0].startswith(
        f"{found[1].name} was not evaluated here: python scripts/evaluate.py checkpoint="
    )


def test_a_given_base_of_the_same_name_keeps_its_path(tmp_path: Path) -> None:
    arm = arm_from(tmp_path, "arm", tmp_path / "elsewhere")
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "arm", other)
    found = with_bases([arm], str(other))
    assert [(run.name, run.is_base) for run in found] == [("arm", False), (str(other), True)]
    with pytest.raises(ValueError, match=r"base=.*none is not a directory; give the base"):
        with_bases([arm], str(tmp_path / "none"))
