"""A run saved on two ranks goes on with one and with four: the same batches, losses equal to fp32 rounding."""

import shutil

import pytest
import torch
from ranks import run_ranks, start_ranks, tiny_arguments

from ropewalk.training import find_checkpoint
from ropewalk.training.checkpoint import checkpoint_directory
from ropewalk.training.record import read_metrics

SIZE = ["trainer.max_steps=6", "trainer.checkpoint_every=3", "deepspeed.param_persistence_threshold=0"]


@pytest.mark.slow
def test_two_ranks_go_on_as_one_and_as_four(store_64, tmp_path):
    straight = tmp_path / "straight"
    run_ranks(2, straight / "logs", tiny_arguments(store_64, straight, *SIZE))
    rows = read_metrics(straight)
    assert len(rows) == 6
    shutil.rmtree(checkpoint_directory(straight, 6))
    conversions = []
    for world_size in (4, 1):
        run_dir = shutil.copytree(straight, tmp_path / f"ranks{world_size}")
        if conversions:  # made once
            shutil.copytree(conversions[0], run_dir / "checkpoints" / conversions[0].name)
        run_ranks(world_size, run_dir / "logs", tiny_arguments(store_64, run_dir, *SIZE))
        told = (run_dir / "logs" / "rank0.log").read_text()
        assert ("was saved by another number of ranks: converting it" in told) == (not conversions)
        assert "from step 3" in told
        found = read_metrics(run_dir)
        assert found[:3] == rows[:3]
        for name in ("loss", "grad_norm"):
            assert [row[name] for row in found[3:]] == pytest.approx([row[name] for row in rows[3:]], rel=1e-6)
        assert [row["learning_rate"] for row in found] == [row["learning_rate"] for row in rows]
        conversions += run_dir.glob("checkpoints/universal-*")
    groups = optimizer_groups(tmp_path / "ranks1")
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]  # DeepSpeed gives all groups the first one's


def optimizer_groups(run_dir):
    path = next(find_checkpoint(run_dir).rglob("*optim_states.pt"))
    return torch.load(path, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]


@pytest.mark.slow
def test_lower_stages_refuse_another_number_of_ranks(store_64, tmp_path):
    more = [*SIZE, "trainer.stop_after=3", "deepspeed.stage=2"]
    arguments = tiny_arguments(store_64, tmp_path, *more)
    run_ranks(2, tmp_path / "logs", arguments)
    with start_ranks(1, tmp_path / "alone", arguments) as alone:
        assert alone.wait() == [2]
        assert "needs deepspeed.stage=3, this run has deepspeed.stage=2" in alone.output()
