"""A study from its plan and results: made-up numbers whose decisions are known by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import composed
from report.fake_runs import FakeRun, write_run
from scipy import stats

from ropewalk.config import CONFIG_DIR
from ropewalk.config.train import StudyConfig
from ropewalk.errors import UserError
from ropewalk.report.noise.decisions import DECIDED, NO_DIFFERENCE
from ropewalk.report.noise.study import (
    accepted_seeds,
    collect,
    curves,
    read_plan,
    read_results,
    seeds_to_run,
    study,
    study_figures,
    study_sections,
)

RECIPE = CONFIG_DIR.parent / "recipes" / "extrapolation_small" / "plan.yaml"
PLAN = """
primary:
  {pairs: [[cope, rope], [cope, hardclip]], task: answers, metric: recovery, test_time_scaling: none, difference: 5}
regimes:
  scratch: {runs: RUNS/scratch, trained: 64, lengths: [128, 256]}
  continued: {runs: RUNS/continued, trained: 256, lengths: [512]}
base: {regime: scratch, arm: rope, metric: exact_match, length: 64, at_least: 95}
seeds: 8
"""


def numbers(scores: dict[int, float]) -> pd.DataFrame:
    """CoPE is 20 points above RoPE from scratch and as good as HardClip; of the other regime nothing was measured."""
    rows = []
    for seed, score in scores.items():
        rows.append(("rope", seed, "scratch", "answers", 64, "none", "exact_match", score, 512))
        for arm, value in (("rope", 40.0), ("hardclip", 60.0), ("cope", 60.0 + 0.1 * seed)):
            for length, change in ((128, 10.0), (256, -10.0)):
                rows.append((arm, seed, "scratch", "answers", length, "none", "recovery", value + change + seed, 512))
    columns = ["arm", "seed", "regime", "task", "length", "test_time", "metric", "value", "n"]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture
def plan(tmp_path: Path):
    (tmp_path / "plan.yaml").write_text(PLAN.replace("RUNS", str(tmp_path)))
    return read_plan(tmp_path / "plan.yaml")


def test_a_seed_whose_base_misses_is_replaced_by_the_next_for_all_arms(plan) -> None:
    scores = dict.fromkeys(range(8), 99.0) | {2: 94.9, 5: float("nan")}
    assert accepted_seeds(plan, numbers(scores)) == [0, 1, 3, 4, 6, 7]
    assert seeds_to_run(plan, numbers(scores)) == [8, 9]
    more = numbers(scores | {8: 95.0, 9: 99.0, 10: 99.0})
    assert accepted_seeds(plan, more) == [0, 1, 3, 4, 6, 7, 8, 9]  # no more than declared
    assert seeds_to_run(plan, more) == []
    words = " ".join(study_sections(plan, more)[0].missing)
    assert "Accepted seeds: 8 of 8." in words
    assert "below 95 at 64: 2 (94.9), 5 (nan)." in words


def test_the_family_is_all_pairs_in_all_regimes(plan) -> None:
    results = numbers(dict.fromkeys(range(8), 99.0))
    (block,) = study_sections(plan, results)[0].blocks
    answers = {name: [cell.main for cell in cells] for name, cells in block.rows}
    # 20 + 0.1 seed, all of one sign: p = 2^-7, by Holm x 4, with the two that were not run
    differences = 20 + 0.1 * np.arange(8)
    assert answers["scratch: cope less rope"][:5] == [f"{differences.mean():+.4f}", "8", "0.0078", "0.0312", DECIDED]
    small = 0.1 * np.arange(8)
    low, high = stats.ttest_1samp(small, 0).confidence_interval(0.9)
    assert -5 < low < high < 5
    assert answers["scratch: cope less hardclip"][0] == f"{small.mean():+.4f}"
    assert answers["scratch: cope less hardclip"][4] == NO_DIFFERENCE
    assert answers["continued: cope less rope"][1] == "0"


def test_a_seed_without_one_of_the_lengths_has_no_number(plan) -> None:
    results = numbers(dict.fromkeys(range(8), 99.0))
    lost = (results["arm"] == "cope") & (results["seed"] == 3) & (results["length"] == 256)
    (block,) = study_sections(plan, results[~lost])[0].blocks
    assert block.rows[0][1][1].main == "7"


def test_means_are_students_over_accepted_seeds(plan) -> None:
    means = curves(plan, numbers(dict.fromkeys(range(8), 99.0) | {9: 10.0}))
    row = means[(means["arm"] == "rope") & (means["x"] == 128)].iloc[0]
    values = 50.0 + np.arange(8)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (row["value"], row["ci_low"], row["ci_high"], row["n"]) == pytest.approx((values.mean(), low, high, 8))


def test_other_arms_have_a_figure_of_their_own_beside_the_base(plan) -> None:
    results = numbers(dict.fromkeys(range(8), 99.0))
    (declared,) = study_figures(plan, results)
    other = results[results["arm"] == "cope"].assign(arm="hope")
    both = study_figures(plan, pd.concat([results, other], ignore_index=True))
    assert [figure.name for figure in both] == [declared.name, "recovery_of_other_arms_against_context_length"]
    assert [set(figure.styles) for figure in both] == [{"rope", "hardclip", "cope"}, {"rope", "hope"}]
    assert [len(figure.panels) for figure in both] == [1, 1]


def test_results_are_collected_from_runs_and_kept_from_before(plan, tmp_path: Path, capsys) -> None:
    for seed in (0, 1):
        name = f"cope-s{seed}"
        write_run(tmp_path / "scratch" / name, FakeRun(name, chain="cope(clip=11)", seed=seed, offset=seed))
    elsewhere = numbers({7: 99.0})
    elsewhere.to_csv(tmp_path / "results.csv", index=False)
    collect(plan, tmp_path)
    results = read_results(tmp_path / "results.csv")
    assert set(results["seed"]) == {0, 1, 7}
    losses = results[(results["task"] == "loss_at_length") & (results["length"] == 512)].set_index("seed")["value"]
    assert losses[1] - losses[0] == pytest.approx(1.0)
    assert not results["task"].eq("loss_by_position").any()
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert list(runs["seed"]) == [0, 1]
    assert set(runs["steps"]) == {44}
    assert ",44,360448," in (tmp_path / "runs.csv").read_text()
    once = (tmp_path / "results.csv").read_text()
    study(StudyConfig(plan=str(tmp_path / "plan.yaml"), collect=True))
    assert (tmp_path / "results.csv").read_text() == once
    assert "scratch: cope less rope" in capsys.readouterr().out
    assert list(tmp_path.glob("*.svg"))


def test_an_arm_may_be_evaluated_alone_and_is_called_by_its_run(plan, tmp_path: Path) -> None:
    """An average of checkpoints was never trained: it has an evaluation and no configuration."""
    run = write_run(tmp_path / "scratch" / "mean_cosine-s3", FakeRun("mean_cosine-s3", chain="rope"))
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        (run / name).unlink()
    collect(plan, tmp_path)
    results = read_results(tmp_path / "results.csv")
    assert set(zip(results["arm"], results["seed"], strict=True)) == {("mean_cosine", 3)}
    write_run(tmp_path / "scratch" / "other", FakeRun("other", chain="rope"))
    with pytest.raises(UserError, match="is called other; a study's runs are ARM-sSEED"):
        collect(plan, tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("primary: 3", "is no plan of a study"),
    (PLAN.replace("regime: scratch,", "regime: other,"), "base.regime must be one of scratch, continued"),
    (PLAN.replace("difference: 5", "difference: -1"), "primary.difference=-1.0 must be positive"),
])  # fmt: skip
def test_plans_that_do_not_hold(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.yaml")


def test_a_cell_twice_is_refused(tmp_path: Path) -> None:
    table = numbers({0: 99.0})
    pd.concat([table, table.iloc[[1]]]).to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(ValueError, match=r"has .*'seed': 0.* twice"):
        read_results(tmp_path / "results.csv")


@pytest.mark.parametrize("regime", ["scratch", "continued"])
def test_the_recipes_runs_record_the_family_of_its_plan(regime: str) -> None:
    plan = read_plan(RECIPE)
    run = composed("train", f"+experiment=extrapolation/{regime}", "rope.name=arm", "trainer.seed=3")
    assert run.primary.pairs == plan.primary.pairs
    assert run.primary.length == plan.regimes[regime].lengths
    for name in ("task", "metric", "test_time_scaling", "difference"):
        assert getattr(run.primary, name) == getattr(plan.primary, name)
    assert run.data.sequence_length == plan.regimes[regime].trained
    assert run.run_dir.endswith(f"{plan.regimes[regime].runs}/arm-s3")


def test_the_larger_size_has_the_plan_of_the_smaller() -> None:
    """Four times the parameters, as its model file says: embedding, and of each layer attention, MLP and norms."""
    plan, large = read_plan(RECIPE), read_plan(RECIPE.with_name("plan_large.yaml"))
    for regime in large.regimes.values():
        regime.runs = regime.runs.replace("_large/", "_small/")
    assert replace(large, seeds=plan.seeds) == plan
    small, wide = (composed("plan", f"model={name}").model.architecture for name in ("demo", "demo_large"))
    counts = []
    for model in (small, wide):
        width, mlp = model["hidden_size"], model["intermediate_size"]
        assert model["num_attention_heads"] * model["head_dim"] == width
        assert model["initializer_range"] == pytest.approx(width**-0.5, rel=0.01)
        layer = 4 * width**2 + 3 * width * mlp + 2 * width
        counts.append(model["vocab_size"] * width + model["num_hidden_layers"] * layer + width)
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.05)


def test_schedules_are_compared_under_the_familys_number() -> None:
    plan, schedules = read_plan(RECIPE), read_plan(RECIPE.with_name("plan_schedules.yaml"))
    assert replace(schedules.primary, pairs=plan.primary.pairs) == plan.primary
    assert replace(schedules.base, arm="rope") == plan.base
    (regime,) = schedules.regimes.values()
    assert replace(regime, runs=plan.regimes["scratch"].runs) == plan.regimes["scratch"]


def test_the_recipes_page_shows_the_decisions_of_its_results() -> None:
    results, page = read_results(RECIPE.with_name("results.csv")), RECIPE.with_name("README.md").read_text()
    (decisions, _) = study_sections(read_plan(RECIPE), results)
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()]
    for block in decisions.blocks:
        for name, cells in block.rows:
            words = [" ".join(part for part in (cell.main, cell.detail) if part) or "-" for cell in cells]
            assert [name, *words] in shown
