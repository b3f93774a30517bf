"""Checkpoints of every stage and of several ranks give the masters that DeepSpeed's own tool gathers."""

import shutil

import pytest
import torch
from ranks import run_ranks, tiny_arguments

from ropewalk.export import resolve_checkpoint, verify_export
from ropewalk.export.source import committed_checkpoint
from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.training import find_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks", "dtype"), [(1, 2, "bfloat16"), (2, 3, "float32"), (3, 3, "bfloat16")])
def test_weights_of_a_stage(store_64, tmp_path, stage, ranks, dtype):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    run_ranks(ranks, tmp_path / "logs", tiny_arguments(
        store_64, tmp_path, "trainer.max_steps=1", "trainer.checkpoint_every=1", "trainer.micro_batch_size=1",
        f"trainer.global_batch_size={ranks}", f"deepspeed.stage={stage}", f"trainer.dtype={dtype}",
    ))  # fmt: skip
    checkpoint = find_checkpoint(tmp_path)
    weights = ZeroWeights(checkpoint, tied=True)
    if (stage, dtype) == (1, "bfloat16"):
        with pytest.raises(ValueError, match="is not a zero checkpoint"):  # once it is read, the tool may do for all
            get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="zero", lazy_mode=True)
        # the rounded copy that the ranks compute with is in their model states
        state = torch.load(checkpoint / "zero" / "mp_rank_00_model_states.pt", weights_only=False)
        expected = {name: weight for name, weight in state["module"].items() if "rotary" not in name}
        found = {name: weights.gather(name, torch.bfloat16) for name in weights}
        assert any(not torch.equal(weights[name], weight.float()) for name, weight in found.items())  # masters
    else:
        expected = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="zero")
        expected = {name: weight for name, weight in expected.items() if "rotary" not in name}
        found = dict(weights.items())
    assert {f"lm.{name}" for name in found} == set(expected) - {"lm.lm_head.weight"}  # tied
    assert all(torch.equal(weight, expected[f"lm.{name}"]) for name, weight in found.items())
    assert verify_export(checkpoint, resolve_checkpoint(checkpoint)).passed


def test_what_is_no_checkpoint_says_what_it_is(tmp_path):
    (tmp_path / "global_step10").mkdir()
    with pytest.raises(ValueError, match=r"it is DeepSpeed's, of another trainer: convert it"):
        committed_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds a checkpoint without manifest.json: its save was cut short"):
        committed_checkpoint(tmp_path)


def test_a_missing_shard_is_named(train_arm, tmp_path):
    run = shutil.copytree(train_arm([]), tmp_path / "run")
    next(find_checkpoint(run).rglob("*optim_states.pt")).unlink()
    with pytest.raises(ValueError, match=r"optim_states.pt is missing, but the manifest lists it"):
        ZeroWeights(find_checkpoint(run), tied=True)
