"""Work, time, disk and KV cache against published figures and sums by hand."""

from dataclasses import replace

import pytest
from helpers import composed, tiny_run

from ropewalk.cluster.planner import ModelShape, Setting, lead_seconds, make_plan, shape_of
from ropewalk.cluster.planner.cost import (
    checkpoint_bytes,
    checkpoints_kept,
    communication_seconds,
    flops_per_token,
    kv_bytes,
    run_time,
    token_seconds,
)
from ropewalk.config.rules import batching
from ropewalk.config.train import AssumptionConfig, ParallelConfig
from ropewalk.training import find_checkpoint, train


@pytest.fixture(scope="module")
def config():
    return composed("plan", "+experiment=cope20", "cluster=h100_8", "nodes=4")


@pytest.fixture(scope="module")
def shape(config):
    return shape_of(config.model)


def test_flops_of_llama3_8b_at_64k(shape):
    """45.0 GFLOP a token in linear layers, 103.1 counting all pairs, 51.5 counting the causal ones."""
    found = flops_per_token(shape, 65536)
    assert [round(value / 1e9, 1) for value in (found.linear, found.full, found.causal)] == [45.0, 103.1, 51.5]


def test_a_window_counts_what_it_sees():
    """Four layers of 32 channels, three with a window of 3, over 10 tokens: 1 + 2 + 8 x 3 pairs there, else 55."""
    fields = {"model_type": "olmo3", "vocab_size": 8, "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 4, "num_attention_heads": 2, "sliding_window": 3}  # fmt: skip
    shape = ModelShape.from_config(fields, "x")
    found = flops_per_token(shape, 10)
    assert found.causal == pytest.approx(3 * 4 * 32 * (3 * 27 + 55) / 10)
    assert found.full == pytest.approx(3 * 4 * 32 * (3 * 30 + 100) / 10)
    assert kv_bytes(shape, 10) == 2 * 32 * 2 * (3 * 3 + 10)  # keys and values, bf16
    assert kv_bytes(shape, 2) == 2 * 32 * 2 * 4 * 2


def test_the_papers_hours_come_out(config, shape):
    """CoPE reports 1,996 H100-hours for 20.97B tokens, ProLong about 2,200: both within 10%, by FlashAttention-2."""
    time = run_time(shape, Setting(32, 65536), config.trainer, config.cluster, AssumptionConfig(), 2)
    assert 32 * time.training / 3600 == pytest.approx(1996, rel=0.1)
    assert 32 * time.training / 3600 == pytest.approx(2200, rel=0.1)


@pytest.mark.parametrize(("seconds", "options", "kept"), [
    (23.45, {}, False),
    (20.45, {}, True),
    (17.25, {"attention": "fa3"}, False),
    (14.65, {"attention": "fa3", "compile": True}, True),
])  # fmt: skip
def test_seconds_of_a_row_by_hand(config, shape, seconds, options, kept):
    """A 64k row of Llama-3-8B on an H100, summed up by hand from the same speeds.

    Layers' products 5.90 s and the head's 0.33; attention forward 3.04 (FlashAttention-3: 1.82), twice or once, and
    backward 9.38 (5.63); norms and the like 1.50, compiled 0.70; the loss beside its product 0.25.
    """
    trainer = replace(config.trainer, **options)
    setting = Setting(32, 65536, keep_attention=kept)
    assert 65536 * token_seconds(shape, setting, trainer, config.cluster) == pytest.approx(seconds, rel=0.01)


def test_a_cpu_goes_by_a_share_of_its_peak(shape):
    """There are no kernels of a GPU to go by."""
    laptop = composed("plan", "+experiment=demo/pretrain", "cluster=laptop")
    time = run_time(shape, Setting(1, 512, cuda=False), laptop.trainer, laptop.cluster, AssumptionConfig(), 1)
    assert time.utilisation == pytest.approx(0.28)


def test_prolongs_second_stage_takes_the_papers_hours():
    """12,200 H100-hours for 20.97B tokens at 512k, by the speeds that 64k was planned with."""
    plan = make_plan(composed("plan", "+experiment=prolong_512k", "nodes=8"))
    assert plan.entries["tokens"] == 2500 * 16 * 524288
    assert plan.entries["gpu_hours"] == pytest.approx(12_200, rel=0.05)


def test_time_by_hand(config, shape):
    """2,000 tokens/s a GPU: two micro batches of 65,536 tokens a step, and 20 checkpoints of 12 bytes a parameter."""
    per_token = sum(flops_per_token(shape, 65536).__dict__[name] for name in ("linear", "causal"))
    utilisation = 2000 * per_token / 989.4e12
    time = run_time(
        shape, Setting(32, 65536), config.trainer, config.cluster, AssumptionConfig(utilisation=utilisation), 2
    )
    assert time.tokens_per_second_per_gpu == pytest.approx(2000)
    assert time.step == pytest.approx(2 * 65536 / 2000)
    save = 12 * shape.parameters / (2e9 * 4) + 12 * shape.parameters / (1e9 * 32)
    assert time.training == pytest.approx(5000 * time.step + 20 * save)


def test_accumulation(config):
    assert batching(config, 32) == (2, 64 * 65536)
    shared = replace(config, parallel=ParallelConfig(sequence=8))
    assert batching(shared, 32).accumulation_steps == 16
    two = replace(config, trainer=replace(config.trainer, micro_batch_size=2))
    assert batching(two, 8).accumulation_steps == 4


def test_kv_cache_is_the_published_size(shape):
    """Llama-3-8B holds 128 KiB a token in bf16 (2 x 32 layers x 8 heads x 128 channels x 2 bytes)."""
    assert kv_bytes(shape, 1) == 128 * 1024
    assert kv_bytes(shape, 131072) == 16 * 2**30


def test_the_cache_is_shown_at_the_runs_own_length_too():
    """64 GiB at 524,288 tokens of 128 KiB; a length that is listed already stands once."""
    plan = make_plan(composed("plan", "+experiment=prolong_512k", "nodes=8"))
    assert list(plan.entries["kv_bytes"]) == [8192, 65536, 131072, 262144, 524288]
    assert plan.entries["kv_bytes"][524288] == 64 * 2**30
    listed = make_plan(composed("plan", "+experiment=cope20", "kv_lengths=[65536,8192]"))
    assert list(listed.entries["kv_bytes"]) == [8192, 65536]


@pytest.mark.parametrize(("every", "last", "keep_every", "kept"), [
    (None, None, None, 0), (250, None, None, 4), (300, None, None, 4), (250, 2, None, 2), (250, 2, 500, 3),
    (250, 1, 500, 2), (100, 2, 500, 3),
])  # fmt: skip
def test_checkpoints_on_disk(config, every, last, keep_every, kept):
    """1,000 steps: at multiples of ``every`` and at the end; as prune_checkpoints keeps them."""
    trainer = replace(config.trainer, max_steps=1000, checkpoint_every=every, keep_last=last, keep_every=keep_every)
    assert checkpoints_kept(trainer) == kept


def test_communication_by_hand(config, shape):
    """Two gathers of bf16 and one scatter of fp32, 8 bytes a parameter: over NVLink, or a 32nd of it over each port."""
    one_node = communication_seconds(shape, Setting(8, 65536), config.cluster, 1)
    assert one_node == pytest.approx(8 * shape.parameters * 7 / 8 / 450e9)
    four = communication_seconds(shape, Setting(32, 65536), config.cluster, 1)
    assert four == pytest.approx(max(8 * shape.parameters * 31 / 32 / 450e9, 8 * shape.parameters * 3 / 4 / 8 / 50e9))
    traded = 3 * 32 * 32768 * 2 * 2 * (4096 + 1024) / 2 / 450e9  # forward, again, backward; half goes to the other
    shared = Setting(8, 65536, sequence=2)
    assert communication_seconds(shape, shared, config.cluster, 1) == pytest.approx(one_node + traded)
    assert communication_seconds(shape, shared, config.cluster, 3) == pytest.approx(3 * (one_node + traded))


@pytest.mark.parametrize(("ranks", "sequence", "kv_heads", "sent", "in_node", "from_others"), [
    (8, 8, 8, 8, 7, 0),
    (16, 16, 8, 16, 7, 8),  # each key/value head is sent to two ranks
    (32, 32, 8, 32, 7, 24),
    (24, 12, 4, 12, 3, 8),  # the second group: four GPUs of one node, eight of the next
    (24, 3, 3, 3, 0, 2),  # the third group: two of one node, one of the next
])  # fmt: skip
def test_communication_of_shared_rows_by_hand(
    config, shape, ranks, sequence, kv_heads, sent, in_node, from_others
):  # fmt: skip
    """Queries and output, keys and values, in three passes: from the ranks of a node over NVLink, from others by port.

    A rank sends each other one of its group the same: its 1 / sequence of everything. The rank with the fewest beside
    it waits longest. Ranks past the key/value heads are sent one whole head.
    """
    shape = replace(shape, heads=2 * sequence, kv_heads=kv_heads)
    channels = 128 * 2 * (2 * sequence + sent)
    each = 3 * 32 * (72_000 // sequence) * 2 * channels / sequence
    exchange = max(each * in_node / 450e9, each * from_others / 50e9)
    alone, shared = (Setting(ranks, 72_000, sequence=n) for n in (1, sequence))
    found = [communication_seconds(shape, setting, config.cluster, 1) for setting in (alone, shared)]
    assert found[1] - found[0] == pytest.approx(exchange)


@pytest.mark.parametrize(("stage", "micro_batches", "nbytes"), [(1, 1, 10), (1, 4, 10), (2, 1, 10), (2, 4, 34)])
def test_communication_of_the_lower_stages(config, shape, stage, micro_batches, nbytes):
    """An all-reduce of fp32 gradients is twice their bytes, a step or a micro batch; the bf16 weights once a step."""
    seconds = communication_seconds(shape, Setting(8, 65536, stage=stage), config.cluster, micro_batches)
    assert seconds == pytest.approx(nbytes * shape.parameters * 7 / 8 / 450e9)


def test_lead_covers_a_micro_batch_and_a_save_twice():
    assert lead_seconds(0, 0) == 30
    assert lead_seconds(22.8, 15.1) == 110  # 2 x 37.9 + 30, in tens


def test_the_planned_lead_covers_the_optimizers_step_too():
    """Twice the seconds that a step has beside its micro batches, which are whole tens here."""
    given = ["+experiment=cope20", "cluster=h100_8", "nodes=4"]
    without = make_plan(composed("plan", *given)).lead_seconds
    assert make_plan(composed("plan", *given, "assume.step_overhead=60")).lead_seconds == without + 120


@pytest.mark.parametrize("stage", [1, 3])
def test_checkpoint_bytes_are_those_of_a_real_checkpoint(tmp_path, store_64, stage):
    """A committed step of a model whose weights outweigh the files' headers."""
    more = ["trainer.max_steps=1", f"deepspeed=zero{stage}"]
    config = tiny_run(store_64, tmp_path, *more, vocab_size=16384, hidden_size=128)
    train(config)
    found = sum(path.stat().st_size for path in find_checkpoint(tmp_path).rglob("*.pt"))
    assert found == pytest.approx(checkpoint_bytes(shape_of(config.model).parameters, stage, 4), rel=0.02)
