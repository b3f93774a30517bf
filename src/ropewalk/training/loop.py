"""The training loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ropewalk.attention import Documents
from ropewalk.config import TrainConfig, instant, require_device, validate_train
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.batches import Batch, rank_micro_batches, read_batch
from ropewalk.data.prefetch import prefetched
from ropewalk.data.remote import open_stores
from ropewalk.data.tokenizer import check_same_vocabulary
from ropewalk.model import training_config
from ropewalk.rope.position import position_of
from ropewalk.training.checkpoint import load_checkpoint
from ropewalk.training.contract import contract
from ropewalk.training.elastic import make_universal
from ropewalk.training.engine import (
    Ranks,
    averaging_ranks,
    place_spectrum,
    restore_settings,
    start_engine,
    start_processes,
    world_size,
)
from ropewalk.training.guards import (
    Guard,
    StepResult,
    provenance_path,
    refuse_update,
    watch_gradients,
    write_provenance,
)
from ropewalk.training.metrics import Meter
from ropewalk.training.observer import Observer
from ropewalk.training.parallel import check_heads, shard
from ropewalk.training.resume import find_origin, require_writable
from ropewalk.training.saving import Saver
from ropewalk.training.schedule import learning_rate
from ropewalk.training.signals import EXIT_REQUEUE, StopFlag, StopRequested, control_group
from ropewalk.training.watchdog import Watchdog


def train(config: TrainConfig) -> None:
    """Run, or go on with, the training that ``config`` describes. Collective.

    Raises:
        ValueError: for a configuration, store or checkpoint that does not fit, before a model is built.
        TrainingStopped: where a guard ends the run; the refused step changed no weight.
        SystemExit: with EXIT_REQUEUE, saved, after SIGTERM, SIGUSR1, SIGUSR2 or at ``trainer.stop_before``.
    """
    trainer = config.trainer
    require_device("trainer.device", trainer.device)
    validate_train(config, world_size())
    store, mixture = open_data(config)
    model_config = training_config(config.model, config.rope.name, config.rope.chain, config.data.sequence_length)
    fit_tokenizer(model_config, store, config.model.path)
    check_heads(model_config, config.parallel.sequence)
    _run(config, start_processes(trainer.device, config.parallel.sequence), store, mixture, model_config)


def open_data(config: TrainConfig) -> tuple[PackedStore, Mixture]:
    """The store that the tokenizer is taken from, and the order in which it and any others are read.

    Raises:
        ValueError: for a store of another sequence length or tokenizer, or a mixture that does not fit.
    """
    data, trainer = config.data, config.trainer
    stores = open_stores(data)
    mixture = Mixture(
        trainer.seed, data.mixture, stores, trainer.global_batch_size,
        sequence_length=data.sequence_length, curriculum=data.curriculum,
    )  # fmt: skip
    return stores[""], mixture


def fit_tokenizer(model_config: PreTrainedConfig, store: PackedStore, path: str | None) -> None:
    """Check that the store's tokens are the model's; a model from scratch takes the store's special tokens.

    Args:
        model_config: of the model.
        store: whose tokens it is trained on.
        path: directory or hub id of the model; its tokenizer is compared where it lies in a directory. None: from
            scratch.

    Raises:
        ValueError: where the store's vocabulary is another than the model's, or larger than what it embeds.
    """
    tokenizer = store.tokenizer
    if tokenizer["vocab_size"] > model_config.vocab_size:
        raise ValueError(
            f"the store's tokenizer has {tokenizer['vocab_size']} tokens and the model embeds {model_config.vocab_size}"
            "; prepare the data with the model's tokenizer (corpus.tokenizer=...)"
        )
    if path is not None and (Path(path) / "tokenizer.json").is_file():
        check_same_vocabulary(store.tokenizer_path, Path(path))
    if path is None:
        model_config.bos_token_id, model_config.eos_token_id = tokenizer["bos_id"], tokenizer["eos_id"]


def _run(
    config: TrainConfig, ranks: Ranks, store: PackedStore, mixture: Mixture, model_config: PreTrainedConfig
) -> None:
    trainer, run_dir, position = config.trainer, Path(config.run_dir), position_of(model_config)
    agreed = contract(config, position, store, mixture)
    require_writable(run_dir)
    origin = find_origin(run_dir, agreed, config.resume)
    start = origin.step
    last = min(trainer.max_steps, start + (trainer.stop_after or trainer.max_steps))
    if start >= last:
        _say(ranks, f"{run_dir} is at step {start} of {trainer.max_steps}: nothing left to do")
        return
    _say(ranks, describe_order(mixture, last))
    elastic = origin.checkpoint is not None and origin.world_size != ranks.world_size
    universal = make_universal(origin.checkpoint, config.deepspeed.stage) if origin.checkpoint and elastic else None
    observer = Observer(config, ranks, model_config, store, mixture, origin)
    engine = start_engine(config, model_config, ranks)
    if origin.checkpoint:
        load_checkpoint(engine, origin.checkpoint, universal)
        restore_settings(engine, trainer)
        place_spectrum(engine)
    watch_gradients(engine)
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
        step = start
        watchdog.step_begins(step + 1)
        try:
            for step, seen, batches in zip(range(start, last), seen_at, observer.meter.waited(ahead), strict=True):
                tokens = mixture.trained_tokens(seen)
                lr = learning_rate(step, trainer)
                result = take_step(engine, batches, tokens, lr, ranks, guard, stop.check, observer.meter)
                guard.count(result)
                observer.record(step + 1, seen, result, tokens, guard.refused)
                if result.refused is not None:
                    if ranks.is_main:
                        write_provenance(run_dir, step + 1, result, lr, mixture, seen)
                    saver.settle()  # the guard may end the run
                    guard.stop_if_due(step + 1, result, provenance_path(run_dir, step + 1))
                watchdog.step_ends()
                saver.after(step + 1)
                watchdog.step_begins(step + 2)
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


def _watchdog(config: TrainConfig, ranks: Ranks) -> Watchdog:
    guards = config.guards
    run_dir = Path(config.run_dir)
    return Watchdog(run_dir, ranks.rank, ranks.world_size, guards.stuck_multiple, guards.stuck_seconds)


def describe_order(mixture: Mixture, steps: int) -> str:
    """How often each domain will have been gone through after ``steps``, and which repeat or are left out."""
    epochs = ", ".join(f"{name} {count:.2f}" for name, count in mixture.epochs(steps).items())
    unused = f"; not used: {', '.join(mixture.unused)}" if mixture.unused else ""
    repeated = f"; run out and repeated: {', '.join(names)}" if (names := mixture.repeated(steps)) else ""
    return f"epochs at step {steps}: {epochs}{repeated}{unused}"


def micro_batches(mixture: Mixture, step: int, ranks: Ranks, config: TrainConfig) -> list[Batch]:
    """This rank's part of the global batch of ``step``."""
    refs = rank_micro_batches(mixture, step, ranks.data_rank, ranks.data_size, config.trainer.micro_batch_size)
    return [shard(read_batch(mixture.store, part), ranks.rank % ranks.sequence, ranks.sequence) for part in refs]


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
    if refused:
        refuse_update(engine)
    with meter.time("optimizer"):
        engine.step()
    # DeepSpeed leaves the weights alone, without a word, where the norm is not finite.
    grad_norm = float(engine.get_global_grad_norm())
    if refused is None and engine.optimizer.overflow:
        refused = f"the gradient is not finite at loss {loss:.4f}"
    return StepResult(loss, grad_norm, refused)


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
    """
    meter = meter or Meter(ranks.device)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    scale = averaging_ranks(engine, ranks) / global_tokens
    for number, batch in enumerate(batches, 1):
        boundary()
        token_losses = meter.token_losses(batch)
        with meter.time("forward"):
            summed = engine(**_on_device(batch, ranks), token_losses=token_losses)
        with meter.time("backward"):
            engine.backward(summed * scale, scale_wrt_gas=False)
        total += summed.detach()
        meter.add(batch, token_losses)
        if number < len(batches):
            engine.step()  # counts the micro batch; the weights change at the last one's
    return meter.reduce(total) / global_tokens


def _on_device(batch: Batch, ranks: Ranks) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids.to(ranks.device),
        "position_ids": batch.position_ids.to(ranks.device),
        "labels": batch.labels.to(ranks.device),
        "documents": Documents.from_cu_seqlens(batch.cu_seqlens, ranks.device, ranks.group),
    }


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
