"""Logging: the run's record, metrics.jsonl and evaluations.jsonl, the tracker, and the lines on the terminal."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any, Self

import torch

from ropewalk.config.rules import batching
from ropewalk.config.train import TrainConfig
from ropewalk.files import writing
from ropewalk.model.attention import attention_kernel
from ropewalk.model.load import count_parameters
from ropewalk.runs.directory import RunDirectory, checkpoint_at
from ropewalk.runs.metrics_file import MetricsFile
from ropewalk.runs.record import copy_tokenizer, differences, recorded_at, recorded_config, write_record
from ropewalk.training.checkpoint.resume import ResumePoint
from ropewalk.training.distributed import by_rank_zero, log, log_once
from ropewalk.training.hooks import Hook, Step
from ropewalk.training.inputs import RunInputs
from ropewalk.training.meter import CONVENTIONS, Meter, StepWork, WorkCounter, known_peak
from ropewalk.training.tracker import open_tracker

PLACEHOLDER = "DIRECTORY_OF_TEXTS"  # in the command that a run ends with, where no held-out text is known


class RunLogger(Hook):
    """Logs what happens in a run. Files, tracker and terminal are rank 0's."""

    def __init__(self, inputs: RunInputs, resume_point: ResumePoint) -> None:
        """Write the run's record and open everything else. Collective.

        Raises:
            UserError: on every rank, if the run's directory cannot be written.
        """
        config, ranks = inputs.config, inputs.ranks
        self.config, self.ranks = config, ranks
        self.tokens_per_step = batching(config, ranks.world_size).tokens_per_step
        self.meter = Meter(ranks.device, sorted(inputs.mixture.store.domains), inputs.mixture.store.sequence_length)
        self.clock = time.monotonic()  # at the last row, moved on by what is left out of the steps' speed
        self.logged_step = resume_point.step
        self.inputs = inputs
        self.draws = inputs.visuals is not None and len(inputs.visuals.axes.temporal_scales) > 1
        if ranks.is_main:
            self.work = WorkCounter(
                inputs.model_config, inputs.mixture, ranks.data_size, config.trainer.micro_batch_size
            )
            self.peak_flops = config.trainer.peak_flops or known_peak(ranks.device)
            self.done: list[StepWork] = []  # since the last row
        by_rank_zero(self._open, inputs, resume_point)

    def _open(self, inputs: RunInputs, resume_point: ResumePoint) -> None:
        config, store, run_dir = self.config, inputs.store, Path(self.config.run_dir)
        model = {
            "parameters": count_parameters(inputs.model_config),
            "attention": str(attention_kernel(self.ranks.device, config.trainer.attention)),
            "cuda": torch.version.cuda,
            "nccl": list(torch.cuda.nccl.version()) if self.ranks.device.type == "cuda" else None,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
        with writing(f"run_dir={run_dir}", run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            record = write_record(
                config,
                inputs.position,
                inputs.mixture,
                model,
                self.ranks.world_size,
                resume_point.step,
                resume_point.accepted,
            )
            copy_tokenizer(store.tokenizer_path, run_dir)
            self.metrics = MetricsFile(RunDirectory(run_dir).metrics, resume_point.step, log)
            if self.draws:
                self.visuals = MetricsFile(RunDirectory(run_dir).visuals, resume_point.step, log)
            if config.evaluation.every is not None:
                self.evaluations = MetricsFile(RunDirectory(run_dir).evaluation_metrics, resume_point.step, log)
        details = {**recorded_config(config), "run": record}
        tracker_id = resume_point.state.get("tracker_id")
        self.tracker = open_tracker(config.tracker, config.run_name, run_dir, details, tracker_id)
        self.progress = Progress(resume_point.step, config.trainer.max_steps)
        log_once(
            f"{config.run_name}: {inputs.position}, {model['parameters']:,} parameters, "
            f"{self.tokens_per_step:,} tokens a step, from step {resume_point.step}"
        )
        for name, words in {**_made_of(inputs), "tracker": self.tracker.place}.items():
            log_once(f"  {name:<9} {words}")

    def __enter__(self) -> Self:
        """Start the clock of the first step, now that there is an engine."""
        self.clock = time.monotonic()
        if self.ranks.is_main:
            self.progress.start = self.clock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the tracker, unless the run has failed: a dashboard shows that it was cut off."""
        if self.ranks.is_main and (error is None or isinstance(error, SystemExit)):
            self.tracker.finish()

    def after_step(self, step: Step) -> None:
        """Log a step: every ``log_every`` steps, at the last, and if it was refused.

        Loss, gradient norm and learning rate are the step's own; the rest is of all steps since the last row.
        """
        trainer = self.config.trainer
        if self.ranks.is_main:
            self.done.append(self.work.step(step.order_step))
            self._log_visuals(step)
        if step.number % trainer.log_every and step.number != trainer.max_steps and step.refused is None:
            return
        steps, self.logged_step = step.number - self.logged_step, step.number
        measured = self.meter.row(steps)
        if not self.ranks.is_main:
            return
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        row = {
            "step": step.number,
            "tokens": step.number * self.tokens_per_step,
            "trained_tokens": step.trained_tokens,
            "loss": _finite(step.loss),
            "grad_norm": _finite(step.grad_norm),
            "learning_rate": step.learning_rate,
            "tokens_per_second": steps * self.tokens_per_step / seconds,
            "seconds": seconds / steps,
            "refused_steps": step.refused_steps,
            **measured,
            **self._work_done(seconds),
        }
        self.metrics.append(row)
        self.tracker.log(row)
        log_once(self.progress.line(row) if step.refused is None else f"step {step.number:>5} refused: {step.refused}")

    def _log_visuals(self, step: Step) -> None:
        """Log the temporal scale that each visual of the global batch has drawn: visuals.jsonl."""
        if self.draws and self.inputs.visuals is not None:
            self.visuals.append(
                {"step": step.number, "visuals": self.inputs.visuals.drawn(self.inputs.mixture, step.order_step)}
            )

    def _work_done(self, seconds: float) -> dict[str, float]:
        """Work rate of a device by convention, as a share of its peak if that is known, and how even the work was."""
        rates = {
            name: sum(work.flops[name] for work in self.done) / seconds / self.ranks.world_size for name in CONVENTIONS
        }
        row = {f"tflops_per_device/{name}": rate / 1e12 for name, rate in rates.items()}
        if self.peak_flops:
            row |= {f"mfu/{name}": rate / self.peak_flops for name, rate in rates.items()}
        row["work_imbalance"] = mean(work.imbalance for work in self.done)
        self.done.clear()
        return row

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log an evaluation: evaluations.jsonl, the tracker under eval/, and a line on the terminal."""
        if not self.ranks.is_main:
            return
        row = {"step": step, "tokens": step * self.tokens_per_step, **metrics}
        self.evaluations.append(row)
        self.tracker.log(row, group="eval")
        words = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/position/" not in name)
        log_once(f"step {step:>5} evaluated: {words}")

    def state(self) -> dict[str, Any]:
        """For the checkpoint: the tracker's run, in which a resumed run goes on."""
        return {"tracker_id": self.tracker.run_id} if self.ranks.is_main else {}

    def settle(self) -> None:
        """Bring the rows so far to the disk, before a checkpoint says that their steps are done."""
        if self.ranks.is_main:
            self.metrics.settle()
            if self.draws:
                self.visuals.settle()
            if self.config.evaluation.every is not None:
                self.evaluations.settle()

    @contextmanager
    def clock_stopped(self, phase: str) -> Iterator[None]:
        """Leave what happens inside, a checkpoint or an evaluation, out of the steps' speed."""
        start = time.monotonic()
        with self.meter.time(phase):
            yield
        self.clock += time.monotonic() - start


class Progress:
    """The line a person watches: step, loss, tokens per second, time left."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        self.first_step, self.max_steps, self.start = first_step, max_steps, time.monotonic()

    def line(self, row: dict[str, Any]) -> str:
        """Format a metrics row; the remaining time is the mean of this session's steps times those left."""
        done = row["step"] - self.first_step
        left = (time.monotonic() - self.start) / done * (self.max_steps - row["step"])
        minutes, seconds = divmod(round(left), 60)
        return (
            f"step {row['step']:>5}/{self.max_steps}  loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}  "
            f"lr {row['learning_rate']:.2e}  {row['tokens_per_second']:>7,.0f} tok/s  ETA {minutes}:{seconds:02d}"
        )


def _made_of(inputs: RunInputs) -> dict[str, str]:
    """The lines of a run's beginning: the chain, the weights, the data, and the difference to its baseline."""
    config, start, mixture = inputs.config, inputs.start, inputs.mixture
    weights = config.model.path or "random weights"
    stores = {name or "store": str(store.root) for name, store in mixture.store.stores.items()}
    shares = ", ".join(f"{name} {share:.1%}" for name, share in mixture.weights.items())
    changes = "".join(f"; from step {step}: {mapping}" for step, mapping in config.data.curriculum.items())
    lines = {
        "chain": str(inputs.position.chain),
        "base": weights if start is None else f"{start.checkpoint} (step {start.step})",
        "data": ", ".join(f"{name} {path}" for name, path in stores.items()),
        "shares": shares + changes,
    }
    if config.baseline is not None:
        other = recorded_at(config.baseline)
        changed = {} if other is None else differences(config, other)
        words = "; ".join(f"{key} {theirs} -> {own}" for key, (theirs, own) in changed.items())
        words = words or ("no difference" if other else "has no record yet")
        lines["baseline"] = f"{config.baseline}: {words}"
    return lines


def closing_lines(config: TrainConfig, step: int, *, is_evaluated: bool = True) -> list[str]:
    """The lines after the last step: where the result lies, and the command that comes next, if there is one.

    Args:
        config: of the run.
        step: that it has reached.
        is_evaluated: its model can be evaluated on text.
    """
    run_dir = config.run_dir
    if step < config.trainer.max_steps:
        return [f"{run_dir} is at step {step} of {config.trainer.max_steps}; the same command goes on"]
    run = RunDirectory(Path(run_dir))
    newest = run.newest_checkpoint()
    result = f"finished: {run_dir}" + (f", {newest.name}" if newest else ", without a checkpoint")
    if newest is None or not is_evaluated:
        return [result]
    documents = _held_out(asdict(config))
    words = [f"checkpoint={run_dir}", f"output={run.evaluation}", f"documents={documents or PLACEHOLDER}"]
    words += [f"lengths=[{config.data.sequence_length}]"]
    words += ["device=cpu", "dtype=float32"] if config.trainer.device == "cpu" else []
    lines = [result, f"next: python scripts/evaluate.py {shlex.join(words)}"]
    if documents is None:
        lines.append(
            f"{PLACEHOLDER}: text files that were not trained on; no preparation of this run's data has kept any "
            "(corpus.heldout_documents)"
        )
    return lines


def _held_out(config: Mapping[str, Any] | None) -> str | None:
    """Documents that were kept from training: the run's own, its preparations', or those of the run it began with."""
    if config is None:
        return None
    data, start = config["data"], config["start_from"]["run"]
    beside = [Path(store).parent / "heldout" for store in (data["store"], *data.get("stores", {}).values())]
    kept = config["evaluation"]["documents"] or next((str(path) for path in beside if path.is_dir()), None)
    if kept or start is None:
        return kept
    checkpoint = checkpoint_at(start)  # None: the other run has gone
    return None if checkpoint is None else _held_out(recorded_at(RunDirectory.of(checkpoint).root))


def _finite(value: float) -> float | None:
    """JSON has no nan."""
    return value if math.isfinite(value) else None
