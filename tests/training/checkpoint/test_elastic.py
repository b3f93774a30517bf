"""Every ZeRO stage trains the same model, and goes on from another's checkpoint with another number of ranks."""

import shutil

import pytest
import torch
from helpers import composed
from ranks import run_ranks, tiny_arguments

from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, train

SIZE = ["trainer.max_steps=6", "trainer.checkpoint_every=3", "deepspeed.param_persistence_threshold=0"]
STAGES = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def by_two(store_64, tmp_path_factory):
    """Six steps of two ranks under each stage, saved after the third and the sixth."""
    runs = {stage: tmp_path_factory.mktemp(stage) / "run" for stage in STAGES}
    for stage, run_dir in runs.items():
        run_ranks(2, run_dir / "logs", tiny_arguments(store_64, run_dir, *SIZE, f"deepspeed={stage}"))
    return runs


def stopped_at_3(run_dir, copy):
    """A copy of a run that died after its third step."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(RunDirectory(copy).checkpoint(6))
    return copy


@pytest.mark.slow
def test_the_stages_are_one_training(store_64, by_two, tmp_path):
    """Losses, gradient norms and exported weights of two ranks under each, and of one rank under two."""
    runs = dict(by_two)
    for stage in ("zero1", "zero2"):
        runs[f"{stage} of one"] = tmp_path / stage
        train(composed("train", *tiny_arguments(store_64, tmp_path / stage, *SIZE, f"deepspeed={stage}")))
    expected = read_metrics(runs["zero3"])
    weights = dict(ZeroWeights(find_checkpoint(runs["zero3"]), tied=True).items())
    for name, run_dir in runs.items():
        same(read_metrics(run_dir), expected)
        for weight, value in ZeroWeights(find_checkpoint(run_dir), tied=True).items():
            torch.testing.assert_close(value, weights[weight], rtol=1e-6, atol=2e-7, msg=f"{name}: {weight}")


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "stage"), [("zero3", "zero1"), ("zero1", "zero2"), ("zero2", "zero3")])
def test_one_rank_goes_on_from_two_under_another_stage(store_64, by_two, tmp_path, saved, stage, capsys):
    run_dir = stopped_at_3(by_two[saved], tmp_path / "run")
    train(composed("train", *tiny_arguments(store_64, run_dir, *SIZE, f"deepspeed={stage}")))
    told = capsys.readouterr().out
    assert f"step-00000003 was saved by 2 ranks with ZeRO-{saved[-1]}; 1 reads it with ZeRO-{stage[-1]}" in told
    assert "from step 3" in told
    rows = read_metrics(by_two[saved])
    assert read_metrics(run_dir)[:3] == rows[:3]
    same(read_metrics(run_dir), rows)
    settings = optimizer_groups(run_dir)
    assert [(group["weight_decay"], group["betas"]) for group in settings] == [(0.1, (0.9, 0.95)), (0.0, (0.9, 0.95))]


def optimizer_groups(run_dir):
    path = next(find_checkpoint(run_dir).rglob("*optim_states.pt"))
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]
    return state.get("optimizer_state_dict", state.get("base_optimizer_state"))["param_groups"]


@pytest.mark.slow
def test_four_ranks_go_on_from_two(store_64, by_two, tmp_path):
    """Small parameters are whole on every rank there, and were shared before."""
    run_dir = stopped_at_3(by_two["zero3"], tmp_path / "run")
    whole = "deepspeed.param_persistence_threshold=100000"
    run_ranks(4, tmp_path / "logs", tiny_arguments(store_64, run_dir, *SIZE, whole))
    same(read_metrics(run_dir), read_metrics(by_two["zero3"]))


@pytest.mark.slow
def test_the_degree_may_change(store_64, tmp_path):
    """Saved by two ranks that share rows; goes on with two that do not, and with one; losses those of one rank."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run_ranks(1, alone / "logs", tiny_arguments(store_64, alone, *SIZE))
    run_ranks(2, shared / "logs", tiny_arguments(store_64, shared, *SIZE, "parallel.sequence=2"))
    expected = read_metrics(alone)
    same(read_metrics(shared), expected)
    assert read_metrics(shared)[0]["work_imbalance"] == 1.0  # one group does all of it
    shutil.rmtree(RunDirectory(shared).checkpoint(6))
    for world_size in (2, 1):
        run_dir = shutil.copytree(shared, tmp_path / f"ranks{world_size}")
        run_ranks(world_size, run_dir / "logs", tiny_arguments(store_64, run_dir, *SIZE))
        assert "from step 3" in (run_dir / "logs" / "rank0.log").read_text()
        same(read_metrics(run_dir), expected)


def same(found, expected):
    """Whatever is a sum over the global batch is equal to fp32 rounding."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for key in one:
            if key.startswith(("loss", "tokens/")) or key in ("tokens", "grad_norm", "learning_rate"):
                assert one[key] == pytest.approx(other[key], rel=1e-5), key
