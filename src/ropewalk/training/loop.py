"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from ropewalk.config import TrainConfig, instant, require_device, validate_train
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.batches import Batch
from ropewalk.data.prefetch import prefetched
from ropewalk.model import training_config
from ropewalk.rope.position import Position, position_of
from ropewalk.training.checkpoint import load_checkpoint
from ropewalk.training.contract import contract
from ropewalk.training.distributed import Ranks, by_rank_zero, control_group, launched_world_size, start_processes
from ropewalk.training.elastic import make_universal, require_stage
from ropewalk.training.engine import averaging_ranks, place_spectrum, restore_settings, start_engine
from ropewalk.training.guards import (
    Guard,
    StepResult,
    refuse_update,
    watch_gradients,
    write_provenance,
)
from ropewalk.training.heartbeat import refuse_second_writer
from ropewalk.training.inputs import describe_order, fit_tokenizer, micro_batches, on_device, open_data
from ropewalk.training.metrics import Meter
from ropewalk.training.observer import Observer
from ropewalk.training.parallel import check_heads
from ropewalk.training.resume import Origin, find_origin, require_writable
from ropewalk.training.saving import Saver
from ropewalk.training.schedule import learning_rate
from ropewalk.training.scoring import EngineScorer
from ropewalk.training.signals import EXIT_REQUEUE, StopFlag, StopRequested
from ropewalk.training.start import Start, find_start, prepare_start, write_start
from ropewalk.training.terminal import tell
from ropewalk.training.watchdog import Watchdog


class Evaluation(Protocol):
    """What ``evaluation.every`` asks for; of ropewalk.evaluation, which this package knows nothing of."""

    def __call__(self, scorer: EngineScorer, step: int) -> dict[str, float]:
        """Metrics of the model after ``step`` steps. Collective."""


Evaluator = Callable[[TrainConfig, PackedStore, Position, Ranks], Evaluation]


def train(config: TrainConfig, evaluator: Evaluator | None = None) -> None:
    """Run, or go on with, the training that ``config`` describes. Collective.

    Args:
        config: of the run.
        evaluator: makes the evaluation where ``evaluation.every`` is set.

    Raises:
        UserError: for a configuration, store or checkpoint that does not fit, before a model is built.
        TrainingStopped: where a guard ends the run; the refused step changed no weight.
        SystemExit: with EXIT_REQUEUE, saved, after SIGTERM, SIGUSR1, SIGUSR2 or at ``trainer.stop_before``.
    """
    trainer = config.trainer
    require_device("trainer.device", trainer.device)
    validate_train(config, launched_world_size())
    store, mixture = open_data(config)
    ranks = start_processes(trainer.device, config.parallel.sequence)
    start = find_start(config)
    model_config = training_config(
        config.model,
        config.rope.name,
        config.rope.chain,
        config.data.sequence_length,
        start=start.config if start is not None else None,
    )
    fit_tokenizer(model_config, store, config.model.path if start is None else start.tokenizer)
    check_heads(model_config, config.parallel.sequence)
    evaluation = None
    if config.evaluation.every is not None:
        if evaluator is None:
            raise ValueError(
                f"evaluation.every={config.evaluation.every}, but train() was given no evaluator; pass "
                "ropewalk.evaluation.TrainingEvaluation, as train.py does"
            )
        evaluation = evaluator(config, store, position_of(model_config), ranks)
    _run(config, ranks, store, mixture, model_config, start, evaluation)


