"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from ropewalk.attention import Documents, attention_kernel
from ropewalk.config import STORE_MEND, TrainConfig, existing_directory, instant, require_device, validate_train
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.batches import Batch, Reader, rank_micro_batches, read_batch
from ropewalk.model import count_parameters, training_config
from ropewalk.rope.position import Position, position_of
from ropewalk.training.checkpoint import load_checkpoint, resumable_step, save_checkpoint
from ropewalk.training.engine import Ranks, place_spectrum, restore_settings, start_engine, start_processes, world_size
from ropewalk.training.record import MetricsFile, Progress, copy_tokenizer, write_record
from ropewalk.training.retention import prune_checkpoints
from ropewalk.training.schedule import learning_rate
from ropewalk.training.signals import EXIT_REQUEUE, StopFlag, StopRequested, control_group
from ropewalk.training.tracker import open_tracker


def train(config: TrainConfig) -> None:
    """Run, or go on with, the training that ``config`` describes. Collective.

    Raises:
        ValueError: for a configuration, store or checkpoint that does not fit, before a model is built.
        FloatingPointError: where the loss or its gradient is not finite; that step changes no weight and is not saved.
        SystemExit: with EXIT_REQUEUE, saved, after SIGTERM, SIGUSR1, SIGUSR2 or at ``trainer.stop_before``.
    """
    trainer = config.trainer
    require_device("trainer.device", trainer.device)
    validate_train(config, world_size())
    store, mixture = open_data(config)
    model_config = training_config(config.model, config.rope.name, config.rope.chain, config.data.sequence_length)
    fit_tokenizer(model_config, store, from_scratch=config.model.path is None)
    _run(config, start_processes(trainer.device), store, mixture, model_config)


def open_data(config: TrainConfig) -> tuple[PackedStore, Mixture]:
    """The store that the tokenizer is taken from, and the order in which it and any others are read.

    Raises:
        ValueError: for a store of another sequence length or tokenizer, or a mixture that does not fit.
    """
    data, trainer = config.data, config.trainer
    store = PackedStore(existing_directory("data.store", data.store, STORE_MEND))
    if store.sequence_length != data.sequence_length:
        raise ValueError(
            f"data.sequence_length={data.sequence_length}, but {data.store} holds sequences of {store.sequence_length} "
            f"tokens; set data.sequence_length={store.sequence_length} or name another store"
        )
    if data.verify:
        store.verify()
    return store, Mixture(trainer.seed, data.mixture, store, trainer.global_batch_size)


def fit_tokenizer(model_config: PreTrainedConfig, store: PackedStore, from_scratch: bool) -> None:
    """Check that the model can embed the store's tokens; a model from scratch takes the store's special tokens.

    Raises:
        ValueError: where the store's vocabulary is larger than the model's.
    """
    tokenizer = store.tokenizer
    if tokenizer["vocab_size"] > model_config.vocab_size:
        raise ValueError(
            f"the store's tokenizer has {tokenizer['vocab_size']} tokens and the model embeds {model_config.vocab_size}"
            "; prepare the data with the model's tokenizer (corpus.tokenizer=...)"
        )
    if from_scratch:
        model_config.bos_token_id, model_config.eos_token_id = tokenizer["bos_id"], tokenizer["eos_id"]


def contract(config: TrainConfig, position: Position, mixture: Mixture) -> dict[str, Any]:
    """What a resumed run must share with the checkpoint, entry by entry."""
    trainer = config.trainer
    metadata = position.metadata()
    return {
        "position": {
            **{k: v for k, v in metadata.items() if k not in ("name", "base_model")},
            "chain": str(position.chain),
        },
        "base_model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "architecture": dict(config.model.architecture),
        },
        **mixture.contract(),
        "overfit_one_batch": trainer.overfit_one_batch,
        "max_steps": trainer.max_steps,
        "schedule": {name: getattr(trainer, name) for name in ("learning_rate", "min_lr_ratio", "warmup_ratio")},
        "optimizer": {
            name: getattr(trainer, name)
            for name in ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "gradient_clipping")
        },
        "dtype": trainer.dtype,
    }


