"""The noise floor on run directories whose numbers are known: seeds, items, pairs, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report.fake_runs import FakeRun, write_fake_evaluation, write_run, write_table

from ropewalk.report.noise.noise_floor import noise_section, noise_table, write_noise
from ropewalk.report.noise.replicates import find_replicates
from ropewalk.report.noise.seed_statistics import variance_components
from ropewalk.report.runs import Run, load_run, load_runs
from ropewalk.report.section import as_text

COPE = "abf(theta=1e5) > cope(clip=11)"
OFFSETS = {"rope": [0.00, 0.02, 0.01, 0.05], "cope": [-0.10, -0.06, -0.12, -0.04]}


def made(root: Path, fakes: list[FakeRun]) -> list[Run]:
    return [load_run(write_run(root / fake.name, fake)) for fake in fakes]


def seeds(**more: object) -> list[FakeRun]:
    rope = [FakeRun(f"rope-s{i}", seed=i, offset=value, **more) for i, value in enumerate(OFFSETS["rope"])]
    cope = [FakeRun(f"cope-s{i}", chain=COPE, seed=i, offset=value) for i, value in enumerate(OFFSETS["cope"])]
    return rope + cope


def rows_of(table: pd.DataFrame, arm: str, against: str = "", length: int = 2048) -> pd.Series:
    rows = table[(table["arm"] == arm) & (table["against"] == against) & (table["task"] == "loss_at_length")]
    (row,) = rows[rows["context_length"] == length].to_dict("records")
    return row


def test_spread_of_seeds_and_of_their_paired_differences(tmp_path: Path) -> None:
    table = noise_table(find_replicates(made(tmp_path, seeds())), [4], 0.1)
    assert set(table["replicated"]) == {"seed"}
    rope, pair = rows_of(table, "abf"), rows_of(table, "cope", "abf")
    assert (rope["runs"], rope["spread"]) == (4, pytest.approx(np.std(OFFSETS["rope"], ddof=1)))
    differences = np.subtract(OFFSETS["cope"], OFFSETS["rope"])
    assert pair["value"] == pytest.approx(differences.mean())
    assert pair["spread"] == pytest.approx(differences.std(ddof=1))
    variances = [np.var(values, ddof=1) for values in OFFSETS.values()]
    assert pair["unpaired_spread"] == pytest.approx(math.sqrt(sum(variances)))
    assert pair["correlation"] == pytest.approx(np.corrcoef(*OFFSETS.values())[0, 1])
    assert pair["detectable_4"] < rope["detectable_4"] * 3
    assert pair["seeds_to_decide"] >= 6
    # 16 documents lie (k - 7.5) / 10 apart in every run, and seeds move all of them alike: nothing is left over
    assert (rope["items"], rope["seed_sd"]) == (16, pytest.approx(rope["spread"]))
    assert rope["item_sd"] == pytest.approx(np.std(np.arange(16) / 10, ddof=1))
    assert rope["rest_sd"] == pytest.approx(0, abs=1e-7)
    text = as_text(noise_section(table))
    assert "abf: 4 runs that differ in their seed" in text
    assert "cope less abf, paired: 4 runs" in text


def test_items_and_seeds_are_told_apart(tmp_path: Path) -> None:
    """Document k of seed s moves by jitter (-1)^k: no run's mean changes, and the rest does."""
    fakes = [FakeRun(f"r{i}", seed=i, jitter=value) for i, value in enumerate((0.3, -0.3, 0.0))]
    row = rows_of(noise_table(find_replicates(made(tmp_path, fakes)), [3]), "abf")
    assert (row["spread"], row["seed_sd"]) == (pytest.approx(0, abs=1e-9), 0)
    expected = 16 * (0.3**2 + 0.3**2) / (2 * 15)  # residuals jitter x (-1)^k over (3 - 1) x (16 - 1)
    assert row["rest_sd"] == pytest.approx(math.sqrt(expected))


