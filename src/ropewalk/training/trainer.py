"""The trainer: the training loop, the hooks around it, and how a run is put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ropewalk.config.rules import instant
from ropewalk.config.schedule import learning_rate
from ropewalk.config.train import TrainConfig
from ropewalk.data import PackedStore
from ropewalk.data.order.batches import prefetched
from ropewalk.rope.advisor import chain_warnings
from ropewalk.rope.position import Position
from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.launch import EXIT_REQUEUE
from ropewalk.runs.record import contract
from ropewalk.training.checkpoint.resume import find_resume_point, prepare_resume
from ropewalk.training.checkpoint.start import prepare_start, write_start
from ropewalk.training.distributed import Ranks, control_group, held_directory, log, log_once
from ropewalk.training.engine import LearnedSpectrum, averaging_ranks, place_spectrum, start_engine
from ropewalk.training.guards import Guard, Refusals, refuse_update, watch_gradients
from ropewalk.training.hooks import Hook, Step, StopFlag, StopRequested
from ropewalk.training.inputs import RunInputs, StepBatch, describe_order, on_device, open_inputs, step_batch
from ropewalk.training.meter import Meter
from ropewalk.training.periodic_evaluation import Evaluation, PeriodicEvaluation
from ropewalk.training.run_logger import RunLogger, closing_lines
from ropewalk.training.saver import Saver
from ropewalk.training.watchdog import Watchdog

Evaluator = Callable[[TrainConfig, PackedStore, Position, Ranks], Evaluation]


@dataclass
class Trainer:
    """The training loop.

    Attributes:
        engine: DeepSpeed's, around a LossModel.
        ranks: this process among the others.
        batches: this rank's part of each global batch, in the order of steps.
        learning_rate: of a step, counted from 0.
        guard: judges each step before it reaches the weights.
        meter: measures it.
        hooks: called in this order at every moment; see :func:`train`.
        step: steps taken.
        last_step: the session ends after so many.
    """

    engine: Any
    ranks: Ranks
    batches: Iterator[StepBatch]
    learning_rate: Callable[[int], float]
    guard: Guard
    meter: Meter
    hooks: tuple[Hook, ...] = ()
    step: int = 0
    last_step: int = 0

    def run(self) -> None:
        """Take the steps that are left. Collective.

        Raises:
            TrainingStopped: a guard has ended the run; the refused step changed no weight.
            SystemExit: with EXIT_REQUEUE, the finished steps saved, after a signal or at ``trainer.stop_before``.
        """
        with ExitStack() as entered:
            for hook in self.hooks:
                entered.enter_context(hook)
            try:
                while self.step < self.last_step:
                    self.take_step()
            except StopRequested as request:
                for hook in self.hooks:
                    hook.before_exit(self.step, str(request))
                raise SystemExit(EXIT_REQUEUE) from request

    def take_step(self) -> Step:
        """Take the batch, forward, loss, backward, guard, step. Collective.

        If the guard objects to the loss, or the gradient is not finite, the weights stay as they were.
        """
        engine, meter = self.engine, self.meter
        for hook in self.hooks:
            hook.before_step(self.step + 1)

        with meter.time("data"):
            batch = next(self.batches)
        learning_rate = self.learning_rate(self.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate

        # Each micro batch's summed loss is divided by the trained tokens of the whole step, so every token weighs the
        # same whatever the documents and ranks. ZeRO averages gradients over ranks, which averaging_ranks undoes.
        tokens = max(batch.trained_tokens, 1)  # without a trained token, loss and gradients are 0
        scale = averaging_ranks(engine, self.ranks) / tokens
        summed_loss = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for number, micro_batch in enumerate(batch.micro_batches, 1):
            for hook in self.hooks:
                hook.before_micro_batch()  # the only place where the loop is left on request
            token_losses = meter.token_losses(micro_batch)
            with meter.time("forward"):
                loss = engine(**on_device(micro_batch, self.ranks), token_losses=token_losses)
            with meter.time("backward"):
                engine.backward(loss * scale, scale_wrt_gas=False)
            summed_loss += loss.detach()
            meter.add(micro_batch, token_losses)
            if number < len(batch.micro_batches):
                engine.step()  # counts the micro batch; the weights change at the last one's

        mean_loss = meter.reduce(summed_loss) / tokens
        refused = self.guard.objection(mean_loss)
        is_spike = refused is not None and math.isfinite(mean_loss)
        if refused is not None:
            refuse_update(engine)  # after which the norm is not finite either

        with meter.time("optimizer"):
            engine.step()
        grad_norm = float(engine.get_global_grad_norm())
        if refused is None and engine.optimizer.overflow:  # DeepSpeed has left the weights alone, without a word
            refused = f"the gradient is not finite at loss {mean_loss:.4f}"
        self.guard.count(mean_loss, refused)

        self.step += 1
        step = Step(
            self.step, batch.order_step, batch.trained_tokens, learning_rate,
            mean_loss, grad_norm, refused, is_spike, self.guard.refused,
        )  # fmt: skip
        for hook in self.hooks:
            hook.after_step(step)
        return step


def train(config: TrainConfig, evaluator: Evaluator | None = None) -> None:
    """Run, or go on with, the training that ``config`` describes. Collective.

    Everything that can be refused is, before a model is built.

    Args:
        config: of the run.
        evaluator: makes the evaluation if ``evaluation.every`` is set.

    Raises:
        UserError: for a configuration, store or checkpoint that does not fit.
        TrainingStopped: a guard has ended the run; the refused step changed no weight.
        SystemExit: with EXIT_REQUEUE, saved, after SIGINT, SIGTERM, SIGUSR1, SIGUSR2 or at ``trainer.stop_before``.
    """
    # What is trained on what, and where the session begins: all that can be refused, before there is a model.
    inputs = open_inputs(config)
    evaluation = _make_evaluation(inputs, evaluator)
    with held_directory(Path(config.run_dir), f"run_dir={config.run_dir}"):
        _train(inputs, evaluation)


def _train(inputs: RunInputs, evaluation: Evaluation | None) -> None:
    config, ranks, mixture, start = inputs.config, inputs.ranks, inputs.mixture, inputs.start
    trainer, run_dir = config.trainer, Path(config.run_dir)
    started = None if start is None else start.identity() | {"order_step": inputs.first_order_step}
    agreed = contract(config, inputs.position, inputs.store, mixture, started)
    resume_point = find_resume_point(run_dir, agreed, config.resume)
    first_step = resume_point.step
    last_step = min(trainer.max_steps, first_step + (trainer.stop_after or trainer.max_steps))
    if first_step >= last_step:
        log_once(f"{run_dir} is at step {first_step} of {trainer.max_steps}: nothing left to do")
        log_once("\n".join(closing_lines(config, first_step, is_evaluated=inputs.visuals is None)))
        return
    cautions = [f"warning: {caution}" for caution in chain_warnings([inputs.position])]
    log_once("\n".join([describe_order(mixture, last_step, inputs.first_order_step), *cautions]))
    load = prepare_resume(resume_point, config.deepspeed.stage)
    if load is None and start is not None:
        load = prepare_start(start, config)
    logger = RunLogger(inputs, resume_point)
    if start is not None:
        write_start(start, run_dir)

    engine = _ready_engine(inputs, load)
    guard = Guard(config.guards, resume_point.state.get("guard"))
    learned = LearnedSpectrum(engine, trainer, inputs.ranks, resume_point.state.get("learned"))
    stop = StopFlag(instant(trainer.stop_before) if trainer.stop_before else None, control_group(trainer.device))
    # The one order of the hooks, at every moment; they are entered in it, and left in the reverse order.
    hooks = (
        stop,  # asked first: a rank that leaves begins no micro batch
        learned,  # moved with the weights, before anything looks at either
        logger,  # its row is there before the checkpoint that says the step is done; its tracker closes after that save
        Refusals(guard, mixture, run_dir),  # the row shows the refusal; a step that ends the run is not saved
        Watchdog(run_dir, ranks.rank, ranks.world_size, config.guards),  # times the step until here; a save may last
        Saver(
            engine, config, contract=agreed, state=lambda: {"guard": guard.state(), **learned.state()} | logger.state(),
            logger=logger, saved_step=first_step, last_step=last_step,
        ),  # before an evaluation, during which no signal is answered, and which may outlast the job
        PeriodicEvaluation(evaluation, engine, config, logger=logger, stop=stop, last_step=last_step),
        Profiler(trainer.profile_steps if ranks.is_main else 0, run_dir),  # the trace of a step has it all
    )  # fmt: skip

    ordered = (0 if trainer.overfit_one_batch else step for step in range(first_step, last_step))
    order_steps = [inputs.first_order_step + step for step in ordered]
    load_step = partial(step_batch, mixture, ranks=ranks, config=config, visuals=inputs.visuals)
    with closing(prefetched(load_step, order_steps)) as batches:
        Trainer(
            engine=engine,
            ranks=ranks,
            batches=batches,
            learning_rate=lambda step: learning_rate(step, trainer),
            guard=guard,
            meter=logger.meter,
            hooks=hooks,
            step=first_step,
            last_step=last_step,
        ).run()
    log_once("\n".join(closing_lines(config, last_step, is_evaluated=inputs.visuals is None)))


def _make_evaluation(inputs: RunInputs, evaluator: Evaluator | None) -> Evaluation | None:
    every = inputs.config.evaluation.every
    if every is None:
        return None
    if evaluator is None:
        raise ValueError(
            f"evaluation.every={every}, but train() was given no evaluator; pass "
            "ropewalk.evaluation.TrainingEvaluation, as train.py does"
        )
    return evaluator(inputs.config, inputs.store, inputs.position, inputs.ranks)


def _ready_engine(inputs: RunInputs, load: Callable[[Any], None] | None) -> Any:
    """The engine as the first step needs it: built, brought to its checkpoint, its spectrum in place."""
    engine = start_engine(inputs.config, inputs.model_config, inputs.ranks)
    if load is not None:
        load(engine)
        place_spectrum(engine)
    watch_gradients(engine)
    return engine


class Profiler(Hook):
    """torch.profiler over ``steps`` steps (0: none), after one of warm-up; the trace goes into the run directory."""

    def __init__(self, steps: int, run_dir: Path) -> None:
        self.profile: Any = None
        if steps == 0:
            return
        from torch.profiler import profile, schedule, tensorboard_trace_handler

        def write(profiled: Any) -> None:
            try:
                tensorboard_trace_handler(str(RunDirectory(run_dir).profile))(profiled)
            except (OSError, RuntimeError) as error:  # the other ranks would wait for this one in vain
                log(f"warning: the profile could not be written ({error})")

        self.profile = profile(
            schedule=schedule(wait=1, warmup=1, active=steps, repeat=1), on_trace_ready=write, profile_memory=True
        )

    def __enter__(self) -> Self:
        if self.profile is not None:
            self.profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profile is not None:
            self.profile.__exit__(kind, error, trace)

    def after_step(self, step: Step) -> None:
        """Begin the profiler's next step."""
        if self.profile is not None:
            self.profile.step()
