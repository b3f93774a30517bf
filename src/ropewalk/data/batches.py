"""Micro batches as tensors: sequences flattened into one row, with every document's boundaries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ropewalk.data.mixture import Mixture, SequenceRef
from ropewalk.data.store import PackedSequence, PackedStore

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """A micro batch of B sequences of T tokens in one row of N = B * T tokens.

    Attributes:
        input_ids: int64 (1, N).
        position_ids: int64 (1, N), from 0 in each document.
        labels: int64 (1, N), already shifted: the next token of the same document, else -100.
        cu_seqlens: int32 (n_documents + 1,), document boundaries in the row; padding counts as a document.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    @property
    def trained_tokens(self) -> int:
        """Labels that are not ignored."""
        return int((self.labels != IGNORE_INDEX).sum())


def collate(sequences: Sequence[PackedSequence]) -> Batch:
    """Flatten packed sequences into one row.

    Args:
        sequences: the micro batch; at least one.
    """
    tokens = np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int64)
    labels = np.full_like(tokens, IGNORE_INDEX)
    bounds = [0]
    for sequence in sequences:
        first = bounds[-1]
        ends = sequence.ends.astype(np.int64)
        filled = int(ends[-1]) if len(ends) else 0
        labels[first : first + max(filled - 1, 0)] = tokens[first + 1 : first + max(filled, 1)]
        labels[first + ends - 1] = IGNORE_INDEX
        bounds.extend((first + ends).tolist())
        if filled < len(sequence.tokens):
            bounds.append(first + len(sequence.tokens))
    lengths = np.diff(bounds)
    positions = np.arange(len(tokens)) - np.repeat(bounds[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        labels=torch.from_numpy(labels)[None],
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
    )


def read_batch(store: PackedStore, refs: Sequence[SequenceRef]) -> Batch:
    """Read and collate ``refs``."""
    return collate([store.read(ref.domain, ref.index) for ref in refs])


def rank_micro_batches(
    mixture: Mixture, step: int, rank: int, world_size: int, micro_batch_size: int
) -> Iterator[list[SequenceRef]]:
    """The micro batches of one rank: a contiguous share of the global batch of ``step``, in order.

    Raises:
        ValueError: where the global batch is not a multiple of ``world_size * micro_batch_size``.
    """
    size = mixture.global_batch_size
    if size % (world_size * micro_batch_size):
        raise ValueError(
            f"global_batch_size={size} is not a multiple of world size {world_size} x micro_batch_size "
            f"{micro_batch_size} = {world_size * micro_batch_size}; change one of them"
        )
    share = size // world_size
    mine = mixture.batch(step)[rank * share : (rank + 1) * share]
    return (mine[start : start + micro_batch_size] for start in range(0, share, micro_batch_size))
