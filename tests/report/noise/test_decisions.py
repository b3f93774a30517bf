"""Decisions of a declared family, on numbers whose answers are known by hand, and on run directories."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report.fake_runs import FakeRun, write_fake_evaluation, write_run
from scipy import stats

from ropewalk.config.rules import validate_train
from ropewalk.config.train import PrimaryConfig
from ropewalk.report.noise.decisions import (
    DECIDED,
    NO_DIFFERENCE,
    NOT_FINITE,
    UNDECIDED,
    decide,
    decision_section,
    fewest_seeds,
    seed_numbers,
)
from ropewalk.report.runs import Run, load_run, load_runs
from ropewalk.report.section import as_text

COPE = "abf(theta=1e5) > cope(clip=11)"
PRIMARY = {
    "primary": "{pairs: [[cope, abf]], task: loss_at_length, metric: nll, length: 2048, difference: 0.05,"
    " test_time_scaling: null}"
}


def test_eight_seeds_of_one_sign_past_the_difference_are_decided() -> None:
    (answer,) = decide([[-0.10, -0.12, -0.08, -0.11, -0.09, -0.10, -0.13, -0.07]], 0.05)
    assert (answer.verdict, answer.p_value, answer.adjusted) == (DECIDED, 2**-7, 2**-7)
    assert answer.mean.value == pytest.approx(-0.1)


def test_the_same_differences_below_the_declared_one_are_not() -> None:
    """p is as small, but the mean, 0.10, is less than 0.11; and the 90% interval is not inside +-0.11 either."""
    values = np.array([0.10, 0.12, 0.08, 0.11, 0.09, 0.10, 0.17, 0.03])
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert high > 0.11 > values.mean()
    (answer,) = decide([values], 0.11)
    assert (answer.verdict, answer.adjusted) == (UNDECIDED, 2**-7)
    assert (answer.mean.low, answer.mean.high) == pytest.approx((low, high))
    assert answer.seeds_needed is not None


def test_a_tight_interval_around_zero_is_no_difference_even_with_few_seeds() -> None:
    assert decide([[0.001, -0.002, 0.001]], 0.05)[0].verdict == NO_DIFFERENCE


def test_five_seeds_decide_nothing() -> None:
    (answer,) = decide([[1.0, 1.1, 0.9, 1.0, 1.05]], 0.05)
    assert (answer.verdict, answer.p_value) == (UNDECIDED, 0.0625)
    assert [fewest_seeds(family) for family in (1, 2, 3, 4, 7)] == [6, 7, 7, 8, 9]  # 2^(1-k) x family < 0.05


def test_holm_counts_every_pair_that_was_declared() -> None:
    """Seven seeds of one sign: 2^-6 = 0.0156; over four pairs 0.0625, decided alone."""
    same = [1.0] * 7
    assert decide([same], 0.05)[0].verdict == DECIDED
    answers = decide([same, [], [1.0, -1.0], [0.5, -0.5, 1.0]], 0.05)
    assert (answers[0].verdict, answers[0].adjusted) == (UNDECIDED, 0.0625)
    assert (answers[1].verdict, answers[1].seeds_needed) == (UNDECIDED, 8)  # 2^-7 x 4 = 0.031


def test_a_number_that_is_none_is_no_decision() -> None:
    answers = decide([[1.0] * 7 + [math.nan], [1.0] * 8], 0.05)
    assert [answer.verdict for answer in answers] == [NOT_FINITE, DECIDED]
    assert answers[1].adjusted == 2 * 2**-7


def made(root: Path, seeds: int, config: dict[str, str], gap: float = -0.2) -> list[Run]:
    fakes = [FakeRun(f"abf-s{i}", seed=i, offset=0.05 * i, config=config) for i in range(seeds)]
    fakes += [
        FakeRun(f"cope-s{i}", chain=COPE, seed=i, offset=0.05 * i + gap + 0.01 * (-1) ** i, config=config)
        for i in range(seeds)
    ]
    return [load_run(write_run(root / fake.name, fake)) for fake in fakes]


def offset_of(run: Run) -> float:
    seed = run.config["trainer.seed"]
    return 0.05 * seed + ((-0.2 + 0.01 * (-1) ** seed) if run.name.startswith("cope") else 0.0)


def test_the_family_of_the_runs_is_decided_in_the_report(tmp_path: Path) -> None:
    section = decision_section(made(tmp_path, 8, PRIMARY))
    ((name, cells),) = section.blocks[0].rows
    assert section.blocks[0].title == "loss_at_length nll at 2,048 tokens, smallest difference of interest 0.05"
    assert (name, [cell.main for cell in cells]) == (
        "cope less abf", ["-0.2000", "8", "0.0078", "0.0078", DECIDED, "-"],
    )  # fmt: skip
    assert [cell.marked for cell in cells] == [False] * 4 + [True, False]
    assert not section.missing


def test_three_seeds_are_told_that_nothing_can_be_decided(tmp_path: Path) -> None:
    section = decision_section(made(tmp_path, 3, PRIMARY))
    (cells,) = [cells for _, cells in section.blocks[0].rows]
    assert cells[4].main == UNDECIDED
    assert not cells[4].marked
    assert int(cells[5].main) >= 6
    assert section.missing == [
        "With 3 paired seeds the smallest p of the exact test is 0.25: nothing can be decided, whatever the numbers; "
        "6 are the fewest."
    ]
    assert "undecided" in as_text(section)


def test_runs_that_declared_nothing_are_in_no_family(tmp_path: Path) -> None:
    assert decision_section(made(tmp_path / "none", 2, {})) is None
    later = [load_run(write_run(tmp_path / "late", FakeRun("cope-s9", chain=COPE, seed=9)))]
    section = decision_section([*made(tmp_path / "some", 3, PRIMARY), *later])
    assert section.blocks[0].rows[0][1][1].main == "3"
    assert "Started without this declaration, so not in it: cope-s9." in section.missing


def test_a_declaration_that_came_later_is_named_and_decides_nothing(tmp_path: Path) -> None:
    runs = made(tmp_path, 3, PRIMARY)
    change = {"step": 20, "entry": "primary", "changes": ["primary.difference was 0.5, is 0.05"]}
    other = {"step": 10, "entry": "max_steps", "changes": ["max_steps was 20, is 30"]}
    changed = [
        replace(run, record=run.record | {"accepted": [other, change] if run.name == "cope-s1" else [other]})
        for run in runs
    ]
    section = decision_section(changed)
    assert section.blocks[0].rows[0][1][1].main == "2"
    said = (
        "Started without this declaration, so not in it: cope-s1 (from step 20 on primary.difference was 0.5, is 0.05)."
    )
    assert said in section.missing
    every = [replace(run, record=run.record | {"accepted": [change]}) for run in runs]
    section = decision_section(every)
    assert section.blocks[0].rows[0][1][1].main == "0"
    assert section.missing[-1].count("from step 20 on") == 6


def test_a_family_is_one_number_a_seed(tmp_path: Path) -> None:
    """At 4,096 tokens runs were measured with and without scaling; at 2,048 both have one number."""
    beyond = {"primary": PRIMARY["primary"].replace("2048", "4096")}
    for name, config in (("within", PRIMARY), ("beyond", beyond)):
        for run in made(tmp_path / name, 2, config):
            same = FakeRun(run.name, chain=run.record["chain"], offset=offset_of(run))
            write_fake_evaluation(run.directory / "evaluation-none", same, "none")
    within, past = (load_runs(sorted(map(str, (tmp_path / name).iterdir()))) for name in ("within", "beyond"))
    assert len(past) == 8
    with pytest.raises(
        ValueError, match=r"cope has loss_at_length nll at 4,096 tokens under .*; a family is one number a"
    ):
        decision_section(past)
    named = [replace(run, config=run.config | {"primary.test_time_scaling": "none"}) for run in past]
    assert decision_section(named).blocks[0].rows[0][1][1].main == "2"
    assert decision_section(within).blocks[0].rows[0][1][1].main == "2"


def test_of_several_lengths_a_seed_has_their_mean() -> None:
    rows = [("0", 512, 1.0), ("0", 1024, 2.0), ("0", 2048, 9.0), ("1", 512, 4.0)]
    table = pd.DataFrame(rows, columns=["seed", "context_length", "value"])
    table = table.assign(task="answers", metric="recovery", test_time_scaling="none")
    family = PrimaryConfig(task="answers", metric="recovery", length=[512, 1024])
    assert seed_numbers(table, family, "cope") == {"0": 1.5}  # the other seed lacks a length
    assert seed_numbers(table, replace(family, length=512), "cope") == {"0": 1.0, "1": 4.0}


@pytest.mark.parametrize(("changes", "message"), [
    (["primary.pairs=[[cope20]]"], r"primary.pairs has \['cope20'\]; each names two arms"),
    (["primary.pairs=[[a,b],[b,a]]"], "names a pair twice"),
    (["primary.length=[64,long]"], r"primary.length=\[64, 'long'\] is neither tokens nor a list"),
    (["primary.pairs=[[a,b]]", "primary.length=[]", "primary.difference=1"], "is neither tokens nor a list"),
    (["primary.pairs=[[a,b]]", "primary.length=64"], "primary.difference=None: a declared family needs"),
    (["primary.pairs=[[a,b]]", "primary.length=64", "primary.difference=0"], "primary.difference=0.0 must be positive"),
])  # fmt: skip
def test_a_declaration_that_does_not_hold_is_refused(changes: list[str], message: str) -> None:
    from helpers import composed

    with pytest.raises(ValueError, match=message):
        validate_train(composed("train", "+experiment=demo/pretrain", *changes), 1)
