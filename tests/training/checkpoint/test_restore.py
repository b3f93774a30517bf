"""Shards as DeepSpeed lays them out, whole or not, and where an engine's AdamW finds what is read from them."""

from types import SimpleNamespace

import pytest
import torch

from ropewalk.training.checkpoint.restore import MASTER, Shards, load_checkpoint
from ropewalk.training.distributed import start_processes

# Two parameters, a = [[0, 1], [2, 3]] and b = [10 ... 14], over three ranks; -1 is padding.
LAYOUTS = {
    3: [[0, 1, 10, 11], [2, 3, 12, 13], [-1, -1, 14, -1]],  # each parameter in three parts
    2: [[0, 1, 2, 3], [10, 11, 12, 13], [14, -1, -1, -1]],  # end to end
}
KEYS = {3: ("fp32_flat_groups", "optimizer_state_dict"), 2: ("single_partition_of_fp32_groups", "base_optimizer_state")}


def write_shards(directory, stage, *, ranks=LAYOUTS, count=3, steps=7.0, **state):
    """The files of a stage as DeepSpeed lays them out; its moments are the weights, doubled and squared."""
    directory.mkdir()
    masters, optimizer = KEYS[stage]
    for i, values in enumerate(ranks[stage]):
        flat = torch.tensor(values).float()
        adam = {0: {"step": torch.tensor(steps), "exp_avg": 2 * flat, "exp_avg_sq": flat**2}} if steps else {}
        shard = {"partition_count": count if stage == 3 else [count], masters: [flat], optimizer: {"state": adam}}
        torch.save({"optimizer_state_dict": shard}, directory / f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt")
    shapes = {"lm.a": torch.Size([2, 2]), "lm.b": torch.Size([5])}
    torch.save({"param_shapes": [shapes], "global_steps": 9, **state}, directory / "mp_rank_00_model_states.pt")
    return directory


@pytest.mark.parametrize("stage", LAYOUTS)
def test_parameters_across_ranks_and_padding(tmp_path, stage):
    start_processes("cpu")
    shards = Shards(write_shards(tmp_path / "zero", stage))
    assert {name: tuple(shape) for name, shape in shards.shapes.items()} == {"lm.a": (2, 2), "lm.b": (5,)}
    assert (shards.adam_steps, shards.counters) == (7.0, {"global_steps": 9})
    out = torch.empty(5, dtype=torch.bfloat16)
    shards.read("lm.b", MASTER, out)
    assert out.tolist() == [10, 11, 12, 13, 14]
    for kind, value in (("exp_avg", lambda x: 2 * x), ("exp_avg_sq", lambda x: x * x)):
        out = torch.empty(3)
        shards.read("lm.b", kind, out, 1)
        assert out.tolist() == [value(x) for x in (11, 12, 13)]


@pytest.mark.parametrize(("stage", "changes", "message"), [
    (3, {"ranks": {3: [[0, 1, 10, 11], [2, 3, 12, 13], [-1, -1, 14]]}}, r"hold \[4, 4, 3\] weights each, the model 4"),
    (2, {"ranks": {2: [[0, 1, 2], [3, 10, 11], [12, 13]]}}, "hold 8 weights of a group that has 9: not whole"),
    (3, {"count": 4}, "was saved by 4 ranks but holds the shards of 3"),
])  # fmt: skip
def test_what_is_not_whole_is_refused(tmp_path, stage, changes, message):
    start_processes("cpu")
    with pytest.raises(ValueError, match=message):
        Shards(write_shards(tmp_path / "zero", stage, **changes))


def engine_of(device, *, fused):
    """An engine of one ZeRO-2 rank as far as a load sees it; ``meta`` stands for the GPU that holds the weights."""
    weights = {"lm.b": torch.nn.Parameter(torch.zeros(5)), "lm.a": torch.nn.Parameter(torch.zeros(2, 2))}
    flats = [torch.full((6,), -1.0, device=device), torch.full((4,), -1.0, device=device)]  # one element of padding
    adam = torch.optim.AdamW([{"params": [flat.requires_grad_()]} for flat in flats], fused=fused, betas=(0.1, 0.2))
    optimizer = SimpleNamespace(
        dp_process_group=None, round_robin_bit16_groups=[[weight] for weight in weights.values()], optimizer=adam,
        single_partition_of_fp32_groups=flats, param_groups=adam.param_groups, update_lp_params=lambda: None,
        param_names={weight: name for name, weight in weights.items()},
    )  # fmt: skip
    module = SimpleNamespace(named_parameters=weights.items)
    return SimpleNamespace(optimizer=optimizer, module=module, zero_optimization_stage=lambda: 2)


@pytest.mark.parametrize("stage", LAYOUTS)
@pytest.mark.parametrize(("device", "fused"), [("cpu", False), ("meta", True)])
def test_adamw_finds_its_state_where_it_looks(tmp_path, stage, device, fused):
    """Three ranks of either stage saved it. A fused AdamW refuses a step count on another device than its weights."""
    start_processes("cpu")
    write_shards(tmp_path / "zero", stage)
    engine = engine_of(device, fused=fused)
    load_checkpoint(engine, tmp_path, random_state=False)
    flats, adam = engine.optimizer.single_partition_of_fp32_groups, engine.optimizer.optimizer
    states = [adam.state[flat] for flat in flats]
    assert states[0]["step"] is not states[1]["step"]  # else it would advance twice a step
    for state in states:
        assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq"), device
        )
    assert [group["betas"] for group in adam.param_groups] == [(0.1, 0.2)] * 2  # the engine's own
    assert engine.global_steps == 9
    if device == "cpu":
        assert [flat.tolist() for flat in flats] == [[10, 11, 12, 13, 14, 0], [0, 1, 2, 3]]
        assert states[0]["exp_avg"].tolist() == [20, 22, 24, 26, 28, 0]
        assert states[1]["exp_avg_sq"].tolist() == [0, 1, 4, 9]
        assert [float(state["step"]) for state in states] == [7.0, 7.0]


@pytest.mark.parametrize(("steps", "moments"), [(None, True), (7.0, False)])
def test_adamw_begins_anew_where_there_is_no_state_or_none_is_wanted(tmp_path, steps, moments):
    """A run whose every step was refused has saved none."""
    start_processes("cpu")
    write_shards(tmp_path / "zero", 2, steps=steps)
    engine = engine_of("cpu", fused=False)
    load_checkpoint(engine, tmp_path, moments=moments, random_state=False)
    assert engine.optimizer.single_partition_of_fp32_groups[1].tolist() == [0, 1, 2, 3]
    assert not engine.optimizer.optimizer.state
