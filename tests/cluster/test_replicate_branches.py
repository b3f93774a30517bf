"""Replicates that are started, seeds that are planned, and what is refused before either."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from helpers import TINY, composed, tiny_run

from ropewalk.cluster.planner import make_plan
from ropewalk.cluster.replicate_branches import _run, branches_of, noise
from ropewalk.runs.directory import RunDirectory
from ropewalk.training import train

PLANNED = ["+experiment=demo/rope", "cluster=laptop", "model.path=x"]
BRANCH = ["+experiment=demo/rope", "start_from.run=R", "evaluation.documents=D", "trainer.max_steps=6", "run_name=r"]


@pytest.mark.parametrize(("changes", "branches"), [
    (["replicate=seed", "trainer.seed=4"], {"r-seed4": "trainer.seed=4", "r-seed5": "trainer.seed=5",
                                           "r-seed6": "trainer.seed=6"}),
    (["replicate=data_order", "branches=2"], {"r-data_order0": "data.order_seed=0",
                                              "r-data_order1": "data.order_seed=1"}),
    (["replicate=data_order", "branches=2", "data.order_seed=7"], {"r-data_order7": "data.order_seed=7",
                                                                   "r-data_order8": "data.order_seed=8"}),
    (["replicate=horizon", "branches=2"], {"r-horizon6": "trainer.max_steps=6", "r-horizon12": "trainer.max_steps=12"}),
    (["replicate=horizon", "horizons=[6,60]"], {"r-horizon6": "trainer.max_steps=6",
                                                "r-horizon60": "trainer.max_steps=60"}),
])  # fmt: skip
def test_branches_differ_in_one_key(changes: list[str], branches: dict[str, str]) -> None:
    found = branches_of(composed("noise", *BRANCH, *changes))
    assert {name: own[0] for name, own in found.items()} == branches
    assert {own[1] for own in found.values()} == {"evaluation.every=6"}


@pytest.mark.parametrize(("changes", "message"), [
    (["replicate=seed", "branches=1"], r"replicate=seed has the branches \[0\]; it takes two or more"),
    (["replicate=horizon", "horizons=[3,6]"], r"branches \[3, 6\]; .*no horizon below trainer.max_steps=6"),
    (["replicate=sede"], "replicate=sede is not known; use one of: seed, data_order, horizon"),
    (["replicate=horizon", "horizons=[60,120]", "trainer.warmup_ratio=0", "trainer.decay_ratio=0.5"],
     "horizons=60 and 120 have the same learning rate in all 6 steps that are trained"),
    (["replicate=seed", "evaluation.documents=null"], "evaluation.documents is not set, so no branch"),
    (["replicate=seed", "model.path=null", "start_from.run=null"], "this run starts from random weights"),
])  # fmt: skip
def test_branches_that_could_not_be_compared_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        branches_of(composed("noise", *BRANCH, *changes))


@pytest.mark.parametrize(("changes", "message"), [
    ([], "none of runs, replicate and spread set; say one"),
    (["runs=[a]", "spread=1"], "runs, spread set; say one"),
    (["runs=[a,b]", "seeds=[1]"], r"seeds=1 is too few for a spread"),
    (["spread=0.1"], r"spread=0.1 without difference: a plan needs"),
    (["spread=-1", "difference=1"], r"spread=-1.0 must be 0 or more"),
])  # fmt: skip
def test_one_thing_is_asked_for(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise(composed("noise", *PLANNED, *changes), [])


def test_a_plan_counts_seeds_and_the_planners_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["spread=0.02", "difference=0.02", "pairs=2", "seeds=[5]", f"output={tmp_path}"]
    noise(composed("noise", *PLANNED, *asked), [])
    plan = json.loads((tmp_path / "noise.json").read_text())
    hours, price = (make_plan(composed("plan", *PLANNED)).entries[name] for name in ("gpu_hours", "cost"))
    few, enough = plan["plan"]
    assert (few["seeds"], few["smallest_p"]) == (5, 0.125)  # 2^-4, over two pairs
    assert few["gpu_hours"] == pytest.approx(3 * 5 * hours)  # two arms and the one that both are compared with
    assert few["cost"] == pytest.approx(3 * 5 * price)
    assert enough["seeds"] == plan["seeds_to_decide"]
    assert enough["detectable"] <= 0.02
    assert enough["power_no_difference"] >= 0.8
    out = capsys.readouterr().out
    assert f"{plan['seeds_to_decide']} seeds an arm decide 0.02 at a spread of 0.02, 2 pairs, power 80%" in out
    assert "with so few seeds nothing can be decided" in out


@pytest.mark.slow
def test_branches_start_from_one_checkpoint_and_their_noise_is_measured(store_64, fixture_corpus, tmp_path) -> None:
    start = tmp_path / "start"
    train(tiny_run(store_64, start, "trainer.max_steps=2"))
    given = [
        "+experiment=demo/pretrain", "tracker=none", "data=packed", f"data.store={store_64.root}",
        "data.sequence_length=64", f"start_from.run={start}", f"paths.output_dir={tmp_path}", "run_name=branch",
        "trainer.max_steps=2", "trainer.global_batch_size=4", "trainer.micro_batch_size=2", "rope=inherited",
        "model.head_dim=16", "model.pretrained_length=64",
        f"+model.architecture={{{','.join(f'{k}: {v}' for k, v in TINY.items())}}}",
        f"evaluation.documents={fixture_corpus}", "evaluation.max_documents=4", "evaluation.needle.samples=0",
    ]  # fmt: skip
    own = ["replicate=horizon", "horizons=[2,20]", f"output={tmp_path}/noise"]
    noise(composed("noise", *given, *own), [*given, *own])
    for steps in (2, 20):
        run = RunDirectory(tmp_path / f"branch-horizon{steps}")
        assert run.committed_step() == 2
        assert json.loads(run.start_record.read_text())["run"] == str(start)
    table = pd.read_csv(tmp_path / "noise" / "noise.csv")
    row = table[table["task"] == "loss_at_length"].iloc[0]
    assert (row["replicated"], row["runs"], row["items"]) == ("horizon", 2, 4)
    assert row["spread"] > 0  # the learning rates of the second step differ
    noise(composed("noise", *given, *own), [*given, *own, "trainer.bogus=1"])  # nothing is left to start


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)  # longer than subprocess.run waits after Ctrl-C
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "begun").touch()
time.sleep(20)
"""


def test_a_branch_may_save_when_the_command_is_interrupted(tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        _run([sys.executable, "-c", SAVES, str(tmp_path)])
    assert (tmp_path / "saved").exists()