def test_each_test_time_setting_is_a_number_of_its_own(tmp_path: Path) -> None:
    """Past the trained length both settings were measured; up to it they have their numbers in common."""
    for seed, offset in enumerate((0.0, 0.1)):
        fake = FakeRun(f"r{seed}", seed=seed, offset=offset)
        run = write_run(tmp_path / fake.name, fake)
        write_fake_evaluation(run / "evaluation-none", fake, "none")
    runs = load_runs([str(tmp_path / f"r{seed}") for seed in range(2)])
    assert len(runs) == 4
    table = noise_table(find_replicates(runs), [3])
    of_loss = table[table["task"] == "loss_at_length"]
    assert sorted(zip(of_loss["context_length"], of_loss["test_time_scaling"] != "none", strict=True)) == [
        (512, False), (1024, False), (2048, False), (4096, False), (4096, True), (8192, False), (8192, True),
    ]  # fmt: skip
    assert set(of_loss["items"]) == {16}
    assert of_loss["spread"].to_list() == pytest.approx([0.1 / math.sqrt(2)] * 7)


def test_answers_are_items_by_their_samples(tmp_path: Path) -> None:
    """Three answers of two tokens: 1, 2, 3 nats a token with seed 0, 2, 4, 3 with seed 1; exact twice, and once."""
    nll, exact, file = (
        ([2, 4, 6], [4, 8, 6]),
        ([True, True, False], [False, False, True]),
        "cells/ropewalk/answers/512.none",
    )
    for seed in (0, 1):
        run = write_run(tmp_path / f"r{seed}", FakeRun(f"r{seed}", seed=seed))
        about = {
            "context_length": 512,
            "n": 3,
            "source_file": f"{file}.json",
            "task": "answers",
            "chain": "abf(theta=1e5)",
        }
        about |= {"run": f"r{seed}", "method": f"r{seed}", "harness": "ropewalk", "test_time_scaling": "none"}
        about |= {"harness_version": "1"}
        values = {"answer_nll": sum(nll[seed]) / 6, "exact_match": 100 * sum(exact[seed]) / 3}
        write_table(run / "evaluation", [about | {"metric": name, "value": value} for name, value in values.items()])
        samples = [{"nll": n, "tokens": 2, "exact": e} for n, e in zip(nll[seed], exact[seed], strict=True)]
        path = run / "evaluation" / f"{file}.samples.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    table = noise_table(find_replicates([load_run(tmp_path / f"r{seed}") for seed in (0, 1)]), [3])
    rows = table[table["task"] == "answers"].set_index("metric")
    for metric, by_item in (("answer_nll", np.array(nll) / 2), ("exact_match", 100.0 * np.array(exact))):
        parts = variance_components(by_item)
        row = rows.loc[metric]
        assert (row["items"], row["runs"]) == (3, 2)
        assert row["value"] == pytest.approx(by_item.mean())
        assert (row["seed_sd"], row["item_sd"], row["rest_sd"]) == pytest.approx((parts.seeds, parts.items, parts.rest))


def horizons(*steps: int, seed: int = 0) -> list[FakeRun]:
    return [FakeRun(f"h{n}-s{seed}", seed=seed, steps=44, offset=n / 1000) for n in steps]


def with_horizon(run: Run, steps: int) -> Run:
    config = run.directory / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 44", f"max_steps: {steps}"))
    return load_run(run.directory)


def test_seeds_and_horizons_are_never_pooled(tmp_path: Path) -> None:
    fakes = [*horizons(44, 88, 132), FakeRun("h44-s1", seed=1, offset=0.2)]
    runs = [with_horizon(run, int(run.name[1:].partition("-")[0])) for run in made(tmp_path, fakes)]
    groups = find_replicates(runs)
    assert {group.kind: sorted(run.name for run in group.runs.values()) for group in groups} == {
        "seed": ["h44-s0", "h44-s1"], "horizon": ["h132-s0", "h44-s0", "h88-s0"],
    }  # fmt: skip
    table = noise_table(groups, [3])
    spreads = {row["replicated"]: row["spread"] for row in table.to_dict("records") if row["context_length"] == 512
               and row["task"] == "loss_at_length"}  # fmt: skip
    assert spreads == {"seed": pytest.approx(0.156 / math.sqrt(2)), "horizon": pytest.approx(0.044)}


