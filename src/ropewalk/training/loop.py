"""The training loop."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from ropewalk.attention import Documents
from ropewalk.config import TrainConfig, existing_directory, require_device, validate_train
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.batches import Batch, rank_micro_batches, read_batch
from ropewalk.model import Position, position_of, training_config
from ropewalk.training.checkpoint import check_resumable, find_checkpoint, load_checkpoint, save_checkpoint
from ropewalk.training.engine import Ranks, place_spectrum, start_engine, start_processes
from ropewalk.training.record import MetricsFile, Progress, copy_tokenizer, write_record
from ropewalk.training.schedule import learning_rate
from ropewalk.training.tracker import open_tracker


def train(config: TrainConfig) -> None:
    """Run, or go on with, the training that ``config`` describes. Collective.

    Raises:
        ValueError: for a configuration, store or checkpoint that does not fit, before a model is built.
        FloatingPointError: where the loss is not finite; the weights are not updated and nothing is saved.
    """
    require_device("trainer.device", config.trainer.device)
    ranks = start_processes(config.trainer.device)
    validate_train(config, ranks.world_size)
    store, mixture = open_data(config)
    model_config = training_config(config.model, config.rope.name, config.rope.chain, config.data.sequence_length)
    fit_tokenizer(model_config, store, from_scratch=config.model.path is None)
    _run(config, ranks, store, mixture, model_config)


def open_data(config: TrainConfig) -> tuple[PackedStore, Mixture]:
    """The store and the order in which it is read.

    Raises:
        ValueError: for a store of another sequence length, or a mixture that does not fit it.
    """
    data = config.data
    store = PackedStore(existing_directory("data.store", data.store, "make one with data_prep/prepare.py"))
    if store.sequence_length != data.sequence_length:
        raise ValueError(
            f"data.sequence_length={data.sequence_length}, but {data.store} holds sequences of {store.sequence_length} "
            f"tokens; set data.sequence_length={store.sequence_length} or name another store"
        )
    return store, Mixture(store, data.mixture, config.trainer.seed, config.trainer.global_batch_size)


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
    return {
        "chain": position.chain.to_list(),
        "base_model": config.model.path or dict(config.model.architecture),
        **mixture.contract(),
        "max_steps": trainer.max_steps,
        "schedule": [trainer.learning_rate, trainer.min_lr_ratio, trainer.warmup_ratio],
        "optimizer": [
            trainer.adam_beta1,
            trainer.adam_beta2,
            trainer.adam_eps,
            trainer.weight_decay,
            trainer.gradient_clipping,
        ],
        "dtype": trainer.dtype,
    }


def _run(
    config: TrainConfig, ranks: Ranks, store: PackedStore, mixture: Mixture, model_config: PreTrainedConfig
) -> None:
    trainer, run_dir, position = config.trainer, Path(config.run_dir), position_of(model_config)
    agreed = contract(config, position, mixture)
    checkpoint = find_checkpoint(run_dir) if trainer.resume else None
    start = check_resumable(checkpoint, agreed, trainer.accept, ranks.world_size) if checkpoint else 0
    last = min(trainer.max_steps, start + (trainer.stop_after or trainer.max_steps))
    if start >= last:
        _say(ranks, f"{run_dir} is at step {start} of {trainer.max_steps}: nothing left to do")
        return
    engine = start_engine(config, model_config, ranks)
    if checkpoint:
        load_checkpoint(engine, checkpoint)
        place_spectrum(engine)
    observer = Observer(config, ranks, position, store, engine, start)
    with _profiler(trainer.profile_steps, run_dir, ranks) as profile:
        for step in range(start, last):
            batches = micro_batches(store, mixture, 0 if trainer.overfit_one_batch else step, ranks, config)
            tokens = mixture.trained_tokens(0 if trainer.overfit_one_batch else step)
            loss = take_step(engine, batches, tokens, learning_rate(step, trainer), ranks)
            observer.record(step + 1, loss, tokens, engine)
            if (step + 1) % trainer.checkpoint_every == 0 or step + 1 == last:
                save_checkpoint(engine, run_dir, step + 1, agreed)
                observer.restart_clock()
            if profile is not None:
                profile.step()
    observer.finish()


def micro_batches(store: PackedStore, mixture: Mixture, step: int, ranks: Ranks, config: TrainConfig) -> list[Batch]:
    """This rank's part of the global batch of ``step``."""
    refs = rank_micro_batches(mixture, step, ranks.rank, ranks.world_size, config.trainer.micro_batch_size)
    return [read_batch(store, part) for part in refs]


def take_step(engine: Any, batches: list[Batch], global_tokens: int, lr: float, ranks: Ranks) -> float:
    """One optimizer step over this rank's micro batches; returns the loss of the global batch, nats per token.

    Raises:
        FloatingPointError: where the loss is not finite, before the weights change.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    loss = accumulate(engine, batches, global_tokens, ranks)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at learning rate {lr:.3g}; the weights were left as they were")
    engine.step()
    return loss


def accumulate(engine: Any, batches: list[Batch], global_tokens: int, ranks: Ranks) -> float:
    """Forward and backward of every micro batch; returns the loss of the global batch. Collective.

    Each micro batch's summed loss is divided by the trained tokens of the whole step, so every token of it weighs the
    same whatever the documents and ranks. ZeRO averages gradients over ranks, hence the factor world_size.
    """
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for number, batch in enumerate(batches, 1):
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
        self,
        config: TrainConfig,
        ranks: Ranks,
        position: Position,
        store: PackedStore,
        engine: Any,
        start: int,
    ) -> None:
        self.config, self.ranks = config, ranks
        self.tokens_per_step = config.trainer.global_batch_size * config.data.sequence_length
        self.clock = time.monotonic()
        self.since = start  # step of the last recorded row
        if not ranks.is_main:
            return
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        details = write_record(config, position, store.fingerprint, parameters, ranks.world_size)
        copy_tokenizer(store.tokenizer_path, run_dir)
        self.metrics = MetricsFile(run_dir, start)
        self.tracker = open_tracker(config.tracker, config.run_name, run_dir, {**asdict(config), "run": details})
        self.progress = Progress(start, config.trainer.max_steps)
        _say(
            ranks,
            f"{config.run_name}: {position.chain}, {parameters:,} parameters, {self.tokens_per_step:,} tokens a step",
        )

    def record(self, step: int, loss: float, trained_tokens: int, engine: Any) -> None:
        """Record one finished step, every ``log_every`` steps and at the last."""
        trainer = self.config.trainer
        grad_norm = engine.get_global_grad_norm()  # collective
        if not self.ranks.is_main or (step % trainer.log_every and step != trainer.max_steps):
            return
        now = time.monotonic()
        steps, seconds = step - self.since, now - self.clock
        row = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "trained_tokens": trained_tokens,
            "loss": loss,
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate(step - 1, trainer),
            "tokens_per_second": steps * self.tokens_per_step / seconds,
            "seconds": seconds / steps,
        }
        self.clock, self.since = now, step
        self.metrics.append(row)
        self.tracker.log(row)
        _say(self.ranks, self.progress.line(row))

    def restart_clock(self) -> None:
        """Leave what has passed since the last row, a checkpoint's writing, out of the next row's speed."""
        self.clock = time.monotonic()

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
