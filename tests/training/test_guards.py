"""A bad step never reaches the weights, all ranks agree on it, and what it saw is on disk."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import one_step, tiny_run
from ranks import start_ranks, tiny_arguments

from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import GuardConfig
from ropewalk.model.load import training_config
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, train, trainer
from ropewalk.training.distributed import start_processes
from ropewalk.training.engine import start_engine
from ropewalk.training.guards import Guard, TrainingStopped, watch_gradients
from ropewalk.training.hooks import Step
from ropewalk.training.inputs import micro_batches, open_data
from ropewalk.training.meter import Meter


def masters(engine):
    """fp32 weights of the engine."""
    optimizer = engine.optimizer
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    flat = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return torch.cat([group.detach().flatten().clone() for group in flat])


class OneRefusal(Guard):
    """Objects to the step that it is told to."""

    def __init__(self):
        super().__init__(GuardConfig())
        self.object_next = False

    def objection(self, loss):
        return "told to" if self.object_next else super().objection(loss)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]
)
def test_a_refused_step_leaves_no_trace(store_64, tmp_path, stage, dtype):
    """Steps 0 and 2 with a refused step 1 between them are, bit for bit, steps 0 and 2 alone; accumulation 2."""
    ranks = start_processes("cpu")
    config = tiny_run(store_64, tmp_path, f"deepspeed.stage={stage}", f"trainer.dtype={dtype}")
    _, mixture = open_data(config)
    found = []
    for steps in ((0, 1, 2), (0, 2)):
        engine = start_engine(config, training_config(config.model, RopeConfig("rope"), 64), ranks)
        watch_gradients(engine)
        guard = OneRefusal()
        for step in steps:
            before = masters(engine)
            guard.object_next = step == 1
            batches = micro_batches(mixture, step, ranks, config)
            result = one_step(engine, batches, mixture.trained_tokens(step), ranks, guard, 1e-2)
            assert (result.refused is None) == (step != 1)
            assert torch.equal(before, masters(engine)) == (step == 1)
        found.append((result.loss, result.grad_norm, masters(engine)))
        engine.destroy()
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_are_not_finite_are_refused_and_end_the_run(store_64, tmp_path, monkeypatch, stage):
    """Spoiled after backward, where the guard judges the loss and has nothing against it."""
    engines = []
    monkeypatch.setattr(trainer, "watch_gradients", lambda engine: engines.append(engine) or watch_gradients(engine))

    def spoil(guard, loss):
        for partition in engines[0].optimizer.averaged_gradients.values():
            partition[0].fill_(math.inf)

    monkeypatch.setattr(Guard, "objection", spoil)
    config = tiny_run(store_64, tmp_path, "guards.max_refused=2", "trainer.dtype=bfloat16", f"deepspeed.stage={stage}")
    with pytest.raises(TrainingStopped, match=r"step 2: the gradient is not finite.*2 in a row and"):
        train(config)
    assert [(row["step"], row["refused_steps"], row["grad_norm"]) for row in read_metrics(tmp_path)] == [
        (1, 1, None), (2, 2, None)
    ]  # fmt: skip
    assert find_checkpoint(tmp_path) is None


@pytest.mark.slow
def test_two_ranks_pass_over_a_step_that_one_of_them_finds_bad(store_64, tmp_path):
    """Rank 1's fifth micro batch, the first of step 3, gives nan: both pass over step 3 and finish."""
    arguments = tiny_arguments(store_64, tmp_path, "trainer.max_steps=5")
    with start_ranks(2, tmp_path / "logs", arguments, fault="nan_in_forward_five") as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    rows = read_metrics(tmp_path)
    assert [row["refused_steps"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False]
    told = json.loads((tmp_path / "refused" / "step-00000003.json").read_text())
    config = tiny_run(store_64, tmp_path)
    _, mixture = open_data(config)
    batch = mixture.global_batch(2)
    assert [(s["domain"], s["sequence"]) for s in told["sequences"]] == [(ref.domain, *ref.rows) for ref in batch]
    for sequence, ref in zip(told["sequences"], batch, strict=True):
        assert sequence["document_ends"] == store_64.read(ref.domain, *ref.rows).ends.tolist()
    assert sum(told["domains"].values()) == 4
    assert told["refused"] == "the loss is nan"
    assert told["learning_rate"] == rows[2]["learning_rate"]


@pytest.mark.slow
def test_two_ranks_stop_together(store_64, tmp_path):
    arguments = tiny_arguments(store_64, tmp_path, "trainer.max_steps=9")
    with start_ranks(2, tmp_path / "logs", arguments, fault="nan_always") as ranks:
        assert ranks.wait() == [1, 1]
        for rank in (0, 1):
            assert "step 3: the loss is nan; the weights were left as they were" in ranks.output(rank)
    assert len(list((tmp_path / "refused").glob("*.json"))) == 3


def judged(guard, losses):
    """Which of the losses the guard objects to, each counted as it was judged."""
    refused = []
    for number, loss in enumerate(losses):
        objection = guard.objection(loss)
        guard.count(loss, objection)
        if objection:
            refused.append(number)
    return refused


def test_a_spike_is_measured_in_deviations_from_the_median():
    """Window 1..8: median 4.5, median absolute deviation 2, so the limit is 4.5 + 3 x 1.4826 x 2 = 13.3956."""
    guard = Guard(GuardConfig(spike_window=8, spike_deviations=3.0))
    assert judged(guard, [9.0, *range(1, 8)]) == []  # not full before
    assert judged(guard, [8.0]) == []
    assert guard.spike_limit() == pytest.approx(13.3956)
    assert judged(guard, [13.3957, 100.0, math.inf, 13.3955]) == [0, 1, 2]
    assert guard.refused == 3
    assert guard.in_a_row == 0
    assert 100.0 not in guard.recent


def test_a_resumed_guard_goes_on_where_it_was():
    config = GuardConfig(spike_window=8, spike_deviations=1.0)
    losses = [5.0, 4.0, 6.0, 4.5, 5.5, 4.2, 5.8, 4.9, 30.0, 4.8, 5.1, 40.0]
    whole, first = Guard(config), Guard(config)
    expected = judged(whole, losses)
    head = judged(first, losses[:9])
    second = Guard(config, json.loads(json.dumps(first.state())))
    assert head + [9 + n for n in judged(second, losses[9:])] == expected
    assert second.state() == whole.state()


def test_a_spike_stops_where_told_to(tmp_path):
    guard = Guard(GuardConfig(spike_window=8, spike_action="stop"))
    spike = Step(3, 2, 100, 1e-3, 9.0, math.inf, "the loss 9.0 is a spike", is_spike=True)
    guard.count(spike.loss, spike.refused)
    with pytest.raises(TrainingStopped, match="ends the run; =skip goes on"):
        guard.stop_if_due(spike, str(tmp_path))
    Guard(GuardConfig(spike_window=8)).stop_if_due(spike, str(tmp_path))


def test_a_spike_ends_a_real_run(store_64, tmp_path, monkeypatch):
    """The ninth loss is made three times what it is, after a window of eight."""
    real, losses = Meter.reduce, []

    def spiking(meter, summed_loss):
        losses.append(real(meter, summed_loss))
        return losses[-1] * (3 if len(losses) == 9 else 1)

    monkeypatch.setattr(Meter, "reduce", spiking)
    overrides = ("guards.spike_window=8", "guards.spike_action=stop", "trainer.max_steps=12")
    with pytest.raises(TrainingStopped, match=r"step 9: .* is a spike.*spike_action=stop ends the run"):
        train(tiny_run(store_64, tmp_path, *overrides))
    assert len(losses) == 9


def test_a_step_without_a_trained_token_changes_nothing(store_64, tmp_path):
    ranks = start_processes("cpu")
    config = tiny_run(store_64, tmp_path, "trainer.weight_decay=0.0")
    _, mixture = open_data(config)
    engine = start_engine(config, training_config(config.model, RopeConfig("rope"), 64), ranks)
    before = masters(engine)
    batches = [replace(b, labels=torch.full_like(b.labels, -100)) for b in micro_batches(mixture, 0, ranks, config)]
    result = one_step(engine, batches, 0, ranks, learning_rate=1e-2)
    assert (result.loss, result.grad_norm, result.refused) == (0.0, 0.0, None)
    assert torch.equal(before, masters(engine))
    engine.destroy()


@pytest.mark.parametrize(("override", "message"), [
    ("guards.max_refused=0", "must be positive"), ("guards.spike_window=3", "set 8 or more"),
    ("guards.spike_deviations=0", "must be positive"), ("guards.spike_action=warn", "use one of: skip, stop"),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused(store_64, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(store_64, tmp_path, override))
