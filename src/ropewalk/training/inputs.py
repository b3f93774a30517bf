"""Inputs of a run: its stores and their order, its model's configuration, and each rank's part of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ropewalk.config.rules import validate_device, validate_sharing, validate_train
from ropewalk.config.train import VISION_MODEL_TYPES, TrainConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.order.batches import Batch, rank_micro_batches, read_batch
from ropewalk.data.order.visual_batches import VisualReader, check_contents
from ropewalk.data.store.remote import open_stores
from ropewalk.data.store.tokenizer_files import check_same_vocabulary
from ropewalk.errors import UserError
from ropewalk.model.attention import Documents, attention_kernel
from ropewalk.model.load import training_config
from ropewalk.model.vision import has_vision, placeholders, tokens_per_second, tower_geometry
from ropewalk.rope.position import Position, position_of
from ropewalk.training.checkpoint.start import StartCheckpoint, find_start, first_order_step
from ropewalk.training.distributed import Ranks, launched_world_size, start_processes, together
from ropewalk.training.tracker import check_tracker


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run is made from, checked against each other.

    Attributes:
        config: as composed.
        ranks: this process among the others.
        store: that the tokenizer is taken from.
        mixture: the order in which it and any others are read.
        start: checkpoint of another run that this one starts from; None: it starts from ``model``.
        first_order_step: step of the data order that its first step takes.
        model_config: of the model, its position encoding included.
        visuals: makes what a model of images and videos takes beside tokens; None: of text alone.
    """

    config: TrainConfig
    ranks: Ranks
    store: PackedStore
    mixture: Mixture
    start: StartCheckpoint | None
    first_order_step: int
    model_config: PreTrainedConfig
    visuals: VisualReader | None = None

    @property
    def position(self) -> Position:
        """How the model rotates."""
        return position_of(self.model_config)


def open_inputs(config: TrainConfig) -> RunInputs:
    """Open what a run reads, and join the ranks. Collective.

    Raises:
        UserError: for a configuration, store or checkpoint that does not fit, before a model is built.
    """
    validate_device("trainer.device", config.trainer.device)
    validate_train(config, launched_world_size())
    check_tracker(config.tracker)
    store, mixture = open_data(config)
    ranks = start_processes(config.trainer.device, config.parallel.sequence, config.trainer.deterministic)
    together(attention_kernel, ranks.device, config.trainer.attention)  # refused before a model is built
    start = find_start(config)
    first_order = first_order_step(start, config.start_from.order, mixture.contract())
    model_config = training_config(
        config.model,
        config.rope,
        config.data.sequence_length,
        start=start.config if start is not None else None,
    )
    fit_tokenizer(model_config, store, config.model.path if start is None else start.tokenizer)
    check_heads(model_config, config.parallel.sequence)
    visuals = open_visuals(config, model_config, mixture)
    return RunInputs(config, ranks, store, mixture, start, first_order, model_config, visuals)


def open_visuals(config: TrainConfig, model_config: PreTrainedConfig, mixture: Mixture) -> VisualReader | None:
    """The maker of vision inputs, for a model of images and videos; None for one of text.

    Raises:
        UserError: for what such a model cannot do yet, visuals of other sizes than its tower's, without a time that it
            reads, a tower that would be trained without ever being called, or a store of visuals for a model of text.
    """
    if not has_vision(model_config):
        if not config.model.train_tower:
            raise UserError(
                f"model.train_tower=false, and model_type={model_config.model_type} has no vision tower; leave it out"
            )
        if mixture.store.has_visuals:
            raise UserError(
                f"model_type={model_config.model_type} reads text alone, and data.store={config.data.store} holds "
                f"images or videos; use a model of type {' or '.join(VISION_MODEL_TYPES)}"
            )
        return None
    if config.parallel.sequence > 1:
        raise UserError(
            f"parallel.sequence={config.parallel.sequence}: the tokens of an image or video cannot be shared by ranks; "
            "set parallel.sequence=1"
        )
    if config.evaluation.every is not None:
        raise UserError(
            f"evaluation.every={config.evaluation.every} measures text, which this model of images and videos is not "
            "evaluated on; set evaluation.every=null"
        )
    axes = position_of(model_config).axes
    assert axes is not None  # every config of these types has them
    tower = tower_geometry(model_config)
    needs_pixels = check_contents(mixture, tower)
    if config.model.train_tower and not needs_pixels:
        raise UserError(
            "model.train_tower=true, and the stores hold no pixels, so the tower would never be called; set "
            "model.train_tower=false"
        )
    ids, speed = placeholders(model_config), tokens_per_second(model_config)
    reader = VisualReader(axes, mixture.seed, tower, ids, speed, needs_pixels)
    reader.check_order(mixture)
    return reader


def open_data(config: TrainConfig) -> tuple[PackedStore, Mixture]:
    """The store that the tokenizer is taken from, and the order in which it and any others are read.

    Raises:
        UserError: for a store of another sequence length or tokenizer, or a mixture that does not fit.
    """
    data, trainer = config.data, config.trainer
    stores = open_stores(data)
    order_seed = trainer.seed if data.order_seed is None else data.order_seed
    mixture = Mixture(
        order_seed, data.mixture, stores, trainer.global_batch_size,
        sequence_length=data.sequence_length, curriculum=data.curriculum, length_weights=data.length_weights,
    )  # fmt: skip
    return stores[""], mixture


