"""A run goes on with another number of ranks, or of ranks that share a row: the same batches, the same losses."""

import shutil

import pytest
import torch
from ranks import run_ranks, start_ranks, tiny_arguments

from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint

SIZE = ["trainer.max_steps=6", "trainer.checkpoint_every=3", "deepspeed.param_persistence_threshold=0"]


@pytest.mark.slow
def test_two_ranks_go_on_as_one_and_as_four(store_64, tmp_path):
    straight = tmp_path / "straight"
    run_ranks(2, straight / "logs", tiny_arguments(store_64, straight, *SIZE))
    rows = read_metrics(straight)
    assert len(rows) == 6
    shutil.rmtree(RunDirectory(straight).checkpoint(6))
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
