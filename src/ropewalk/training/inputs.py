"""What a run reads: stores and their order, whether the model can embed them, and each rank's part of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ropewalk.attention import Documents
from ropewalk.config import TrainConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.batches import Batch, rank_micro_batches, read_batch
from ropewalk.data.remote import open_stores
from ropewalk.data.tokenizer import check_same_vocabulary
from ropewalk.errors import UserError
from ropewalk.training.distributed import Ranks
from ropewalk.training.parallel import shard


def open_data(config: TrainConfig) -> tuple[PackedStore, Mixture]:
    """The store that the tokenizer is taken from, and the order in which it and any others are read.

    Raises:
        UserError: for a store of another sequence length or tokenizer, or a mixture that does not fit.
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
        path: directory or hub id of the model or its tokenizer, which is compared where it lies in a directory. None:
            from scratch.

    Raises:
        UserError: where the store's vocabulary is another than the model's, or larger than what it embeds.
    """
    tokenizer = store.tokenizer
    if tokenizer["vocab_size"] > model_config.vocab_size:
        raise UserError(
            f"the store's tokenizer has {tokenizer['vocab_size']} tokens and the model embeds {model_config.vocab_size}"
            "; prepare the data with the model's tokenizer (corpus.tokenizer=...)"
        )
    if path is not None and (Path(path) / "tokenizer.json").is_file():
        check_same_vocabulary(store.tokenizer_path, Path(path))
    if path is None:
        model_config.bos_token_id, model_config.eos_token_id = tokenizer["bos_id"], tokenizer["eos_id"]


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


def on_device(batch: Batch, ranks: Ranks) -> dict[str, Any]:
    """The model's arguments for one micro batch; see :func:`queued`."""
    return {
        "input_ids": queued(batch.input_ids, ranks.device),
        "position_ids": queued(batch.position_ids, ranks.device),
        "labels": queued(batch.labels, ranks.device),
        "documents": Documents.from_cu_seqlens(pinned(batch.cu_seqlens, ranks.device), ranks.device, ranks.group),
    }


def queued(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, the copy queued behind what runs there.

    From pageable memory CUDA waits for its queue before it copies more than 64 kB (CUDA Runtime API, "API
    synchronization behavior"), so the tensor is pinned first, into memory that torch's host allocator keeps.
    """
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in page-locked memory where ``device`` is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