def _run(
    config: TrainConfig, ranks: Ranks, store: PackedStore, mixture: Mixture, model_config: PreTrainedConfig
) -> None:
    trainer, run_dir, position = config.trainer, Path(config.run_dir), position_of(model_config)
    agreed = contract(config, position, mixture)
    checkpoint, start = resumable_step(run_dir, agreed, trainer)
    last = min(trainer.max_steps, start + (trainer.stop_after or trainer.max_steps))
    if start >= last:
        _say(ranks, f"{run_dir} is at step {start} of {trainer.max_steps}: nothing left to do")
        return
    _say(ranks, describe_order(mixture, last))
    observer = Observer(config, ranks, model_config, store, start)
    engine = start_engine(config, model_config, ranks)
    if checkpoint:
        load_checkpoint(engine, checkpoint)
        restore_settings(engine, trainer)
        place_spectrum(engine)
    saver = Saver(engine, config, agreed, observer, start, last)
    with _profiler(trainer.profile_steps, run_dir, ranks) as profile, _stop_flag(config) as stop:
        step = start
        try:
            for step in range(start, last):
                seen = 0 if trainer.overfit_one_batch else step
                batches = micro_batches(mixture.store, mixture, seen, ranks, config)
                tokens = mixture.trained_tokens(seen)
                loss, grad_norm = take_step(engine, batches, tokens, learning_rate(step, trainer), ranks, stop.check)
                observer.record(step + 1, loss, grad_norm, tokens)
                saver.after(step + 1)
                if profile is not None:
                    profile.step()
        except StopRequested as reason:
            saver.before_leaving(step, str(reason))
            observer.finish()
            stop.close()
            raise SystemExit(EXIT_REQUEUE) from reason
    observer.finish()


def _stop_flag(config: TrainConfig) -> StopFlag:
    until = config.trainer.stop_before
    return StopFlag(instant(until) if until else None, control_group(config.trainer.device))


class Saver:
    """When a checkpoint is written: every ``checkpoint_every`` steps, after the last one, and before leaving early."""

    def __init__(
        self, engine: Any, config: TrainConfig, agreed: dict[str, Any], observer: Observer, start: int, last: int
    ) -> None:
        self.engine, self.trainer, self.agreed = engine, config.trainer, agreed
        self.run_dir, self.observer = Path(config.run_dir), observer
        self.saved, self.last = start, last

    def after(self, step: int) -> None:
        """Save if it is time to, and delete what is not kept. Collective."""
        every = self.trainer.checkpoint_every
        if every and (step % every == 0 or step == self.last):
            self._save(step)

    def before_leaving(self, step: int, reason: str) -> None:
        """Save the ``step`` steps that were finished, unless that is done or nothing is ever saved. Collective."""
        if self.trainer.checkpoint_every and step > self.saved:
            self._save(step)
        kept = "saved" if self.trainer.checkpoint_every else "not saved, as trainer.checkpoint_every=null says"
        _say(self.observer.ranks, f"{reason}: step {step} is {kept}; leaving with exit code {EXIT_REQUEUE}")

    def _save(self, step: int) -> None:
        with self.observer.clock_stopped():
            save_checkpoint(self.engine, self.run_dir, step, self.agreed)
            if self.observer.ranks.is_main:
                prune_checkpoints(self.run_dir, self.trainer.keep_last, self.trainer.keep_every)
        self.saved = step


def describe_order(mixture: Mixture, steps: int) -> str:
    """How often each domain will have been gone through after ``steps``, and which repeat or are left out."""
    epochs = ", ".join(f"{name} {count:.2f}" for name, count in mixture.epochs(steps).items())
    unused = f"; not used: {', '.join(mixture.unused)}" if mixture.unused else ""
    repeated = f"; run out and repeated: {', '.join(names)}" if (names := mixture.repeated(steps)) else ""
    return f"epochs at step {steps}: {epochs}{repeated}{unused}"


def micro_batches(store: Reader, mixture: Mixture, step: int, ranks: Ranks, config: TrainConfig) -> list[Batch]:
    """This rank's part of the global batch of ``step``."""
    refs = rank_micro_batches(mixture, step, ranks.rank, ranks.world_size, config.trainer.micro_batch_size)
    return [read_batch(store, part) for part in refs]


def no_boundary() -> None:
    """What happens before a micro batch where nothing has been asked for."""


