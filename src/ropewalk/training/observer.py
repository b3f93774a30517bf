"""Where everything that happens is told: the run's record, metrics.jsonl, the tracker, the line on the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import PreTrainedConfig

from ropewalk.attention import attention_kernel
from ropewalk.config import TrainConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.model import count_parameters
from ropewalk.provenance import recorded_config
from ropewalk.rope.position import Position, position_of
from ropewalk.training.distributed import Ranks, by_rank_zero, writing
from ropewalk.training.guards import StepResult
from ropewalk.training.metrics import Meter
from ropewalk.training.record import EVALUATIONS, MetricsFile, Progress, copy_tokenizer, write_record
from ropewalk.training.resume import Origin
from ropewalk.training.schedule import learning_rate
from ropewalk.training.terminal import tell
from ropewalk.training.tracker import open_tracker
from ropewalk.training.work import CONVENTIONS, StepWork, WorkCounter, known_peak


class Observer:
    """Writes what happens: the run's record, metrics.jsonl, the tracker, and the line on the terminal."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        model_config: PreTrainedConfig,
        store: PackedStore,
        mixture: Mixture,
        origin: Origin,
    ) -> None:
        """Open what is written, on rank 0. Collective.

        Raises:
            UserError: on every rank, where the run's directory cannot be written.
        """
        model = {"parameters": count_parameters(model_config), "attention": attention_kernel(config.trainer.device)}
        self.config, self.ranks = config, ranks
        self.tokens_per_step = config.trainer.global_batch_size * config.data.sequence_length
        self.meter = Meter(ranks.device, sorted(mixture.store.domains), config.data.sequence_length)
        self.clock = time.monotonic()
        self.since = origin.step  # step of the last recorded row
        if ranks.is_main:
            self.work = WorkCounter(model_config, mixture, ranks.data_size, config.trainer.micro_batch_size)
            self.peak_flops = config.trainer.peak_flops or known_peak(ranks.device)
            self.done: list[StepWork] = []  # since the last row
        by_rank_zero(lambda: self._open(position_of(model_config), model, store, origin))

    def _open(self, position: Position, model: dict[str, Any], store: PackedStore, origin: Origin) -> None:
        config, start, run_dir = self.config, origin.step, Path(self.config.run_dir)
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            details = write_record(config, position, store, model, self.ranks.world_size)
            copy_tokenizer(store.tokenizer_path, run_dir)
            self.metrics = MetricsFile(run_dir, start)
            if config.evaluation.every is not None:
                self.evaluations = MetricsFile(run_dir, start, EVALUATIONS)
        details = {**recorded_config(config), "run": details}
        self.tracker = open_tracker(config.tracker, config.run_name, run_dir, details, origin.state.get("tracker_id"))
        self.progress = Progress(start, config.trainer.max_steps)
        where = f"from step {start}" if start else "from the start"
        self.say(
            f"{config.run_name}: {position}, {model['parameters']:,} parameters, "
            f"{self.tokens_per_step:,} tokens a step, {where}"
        )

    def begin(self) -> None:
        """Start the clock of the first step, once there is an engine."""
        self.clock = time.monotonic()
        if self.ranks.is_main:
            self.progress.start = self.clock

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.ranks.is_main:
            tell(line)

    def record(self, step: int, seen: int, result: StepResult, trained_tokens: int, refused_so_far: int) -> None:
        """Record one finished step: every ``log_every`` steps, at the last, and where it was refused.

        Loss, gradient norm and learning rate are the step's own; the rest is of all steps since the last row.
        """
        trainer = self.config.trainer
        due = step % trainer.log_every == 0 or step == trainer.max_steps or result.refused is not None
        if self.ranks.is_main:
            self.done.append(self.work.step(seen))
        if not due:
            return
        measured = self.meter.row(step - self.since)
        if not self.ranks.is_main:
            self.since = step
            return
        now = time.monotonic()
        steps, seconds = step - self.since, now - self.clock
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "trained_tokens": trained_tokens,
            "loss": _finite(result.loss),
            "grad_norm": _finite(result.grad_norm),
            "learning_rate": learning_rate(step - 1, trainer),
            "tokens_per_second": steps * self.tokens_per_step / seconds,
            "seconds": seconds / steps,
            "refused_steps": refused_so_far,
            **measured,
            **self._work_done(seconds),
        }
        self.clock, self.since = now, step
        self.metrics.append(row)
        self.tracker.log(row)
        self.say(self.progress.line(row) if result.refused is None else f"step {step:>5} refused: {result.refused}")

    def _work_done(self, seconds: float) -> dict[str, float]:
        """Work rate of a device by convention, as a share of its peak where that is known, and how even it was."""
        rates = {
            name: sum(work.flops[name] for work in self.done) / seconds / self.ranks.world_size for name in CONVENTIONS
        }
        row = {f"tflops_per_device/{name}": rate / 1e12 for name, rate in rates.items()}
        if self.peak_flops:
            row |= {f"mfu/{name}": rate / self.peak_flops for name, rate in rates.items()}
        row["work_imbalance"] = mean(work.imbalance for work in self.done)
        self.done.clear()
        return row

    def state(self) -> dict[str, Any]:
        """For the checkpoint: the tracker's run, in which a resumed run goes on."""
        return {"tracker_id": self.tracker.run_id} if self.ranks.is_main else {}

    def settle(self) -> None:
        """Have the rows so far on the disk, before a checkpoint says that their steps are done."""
        if self.ranks.is_main:
            self.metrics.settle()
            if self.config.evaluation.every is not None:
                self.evaluations.settle()

    def evaluated(self, step: int, measured: dict[str, float]) -> None:
        """Record an evaluation: evaluations.jsonl, the tracker under eval/, and a line on the terminal."""
        if not self.ranks.is_main:
            return
        row = {"step": step, "tokens": step * self.tokens_per_step, **measured}
        self.evaluations.append(row)
        self.tracker.log(row, group="eval")
        told = "  ".join(f"{k} {v:.4f}" for k, v in measured.items() if "/position/" not in k)
        self.say(f"step {step:>5} evaluated: {told}")

    @contextmanager
    def clock_stopped(self, phase: str) -> Iterator[None]:
        """Leave what happens inside, a checkpoint or an evaluation, out of the steps' speed."""
        before = time.monotonic()
        with self.meter.time(phase):
            yield
        self.clock += time.monotonic() - before

    def finish(self) -> None:
        """Close the tracker."""
        if self.ranks.is_main:
            self.tracker.finish()


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None