@pytest.mark.parametrize(("old", "new", "named"), [
    ("learning_rate: 1.0e-3", "learning_rate: 2.0e-3", "trainer.learning_rate, trainer.seed"),
    ("mixture: {long: 0.7, retrieval: 0.3}", "mixture: {long: 0.3, retrieval: 0.7}",
     "data.mixture.long, data.mixture.retrieval, trainer.seed"),
])  # fmt: skip
def test_runs_that_differ_in_more_are_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    runs = made(tmp_path, [FakeRun(f"r{i}", seed=i) for i in range(3)])
    config = tmp_path / "r2" / "config.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"r2 differs from r\d in {named}, and noise is measured between runs that"):
        find_replicates([*runs[:2], load_run(tmp_path / "r2")])


def test_other_steps_other_items_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    short = made(tmp_path / "short", [FakeRun("a"), FakeRun("b", seed=1, steps=22)])
    with pytest.raises(ValueError, match=r"b differs from a in steps trained, trainer.seed|a differs from b in steps"):
        find_replicates(short)
    items = made(tmp_path / "items", [FakeRun("a"), FakeRun("b", seed=1)])
    record = tmp_path / "items" / "b" / "evaluation" / "evaluation.json"
    record.write_text(record.read_text().replace("{", '{"document_prefixes": {"d0": "ff"}, ', 1))
    with pytest.raises(ValueError, match=r"in items of the evaluation, trainer\.seed"):
        find_replicates([items[0], load_run(items[1].directory)])
    with pytest.raises(ValueError, match="a and b differ in nothing that was recorded"):
        find_replicates(made(tmp_path / "same", [FakeRun("a"), FakeRun("b")]))
    with pytest.raises(ValueError, match="runs has a alone"):
        find_replicates(made(tmp_path / "alone", [FakeRun("a")]))


def test_the_last_evaluation_inside_training_counts_if_there_is_no_other(tmp_path: Path) -> None:
    for i, (early, late) in enumerate([(0.5, 0.0), (0.9, 0.1)]):
        fake = FakeRun(f"r{i}", seed=i, offset=late)
        run = write_run(tmp_path / fake.name, fake)
        (run / "evaluation").rename(run / "aside")
        for step, offset in ((22, early), (44, late)):
            write_fake_evaluation(run / "evaluations" / f"step-{step:08d}", FakeRun(fake.name, offset=offset))
    table = noise_table(find_replicates([load_run(tmp_path / f"r{i}") for i in range(2)]), [3])
    assert rows_of(table, "abf")["spread"] == pytest.approx(0.1 / math.sqrt(2))
    assert rows_of(table, "abf")["items"] == 16
    record = run / "evaluations" / "step-00000044" / "evaluation.json"
    record.write_text(record.read_text().replace("{", '{"step": 40, ', 1))
    with pytest.raises(ValueError, match=r"in step of the evaluation, trainer\.seed"):
        find_replicates([load_run(tmp_path / f"r{i}") for i in range(2)])


def test_files_hold_the_table_with_null_for_what_is_unknown(tmp_path: Path) -> None:
    table = noise_table(find_replicates(made(tmp_path, seeds())), [3, 5])
    write_noise(table, tmp_path / "out")
    read = pd.read_csv(tmp_path / "out" / "noise.csv", keep_default_na=False, na_values=[""])
    assert read["detectable_5"].to_list() == pytest.approx(table["detectable_5"].to_list())
    records = json.loads((tmp_path / "out" / "noise.json").read_text())
    assert len(records) == len(table)
    assert records[0]["correlation"] is None
