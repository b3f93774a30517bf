"""What fits, the smallest way to make it fit, and the changes that are offered where it does not."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import alone_environment, composed

from ropewalk.cluster.planner import make_plan, memory, print_plan
from ropewalk.cluster.planner.fit import Capacity, sequence_degrees
from ropewalk.cluster.planner.memory import GIB, Allowances
from ropewalk.cluster.planner.plan import setting_of
from ropewalk.config import CONFIG_DIR
from ropewalk.config.rules import validate_train
from ropewalk.config.train import PlanConfig, TrainConfig


def planned(*overrides):
    return make_plan(composed("plan", *overrides))


def test_cope20_fits_on_four_nodes():
    plan = planned("+experiment=cope20", "cluster=h100_8", "nodes=4")
    assert plan.fits
    assert plan.smallest == (1, 1)
    assert plan.changes == []
    assert (plan.entries["tokens_per_step"], plan.entries["accumulation_steps"]) == (4_194_304, 2)


def test_the_smallest_degree_is_the_first_that_fits():
    """At 256k one GPU does not hold a row, nor half of one; the next degree holds it."""
    plan = planned("+experiment=cope20", "data.sequence_length=262144", "parallel.sequence=8")
    degree, micro = plan.smallest
    held = [memory(plan.shape, replace(plan.setting, sequence=n)).device_total for n in (1, 2, 4, 8)]
    assert held == sorted(held, reverse=True)
    assert degree > 1
    assert micro == 1
    assert not planned("+experiment=cope20", "data.sequence_length=262144", f"parallel.sequence={degree // 2}").fits
    assert planned("+experiment=cope20", "data.sequence_length=262144", f"parallel.sequence={degree}").fits


@pytest.mark.parametrize("overrides", [
    ["+experiment=cope20", "data.sequence_length=262144"],
    ["+experiment=cope20", "trainer.activation_checkpointing=false"],
    ["+experiment=llama3_70b_64k", "nodes=8", "parallel.sequence=1"],
    ["+experiment=cope20", "trainer.micro_batch_size=8"],
    ["+experiment=cope20", "trainer.micro_batch_size=2", "data.sequence_length=524292"],  # four divide it, not eight
    ["+experiment=cope20", "deepspeed=zero1"],
])  # fmt: skip
def test_every_change_that_is_offered_fits(overrides):
    """Each set, put on the command line, makes the plan fit; none of it is needless."""
    plan = planned(*overrides)
    assert not plan.fits
    assert plan.changes
    for chosen in plan.changes:
        assert planned(*overrides, *chosen).fits
        for left_out in chosen:
            fewer = [change for change in chosen if change != left_out]
            assert not fewer or not would_fit(*overrides, *fewer)


def would_fit(*overrides):
    try:
        return planned(*overrides).fits
    except ValueError:  # the global batch does not divide
        return False


def test_what_cannot_be_mended_says_so(capsys):
    config = composed("plan", "+experiment=llama3_70b_64k", "cluster=a100_8", "parallel.sequence=1",
                      "trainer.global_batch_size=8", "data.sequence_length=4194304")  # fmt: skip
    assert print_plan(config) is False
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "no change known here would make it fit" in said


def test_degrees_share_heads_and_work():
    plan = planned("+experiment=cope20", "nodes=4")
    assert sequence_degrees(plan.shape, plan.setting, 64) == [1, 2, 4, 8, 16, 32]
    assert sequence_degrees(plan.shape, replace(plan.setting, ranks=24), 24) == [1, 2, 4, 8]  # 24 ranks: no 16
    assert sequence_degrees(plan.shape, plan.setting, 16) == [2, 4, 8, 16, 32]  # 32 ranks, 16 rows: two or more a row
    few = replace(plan.shape, heads=12, kv_heads=4)
    assert sequence_degrees(few, replace(plan.setting, ranks=12), 12) == [1, 2, 4, 12]


@pytest.mark.parametrize("length", [65538, 65540, 65541])
@pytest.mark.parametrize(("micro", "sequence"), [(1, 1), (1, 4), (2, 2), (2, 8)])
def test_a_length_is_planned_where_it_is_trained(length, micro, sequence):
    """A micro batch is one row to the ranks that share it (tests/training/test_inputs.py), so its sum must divide."""
    given = ["+experiment=cope20", f"data.sequence_length={length}", f"trainer.micro_batch_size={micro}",
             f"parallel.sequence={sequence}"]  # fmt: skip
    config = composed("plan", *given)
    if micro * length % sequence == 0:
        validate_train(config, 8)
        degree, size = make_plan(config).smallest or (1, 1)
        assert size * length % degree == 0
    else:
        for refuse in (lambda: validate_train(config, 8), lambda: make_plan(config)):
            with pytest.raises(ValueError, match=f"data.sequence_length = {micro * length} tokens do not divide over"):
                refuse()


@pytest.mark.parametrize(("overrides", "message"), [
    (["nodes=0"], "nodes=0 must be positive"),
    (["assume.utilisation=0"], "assume.utilisation=0.0 is a share of the peak"),
    (["cluster=laptop"], "trainer.device=cuda on cluster=laptop, whose device is cpu; set trainer.device=cpu"),
    (["nodes=16"], "is not a multiple of trainer.micro_batch_size=1 x world size 128"),
    (["parallel.sequence=64", "nodes=8"], "parallel.sequence=64 cannot share the model's 32 query and 8 key/value "),
    (["parallel.sequence=64", "nodes=8"], "set it to one of 1, 2, 4, 8, 16, 32"),
    (["parallel.sequence=16", "nodes=16", "trainer.global_batch_size=4"], "/ parallel.sequence=16 = 8; set it to 8"),
])  # fmt: skip
def test_a_run_that_could_not_start_is_an_error(overrides, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        planned("+experiment=cope20", *overrides)


POSITIVE = ["nodes", "data.sequence_length", "assume.hash_gb_s", *(f"cluster.{name}" for name in (
    "gpus_per_node", "gpu_memory_gib", "peak_tflops", "memory_tb_s", "nvlink_gb_s", "network_gb_s", "host_memory_gib",
    "disk_write_gb_s"))]  # fmt: skip
NOT_NEGATIVE = ["cluster.price_per_gpu_hour", "assume.step_overhead", "assume.context_gib", "assume.nccl_gib",
                "assume.fragmentation"]  # fmt: skip
WHOLE = {"nodes", "data.sequence_length", "cluster.gpus_per_node"}


@pytest.mark.parametrize(("key", "value"), [
    *((key, value) for key in POSITIVE for value in ("0", "-3", "nan") if value != "nan" or key not in WHOLE),
    *((key, value) for key in NOT_NEGATIVE for value in ("-3", "nan", "inf")),
])  # fmt: skip
def test_numbers_that_no_machine_has_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}={value}(\.0)? must be"):
        planned("+experiment=cope20", f"{key}={value}")


def test_a_length_of_the_cache_is_positive():
    with pytest.raises(ValueError, match="kv_lengths=0 must be positive"):
        planned("+experiment=cope20", "kv_lengths=[8192,0]")


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_nothing_may_be_assumed(key):
    assert planned("+experiment=cope20", f"{key}=0").fits


def test_a_number_that_no_machine_has_ends_the_command_with_one_line():
    words = [sys.executable, "scripts/plan.py", "+experiment=cope20", "cluster.disk_write_gb_s=0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=alone_environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cluster.disk_write_gb_s=0.0 must be positive and finite\n"


def test_planning_takes_what_training_takes():
    """A field of one that the other lacks would make the planner plan another run."""
    assert issubclass(PlanConfig, TrainConfig)
    shared = composed("train", "+experiment=cope20"), composed("plan", "+experiment=cope20")
    for name in TrainConfig.__dataclass_fields__:
        assert getattr(shared[0], name) == getattr(shared[1], name), name


def test_the_command_loads_no_torch():
    """An answer in two seconds: whatever torch takes to import, it is not waited for."""
    script = (
        "import runpy, sys; sys.argv = ['scripts/plan.py', '+experiment=cope20', 'print=lead_seconds']; "
        "runpy.run_path('scripts/plan.py', run_name='__main__'); "
        "assert not {'torch', 'transformers', 'deepspeed', 'pandas'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False,
                          env=alone_environment())  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) % 10 == 0


def test_the_page_and_the_file_say_the_same(tmp_path, capsys):
    output = tmp_path / "plan.json"
    config = composed("plan", "+experiment=cope20", "nodes=4", f"output={output}")
    assert print_plan(config)
    said, plan = capsys.readouterr().out, json.loads(output.read_text())
    for part, size in plan["memory"]["parts"].items():
        assert size < 2**20 or f"{part:<22} {size / 2**30:>8,.1f} GiB" in said
    assert sum(plan["memory"]["parts"].values()) == pytest.approx(plan["memory"]["device_total"])
    assert f"--signal=B:USR1@{plan['lead_seconds']}" in said
    assert plan["gpu_hours"] == pytest.approx(plan["seconds"] / 3600 * 32)
    with pytest.raises(ValueError, match=r"print=days is not an entry of a plan; use one of: fits, memory"):
        print_plan(composed("plan", "+experiment=cope20", "print=days"))


def test_a_value_that_was_asked_for_is_no_verdict(capsys):
    """A script takes the lead time of a run that does not fit as well; the page of that run ends with 1."""
    too_long = ["+experiment=cope20", "data.sequence_length=262144"]
    assert not print_plan(composed("plan", *too_long))
    capsys.readouterr()
    assert print_plan(composed("plan", *too_long, "print=fits"))
    assert json.loads(capsys.readouterr().out) is False


WAYS = {
    "all activations kept": "trainer.activation_checkpointing=false",
    "layer inputs kept": "trainer.activation_checkpointing=true",
    "layer inputs on the host": "trainer.offload_activations=true",
    "attention kept, too": "trainer.keep_attention=true",
    "logits in chunks": "trainer.loss_chunk_size=2048",
    "optimizer on the GPU": "deepspeed.offload_optimizer=false",
    "optimizer on the host": "deepspeed.offload_optimizer=true",
    **{f"ZeRO-{stage}": f"deepspeed=zero{stage}" for stage in (1, 2, 3)},
}
CONFIGURED = {"layer inputs kept", "logits in chunks", "optimizer on the GPU", "ZeRO-3"}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_what_a_plan_of_it_says(way, capsys):
    """Beside the run as it is configured stands what its plan would be with one thing held otherwise."""
    beside = planned("+experiment=cope20").ways[way]
    itself = planned("+experiment=cope20", WAYS[way])
    assert beside.device_total == itself.memory.device_total
    assert beside.host_total == itself.memory.host_total
    assert beside.fits == itself.fits
    assert beside.communication == itself.entries["communication_seconds"]
    assert print_plan(composed("plan", "+experiment=cope20", "advisory=true"))
    said = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(way))
    assert f"{beside.device_total / GIB:,.1f} GiB" in said
    assert ("does not fit" in said) != beside.fits
    assert ("(configured)" in said) == (way in CONFIGURED)


def test_the_fastest_stage_is_the_one_that_fits_and_sends_least():
    """What recipes/rope_id_1b trains under on eight GPUs; 8B fits there under ZeRO-3 alone, which sends most."""
    plan = planned("+experiment=rope_id_1b", "cluster=a100_8", "nodes=1")
    assert plan.setting.stage == 1
    assert plan.entries["fastest_stage"] == "ZeRO-1"
    large = planned("+experiment=cope20", "nodes=1")
    seconds = large.entries["communication_by_stage"]
    assert min(seconds, key=seconds.get) == "ZeRO-1"
    assert large.entries["fastest_stage"] == "ZeRO-3"


def test_all_logits_at_once_is_stock_cross_entropy():
    """No key of the trainer asks for it, but others train so."""
    plan = planned("+experiment=cope20")
    assert set(plan.ways) == {*WAYS, "all logits at once"}
    whole = memory(plan.shape, replace(plan.setting, loss_chunk=None), Allowances())
    assert plan.ways["all logits at once"].device_total == whole.device_total


@pytest.mark.parametrize("cluster", sorted(path.stem for path in (CONFIG_DIR / "cluster").glob("*.yaml")))
def test_every_cluster_composes(cluster):
    assert composed("plan", f"cluster={cluster}").cluster.name == cluster


def test_on_a_cpu_nothing_is_put_into_the_same_memory_again():
    config = composed("plan", "+experiment=smollm2/cope10", "cluster=laptop", "data.sequence_length=131072")
    plan = make_plan(config)
    assert not plan.fits
    assert "offload" not in str(plan.changes)
    assert not [name for name in plan.ways if "host" in name]
    moved = replace(setting_of(config), offload_optimizer=True, offload_activations=True)
    capacity = Capacity(config.cluster, Allowances())
    needed = memory(plan.shape, moved, capacity.allowances)
    assert needed.host_total > 0
    config.cluster.gpu_memory_gib = (needed.device_total + needed.host_total) / GIB
    config.cluster.host_memory_gib = config.cluster.gpu_memory_gib
    assert capacity.holds(plan.shape, moved)
    config.cluster.gpu_memory_gib *= 0.999
    assert not capacity.holds(plan.shape, moved)