def _run(
    config: TrainConfig,
    ranks: Ranks,
    store: PackedStore,
    mixture: Mixture,
    model_config: PreTrainedConfig,
    before: Start | None,
    evaluation: Evaluation | None,
) -> None:
    trainer, run_dir, position = config.trainer, Path(config.run_dir), position_of(model_config)
    agreed = contract(config, position, store, mixture, before)
    require_writable(run_dir)
    by_rank_zero(refuse_second_writer, run_dir)
    origin = find_origin(run_dir, agreed, config.resume)
    start = origin.step
    last = min(trainer.max_steps, start + (trainer.stop_after or trainer.max_steps))
    if start >= last:
        _say(ranks, f"{run_dir} is at step {start} of {trainer.max_steps}: nothing left to do")
        return
    _say(ranks, describe_order(mixture, last))
    load = _prepare_load(config, origin, before)
    observer = Observer(config, ranks, model_config, store, mixture, origin)
    if before is not None:
        write_start(before, run_dir)
    engine = _ready_engine(config, model_config, ranks, load)
    by_rank_zero(refuse_second_writer, run_dir)  # one that has been built beside this one
    observer.begin()
    guard = Guard(config.guards, origin.state.get("guard"))
    saver = Saver(engine, config, agreed, lambda: {"guard": guard.state(), **observer.state()}, observer, start, last)
    seen_at = [0 if trainer.overfit_one_batch else step for step in range(start, last)]
    loaded = closing(prefetched(lambda seen: micro_batches(mixture, seen, ranks, config), seen_at))
    with (
        _profiler(trainer.profile_steps, run_dir, ranks) as profile,
        _stop_flag(config) as stop,
        _watchdog(config, ranks) as watchdog,
        loaded as ahead,
    ):
        step, boundary = start, partial(_at_boundary, stop, watchdog)
        watchdog.step_begins(step + 1)
        try:
            for step, seen, batches in zip(range(start, last), seen_at, observer.meter.waited(ahead), strict=True):
                tokens = mixture.trained_tokens(seen)
                lr = learning_rate(step, trainer)
                result = take_step(engine, batches, tokens, lr, ranks, guard, boundary, observer.meter)
                guard.count(result)
                observer.record(step + 1, seen, result, tokens, guard.refused)
                if result.refused is not None:
                    saw = _write_down(run_dir, step + 1, result, lr, mixture, seen)
                    saver.settle()  # the guard may end the run
                    guard.stop_if_due(step + 1, result, saw)
                watchdog.step_ends()
                saver.after(step + 1)  # first: no signal is answered during an evaluation, which may outlast the job
                if evaluation is not None and _is_due(config.evaluation.every, step + 1, trainer.max_steps):
                    told_to_leave = step + 1 < last and stop.is_up()
                    _evaluate(evaluation, engine, ranks, observer, step + 1, told_to_leave)
                watchdog.step_begins(step + 2)
                if profile is not None:
                    profile.step()
        except StopRequested as reason:
            watchdog.step_ends()  # the save may take its time
            saver.before_leaving(step, str(reason))
            observer.finish()
            stop.close()
            raise SystemExit(EXIT_REQUEUE) from reason
    observer.finish()


def _ready_engine(
    config: TrainConfig, model_config: PreTrainedConfig, ranks: Ranks, load: Callable[[Any], None] | None
) -> Any:
    """The engine as the first step finds it: built, brought to its checkpoint, its spectrum in place."""
    engine = start_engine(config, model_config, ranks)
    if load is not None:
        load(engine)
        restore_settings(engine, config.trainer)
        place_spectrum(engine)
    watch_gradients(engine)
    return engine


def _prepare_load(config: TrainConfig, origin: Origin, before: Start | None) -> Callable[[Any], None] | None:
    """What brings a new engine to this run's own checkpoint, else to the one that it starts from; None: nothing does.

    Everything is checked and converted here, while there is no engine yet. Collective.
    """
    if origin.checkpoint is None:
        return prepare_start(before, config) if before is not None else None
    checkpoint, stage, universal = origin.checkpoint, config.deepspeed.stage, None
    require_stage(origin.zero_stage, stage, checkpoint)
    if origin.world_size != dist.get_world_size():
        universal = make_universal(checkpoint, stage)
    return lambda engine: load_checkpoint(engine, checkpoint, universal)


def _write_down(run_dir: Path, step: int, result: StepResult, lr: float, mixture: Mixture, seen: int) -> str:
    """Have rank 0 write what a refused step saw; returns where, for all ranks to say the same. Collective.

    That it could not is told and ends nothing, as with a save: the order knows what the step saw, too.
    """
    try:
        return str(by_rank_zero(write_provenance, run_dir, step, result, lr, mixture, seen))
    except ValueError as error:
        told = f"global batch {seen} of the order, which could not be written down ({error})"
        if dist.get_rank() == 0:
            tell(f"warning: refused step {step} saw {told}")
        return told


