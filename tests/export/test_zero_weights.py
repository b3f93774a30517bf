"""Checkpoints of every stage and of several ranks give the masters that DeepSpeed's own tool gathers."""

import json
import shutil

import pytest
import torch
from ranks import run_ranks, tiny_arguments

from ropewalk.export import resolve_checkpoint, verify_export
from ropewalk.export.source import committed_checkpoint
from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.files import blake3_of
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


# Two parameters, a = [[0, 1], [2, 3]] and b = [10 ... 14], over three ranks; -1 is padding.
LAYOUTS = {
    3: [[0, 1, 10, 11], [2, 3, 12, 13], [-1, -1, 14, -1]],  # each parameter in three parts
    2: [[0, 1, 2, 3], [10, 11, 12, 13], [14, -1, -1, -1]],  # end to end
}


def write_checkpoint(root, stage, *, ranks=LAYOUTS, count=3, **state):
    """The files of a stage as DeepSpeed lays them out; the tests above hold the layout against the real engine."""
    zero = root / "run" / "checkpoints" / "step-00000001" / "zero"
    zero.mkdir(parents=True)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for i, values in enumerate(ranks[stage]):
        optimizer = {"partition_count": count if stage == 3 else [count], key: [torch.tensor(values).float()]}
        torch.save({"optimizer_state_dict": optimizer}, zero / f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt")
    shapes = {"lm.a": torch.Size([2, 2]), "lm.b": torch.Size([5])}
    torch.save({"param_shapes": [shapes], **state}, zero / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    files = {f"zero/{path.name}": {"bytes": path.stat().st_size, "blake3": blake3_of(path)} for path in zero.iterdir()}
    (zero.parent / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": files}))
    return zero.parent


@pytest.mark.parametrize("stage", LAYOUTS)
def test_parameters_across_ranks_and_padding(tmp_path, stage):
    weights = ZeroWeights(write_checkpoint(tmp_path, stage), tied=False)
    assert {name: weight.tolist() for name, weight in weights.items()} == {
        "a": [[0, 1], [2, 3]], "b": [10, 11, 12, 13, 14]
    }  # fmt: skip
    assert weights.gather("b", torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("stage", "changes", "message"), [
    (3, {"ranks": {3: [[0, 1, 10, 11], [2, 3, 12, 13], [-1, -1, 14]]}}, r"hold \[4, 4, 3\] weights each, the model 4"),
    (2, {"ranks": {2: [[0, 1, 2], [3, 10, 11], [12, 13]]}}, "hold 8 weights of a group that has 9: not whole"),
    (3, {"count": 4}, "was saved by 4 ranks but holds the shards of 3"),
    (2, {"frozen_param_shapes": {"lm.c": torch.Size([2])}}, "1 parameters were frozen"),
])  # fmt: skip
def test_what_is_not_whole_is_refused(tmp_path, stage, changes, message):
    with pytest.raises(ValueError, match=message):
        ZeroWeights(write_checkpoint(tmp_path, stage, **changes), tied=False)