def fit_tokenizer(model_config: PreTrainedConfig, store: PackedStore, path: str | None) -> None:
    """Check that the store's tokens are the model's; a model from scratch takes the store's special tokens.

    Args:
        model_config: of the model.
        store: whose tokens it is trained on.
        path: directory or hub id of the model or its tokenizer, which is compared if it lies in a directory. None:
            from scratch.

    Raises:
        UserError: the store's vocabulary is another than the model's, or larger than what it embeds.
    """
    tokenizer = store.tokenizer
    model_config = model_config.get_text_config()
    if tokenizer["vocab_size"] > model_config.vocab_size:
        raise UserError(
            f"the store's tokenizer has {tokenizer['vocab_size']} tokens and the model embeds {model_config.vocab_size}"
            "; prepare the data with the model's tokenizer (corpus.tokenizer=...)"
        )
    if path is not None and (Path(path) / "tokenizer.json").is_file():
        check_same_vocabulary(store.tokenizer_path, Path(path))
    if path is None:
        model_config.bos_token_id, model_config.eos_token_id = tokenizer["bos_id"], tokenizer["eos_id"]


def check_heads(config: PreTrainedConfig, size: int) -> None:
    """Refuse a group of ``size`` ranks that would not get equal shares of the heads.

    Raises:
        UserError: see :func:`ropewalk.config.rules.validate_sharing`.
    """
    config = config.get_text_config()
    validate_sharing(size, config.num_attention_heads, config.num_key_value_heads)


def describe_order(mixture: Mixture, steps: int, first_order_step: int = 0) -> str:
    """How often each domain, or length bucket of one, is gone through in ``steps``; which repeat or are left out."""
    seen = first_order_step + steps
    epochs = ", ".join(f"{name} {count:.2f}" for name, count in mixture.epochs(seen).items())
    unused = f"; not used: {', '.join(mixture.unused)}" if mixture.unused else ""
    repeated = f"; run out and repeated: {', '.join(names)}" if (names := mixture.repeated(seen)) else ""
    earlier = f", the {first_order_step} before the start included" if first_order_step else ""
    return f"epochs at step {steps}{earlier}: {epochs}{repeated}{unused}"


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of a global batch.

    Attributes:
        order_step: step of the data order that it belongs to, from 0.
        micro_batches: of this rank, in order.
        trained_tokens: of the whole global batch, all ranks.
    """

    order_step: int
    micro_batches: list[Batch]
    trained_tokens: int


def step_batch(
    mixture: Mixture, order_step: int, ranks: Ranks, config: TrainConfig, visuals: VisualReader | None = None
) -> StepBatch:
    """Read this rank's part of the global batch of ``order_step``."""
    batches = micro_batches(mixture, order_step, ranks, config, visuals)
    return StepBatch(order_step, batches, mixture.trained_tokens(order_step))


def micro_batches(
    mixture: Mixture, step: int, ranks: Ranks, config: TrainConfig, visuals: VisualReader | None = None
) -> list[Batch]:
    """This rank's part of the global batch of ``step``, with the vision inputs that ``visuals`` makes."""
    refs = rank_micro_batches(mixture, step, ranks.data_rank, ranks.data_size, config.trainer.micro_batch_size)
    batches = [stretch(read_batch(mixture.store, part), ranks.sequence_rank, ranks.sequence) for part in refs]
    return batches if visuals is None else [visuals.completed(batch) for batch in batches]


def stretch(batch: Batch, rank: int, size: int) -> Batch:
    """The stretch of a batch that rank ``rank`` of the ``size`` that share its row holds.

    Labels are shifted before the cut, so the last token of a stretch is still trained on; the document bounds stay
    those of the whole row.

    Raises:
        UserError: if the row does not divide.
    """
    tokens = batch.input_ids.shape[1]
    if tokens % size:
        raise UserError(f"a row of {tokens} tokens cannot be cut in {size} equal parts; change parallel.sequence")
    part = slice(rank * tokens // size, (rank + 1) * tokens // size)
    return replace(
        batch,
        input_ids=batch.input_ids[:, part],
        position_ids=batch.position_ids[:, part],
        labels=batch.labels[:, part],
    )


def on_device(batch: Batch, ranks: Ranks) -> dict[str, Any]:
    """The model's arguments for one micro batch; see :func:`queued`."""
    return {
        "input_ids": queued(batch.input_ids, ranks.device),
        "position_ids": queued(batch.position_ids, ranks.device),
        "labels": queued(batch.labels, ranks.device),
        "documents": Documents.from_cu_seqlens(pinned(batch.cu_seqlens, ranks.device), ranks.device, ranks.group),
        "vision": batch.vision and batch.vision.mapped(lambda tensor: queued(tensor, ranks.device)),
    }


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, the copy queued behind what runs there.

    From pageable memory CUDA waits for its queue before it copies more than 64 kB (CUDA Runtime API, "API
    synchronization behavior"), so the tensor is pinned first, into memory that torch's host allocator keeps.
    """
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in page-locked memory if ``device`` is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