def _evaluate(
    evaluation: Evaluation, engine: Any, ranks: Ranks, observer: Observer, step: int, told_to_leave: bool
) -> None:
    if told_to_leave:
        observer.say(f"step {step:>5} is not evaluated: the run has been told to leave")
        return
    with observer.clock_stopped("evaluation"), EngineScorer(engine, ranks) as scorer:
        observer.evaluated(step, evaluation(scorer, step))


def _is_due(every: int | None, step: int, last: int) -> bool:
    return every is not None and (step % every == 0 or step == last)


def _stop_flag(config: TrainConfig) -> StopFlag:
    until = config.trainer.stop_before
    return StopFlag(instant(until) if until else None, control_group(config.trainer.device))


def _watchdog(config: TrainConfig, ranks: Ranks) -> Watchdog:
    return Watchdog(Path(config.run_dir), ranks.rank, ranks.world_size, config.guards)


def _at_boundary(stop: StopFlag, watchdog: Watchdog) -> None:
    stop.check()
    watchdog.batch_begins()


def no_boundary() -> None:
    """What happens before a micro batch where nothing has been asked for."""


def take_step(
    engine: Any,
    batches: list[Batch],
    global_tokens: int,
    lr: float,
    ranks: Ranks,
    guard: Guard,
    boundary: Callable[[], None] = no_boundary,
    meter: Meter | None = None,
) -> StepResult:
    """One optimizer step over this rank's micro batches; ``boundary`` is called before each and may raise. Collective.

    Where the guard objects to the loss, or the gradient is not finite, the weights stay as they were.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    meter = meter or Meter(ranks.device)
    loss = accumulate(engine, batches, global_tokens, ranks, boundary, meter)
    refused = guard.objection(loss)
    spike = refused is not None and math.isfinite(loss)
    if refused:
        refuse_update(engine)  # after which the norm is not finite either
    with meter.time("optimizer"):
        engine.step()
    # DeepSpeed leaves the weights alone, without a word, where the norm is not finite.
    grad_norm = float(engine.get_global_grad_norm())
    if refused is None and engine.optimizer.overflow:
        refused = f"the gradient is not finite at loss {loss:.4f}"
    return StepResult(loss, grad_norm, refused, spike)


def accumulate(
    engine: Any,
    batches: list[Batch],
    global_tokens: int,
    ranks: Ranks,
    boundary: Callable[[], None] = no_boundary,
    meter: Meter | None = None,
) -> float:
    """Forward and backward of every micro batch; returns the loss of the global batch. Collective.

    Each micro batch's summed loss is divided by the trained tokens of the whole step, so every token of it weighs the
    same whatever the documents and ranks. ZeRO averages gradients over ranks, which the factor averaging_ranks undoes.
    A step without a trained token has loss 0 and gradients of 0.
    """
    global_tokens = max(global_tokens, 1)
    meter = meter or Meter(ranks.device)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    scale = averaging_ranks(engine, ranks) / global_tokens
    for number, batch in enumerate(batches, 1):
        boundary()
        token_losses = meter.token_losses(batch)
        with meter.time("forward"):
            summed = engine(**on_device(batch, ranks), token_losses=token_losses)
        with meter.time("backward"):
            engine.backward(summed * scale, scale_wrt_gas=False)
        total += summed.detach()
        meter.add(batch, token_losses)
        if number < len(batches):
            engine.step()  # counts the micro batch; the weights change at the last one's
    return meter.reduce(total) / global_tokens


def _profiler(steps: int, run_dir: Path, ranks: Ranks) -> Any:
    """torch.profiler over ``steps`` steps after one of warm-up, or nothing."""
    if steps == 0 or not ranks.is_main:
        return nullcontext()
    from torch.profiler import profile, schedule, tensorboard_trace_handler

    def write(profiled: Any) -> None:
        try:
            tensorboard_trace_handler(str(run_dir / "profile"))(profiled)
        except (OSError, RuntimeError) as error:  # the other ranks would wait for this one in vain
            tell(f"warning: the profile could not be written ({error})")

    return profile(
        schedule=schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
    )


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        tell(line)