def take_step(
    engine: Any,
    batches: list[Batch],
    global_tokens: int,
    lr: float,
    ranks: Ranks,
    boundary: Callable[[], None] = no_boundary,
) -> tuple[float, float]:
    """One optimizer step over this rank's micro batches; ``boundary`` is called before each and may raise.

    Returns:
        The loss of the global batch, nats per token, and the norm of its gradient before clipping.

    Raises:
        FloatingPointError: where either is not finite; the weights are as they were.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    loss = accumulate(engine, batches, global_tokens, ranks, boundary)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at learning rate {lr:.3g}; the weights were left as they were")
    engine.step()
    # DeepSpeed leaves the weights alone, without a word, where the norm is not finite.
    grad_norm = float(engine.get_global_grad_norm())
    if engine.optimizer.overflow or not math.isfinite(grad_norm) or grad_norm < 0:
        raise FloatingPointError(
            f"the gradient is not finite (norm {grad_norm}) at loss {loss:.4f} and learning rate {lr:.3g}; the weights "
            "were left as they were"
        )
    return loss, grad_norm


def accumulate(
    engine: Any, batches: list[Batch], global_tokens: int, ranks: Ranks, boundary: Callable[[], None] = no_boundary
) -> float:
    """Forward and backward of every micro batch; returns the loss of the global batch. Collective.

    Each micro batch's summed loss is divided by the trained tokens of the whole step, so every token of it weighs the
    same whatever the documents and ranks. ZeRO averages gradients over ranks, hence the factor world_size.
    """
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(batches, 1):
        boundary()
        summed = engine(**_on_device(batch, ranks.device))
        engine.backward(summed * (ranks.world_size / global_tokens), scale_wrt_gas=False)
        total += summed.detach()
        if number < len(batches):
            engine.step()  # counts the micro batch; the weights change at the last one's
    dist.all_reduce(total)
    return total.item() / global_tokens


def _on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids.to(device),
        "position_ids": batch.position_ids.to(device),
        "labels": batch.labels.to(device),
        "documents": Documents.from_cu_seqlens(batch.cu_seqlens, device),
    }


class Observer:
    """Writes what happens: the run's record, metrics.jsonl, the tracker, and the line on the terminal."""

    def __init__(
        self, config: TrainConfig, ranks: Ranks, model_config: PreTrainedConfig, store: PackedStore, start: int
    ) -> None:
        position = position_of(model_config)
        model = {"parameters": count_parameters(model_config), "attention": attention_kernel(config.trainer.device)}
        self.config, self.ranks = config, ranks
        self.tokens_per_step = config.trainer.global_batch_size * config.data.sequence_length
        self.clock = time.monotonic()
        self.since = start  # step of the last recorded row
        if not ranks.is_main:
            return
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        details = write_record(config, position, store, model, ranks.world_size)
        copy_tokenizer(store.tokenizer_path, run_dir)
        self.metrics = MetricsFile(run_dir, start)
        self.tracker = open_tracker(config.tracker, config.run_name, run_dir, {**asdict(config), "run": details})
        self.progress = Progress(start, config.trainer.max_steps)
        where = f"from step {start}" if start else "from the start"
        _say(
            ranks,
            f"{config.run_name}: {position}, {model['parameters']:,} parameters, "
            f"{self.tokens_per_step:,} tokens a step, {where}",
        )

    def record(self, step: int, loss: float, grad_norm: float, trained_tokens: int) -> None:
        """Record one finished step, every ``log_every`` steps and at the last."""
        trainer = self.config.trainer
        if not self.ranks.is_main or (step % trainer.log_every and step != trainer.max_steps):
            return
        now = time.monotonic()
        steps, seconds = step - self.since, now - self.clock
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "trained_tokens": trained_tokens,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate(step - 1, trainer),
            "tokens_per_second": steps * self.tokens_per_step / seconds,
            "seconds": seconds / steps,
        }
        self.clock, self.since = now, step
        self.metrics.append(row)
        self.tracker.log(row)
        _say(self.ranks, self.progress.line(row))

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave what happens inside, the writing of a checkpoint, out of the steps' speed."""
        before = time.monotonic()
        yield
        self.clock += time.monotonic() - before

    def finish(self) -> None:
        """Close the tracker."""
        if self.ranks.is_main:
            self.tracker.finish()


def _profiler(steps: int, run_dir: Path, ranks: Ranks) -> Any:
    """torch.profiler over ``steps`` steps after one of warm-up, or nothing."""
    if steps == 0 or not ranks.is_main:
        return nullcontext()
    from torch.profiler import profile, schedule, tensorboard_trace_handler

    return profile(
        schedule=schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(run_dir / "profile")),
        profile_memory=True,
    )


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        print(line, flush=True)
