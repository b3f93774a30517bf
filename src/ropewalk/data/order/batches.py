"""Micro batches as tensors: sequences flattened into one row, every document's boundaries kept; and read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ropewalk.data.order.balance import deal
from ropewalk.data.order.mixture import Mixture, SequenceRef
from ropewalk.data.store.reader import JoinedStore, PackedSequence, PackedStore
from ropewalk.data.store.visuals import Visual
from ropewalk.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

IGNORE_INDEX = -100
PADDING = -1  # domain of the document that padding is


class VisualKey(NamedTuple):
    """A visual in one epoch: the same for every seed, number of ranks and order.

    Attributes:
        domain: of the store.
        row: of the domain.
        number: of the visual in that row.
        epoch: of its part of the domain (see Mixture), from 0.
    """

    domain: str
    row: int
    number: int
    epoch: int


@dataclass(frozen=True)
class VisionInputs:
    """Inputs of a model of images and videos beside the tokens of a row.

    Attributes:
        positions: float32 (3, 1, N): time, height and width of each token; never to be cast to fewer bits.
        pixel_places: int64 (n,), the tokens of the row that the tower's output replaces, in order.
        patches: uint8 (patches, values), in the tower's order; None: no store of the run holds pixels.
        grids: int64 (visuals, 3), frames, rows and columns of patches; one more than there are visuals with pixels if
            there are none, see visual_batches.
        embedding_places: int64 (m,), the tokens that embeddings replace.
        embeddings: bfloat16 (m, width).
    """

    positions: Tensor
    pixel_places: Tensor
    patches: Tensor | None
    grids: Tensor | None
    embedding_places: Tensor
    embeddings: Tensor

    def mapped(self, move: Callable[[Tensor], Tensor]) -> VisionInputs:
        """The same with every tensor moved."""
        moved: dict[str, Any] = {name: value if value is None else move(value) for name, value in vars(self).items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """A micro batch of B sequences of T tokens in one row of N = B * T tokens.

    Attributes:
        input_ids: int64 (1, N).
        position_ids: int64 (1, N), from 0 in each document.
        labels: int64 (1, N), already shifted: the next token of the same document, else -100; -100 too where a loss
            mask leaves the next token out.
        cu_seqlens: int32 (n_documents + 1,), document boundaries in the row; padding counts as a document.
        domain_ids: int32 (n_documents,), place of each document's domain among the
            store's sorted names; -1: padding.
        visuals: images and videos of the row, in order, each at its place in the row.
        visual_keys: of each, what tells it from every other; see VisualKey.
        vision: what the model needs of them; None: text alone, or not made yet (visual_batches.VisualReader).
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    domain_ids: Tensor
    visuals: tuple[Visual, ...] = ()
    visual_keys: tuple[VisualKey, ...] = ()
    vision: VisionInputs | None = None

    @property
    def trained_tokens(self) -> int:
        """Labels that are not ignored."""
        return int((self.labels != IGNORE_INDEX).sum())


def collate(
    sequences: Sequence[PackedSequence],
    domain_ids: Sequence[int] | None = None,
    rows: Sequence[tuple[str, int, int]] | None = None,
) -> Batch:
    """Flatten packed sequences into one row.

    Args:
        sequences: the micro batch; at least one.
        domain_ids: of each sequence; None: all 0.
        rows: domain, row and epoch of each sequence; None: their number in the domain "", epoch 0.
    """
    rows = rows or [("", number, 0) for number in range(len(sequences))]
    starts = np.cumsum([0, *(len(sequence.tokens) for sequence in sequences)])
    tokens, positions, labels = (np.empty(starts[-1], np.int64) for _ in range(3))
    bounds, domains = [np.zeros(1, np.int64)], []
    visuals: list[Visual] = []
    keys: list[VisualKey] = []
    for number, sequence in enumerate(sequences):
        row = slice(starts[number], starts[number + 1])
        tokens[row] = sequence.tokens
        _label(labels[row], tokens[row], sequence)
        ends, padded = _ends(sequence)
        _count(positions[row], ends)
        bounds.append(starts[number] + ends)
        domain = domain_ids[number] if domain_ids is not None else 0
        domains += [domain] * (len(ends) - padded) + [PADDING] * padded
        visuals += [visual.moved(int(starts[number])) for visual in sequence.visuals]
        name, index, epoch = rows[number]
        keys += [VisualKey(name, index, place, epoch) for place in range(len(sequence.visuals))]
    return Batch(
        input_ids=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        labels=torch.from_numpy(labels)[None],
        cu_seqlens=torch.from_numpy(np.concatenate(bounds).astype(np.int32)),
        domain_ids=torch.tensor(domains, dtype=torch.int32),
        visuals=tuple(visuals),
        visual_keys=tuple(keys),
    )


def _ends(sequence: PackedSequence) -> tuple[NDArray[np.int64], bool]:
    """The end of each document in the sequence, and a flag: the last of them is padding."""
    ends, length = sequence.ends.astype(np.int64), len(sequence.tokens)
    padded = not len(ends) or int(ends[-1]) < length
    return (np.append(ends, length) if padded else ends), padded


def _label(labels: NDArray[np.int64], tokens: NDArray[np.int64], sequence: PackedSequence) -> None:
    """Write the labels of one sequence: the next token where it is trained."""
    ends = sequence.ends
    filled = int(ends[-1]) if len(ends) else 0
    labels[max(filled - 1, 0) :] = IGNORE_INDEX
    labels[: max(filled - 1, 0)] = tokens[1 : max(filled, 1)]
    labels[ends - 1] = IGNORE_INDEX
    mask = sequence.loss_mask
    if mask is not None:
        labels[:-1][~mask[1:]] = IGNORE_INDEX


def _count(positions: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
    """Write positions that begin at 0 after every end: the running sum of ones, set back at each start."""
    positions[:] = 1
    positions[0] = 0
    positions[ends[:-1]] = 1 - np.diff(ends, prepend=0)[:-1]
    np.cumsum(positions, out=positions)


def read_batch(store: PackedStore | JoinedStore, refs: Sequence[SequenceRef]) -> Batch:
    """Read and collate ``refs``, the rows of each in order."""
    domain_ids_by_name = {name: domain_id for domain_id, name in enumerate(sorted(store.domains))}
    rows = [row for ref in refs for row in rows_of(ref)]
    sequences = [store.read(domain, row) for domain, row, _ in rows]
    return collate(sequences, [domain_ids_by_name[domain] for domain, _, _ in rows], rows)


def rows_of(ref: SequenceRef) -> list[tuple[str, int, int]]:
    """Domain, row and epoch of each row of a training sequence."""
    epochs = ref.epochs or (0,) * len(ref.rows)
    return [(ref.domain, row, epoch) for row, epoch in zip(ref.rows, epochs, strict=True)]


def rank_micro_batches(
    mixture: Mixture, step: int, rank: int, world_size: int, micro_batch_size: int
) -> list[list[SequenceRef]]:
    """The micro batches of one rank in the global batch of ``step``, dealt by cost; see :func:`balance.deal`.

    Args:
        mixture: the order.
        step: from 0.
        rank: data-parallel rank; the ranks of one sequence-parallel group share theirs.
        world_size: data-parallel ranks.
        micro_batch_size: sequences of a micro batch.

    Raises:
        UserError: where the global batch is not a multiple of ``world_size * micro_batch_size``.
    """
    return [slot[rank] for slot in micro_batch_slots(mixture, step, world_size, micro_batch_size)]


def micro_batch_slots(
    mixture: Mixture, step: int, world_size: int, micro_batch_size: int
) -> list[list[list[SequenceRef]]]:
    """The micro batches of all ranks in the global batch of ``step``, as ``[slot][rank]``; see rank_micro_batches."""
    refs = mixture.global_batch(step)
    costs = [sum(mixture.store.attention_cost(ref.domain, row) for row in ref.rows) for ref in refs]
    return [[[refs[i] for i in micro] for micro in slot] for slot in deal(costs, world_size, micro_batch_size)]


def prefetched(load: Callable[[Item], Result], items: Iterable[Item], depth: int = 2) -> Generator[Result, None, None]:
    """``load(item)`` for every item, in order, made up to ``depth`` items ahead of what has been taken.

    One thread loads, one item after the other; at most ``depth`` results wait. An error of ``load`` is raised where
    its result would have been taken, and nothing is loaded after it is seen. The thread is gone when the iterator is
    exhausted, closed or dropped, at the latest when the process ends, which waits for the load in progress.

    Args:
        load: called in the thread.
        items: consumed in the caller's thread.
        depth: results ahead, 1 or more.

    Raises:
        UserError: for a depth below 1.
    """
    if depth < 1:
        raise UserError(f"depth={depth} must be 1 or more; 2 keeps one result ready while another is loaded")
    return _prefetched(load, iter(items), depth)


def _prefetched(load: Callable[[Item], Result], items: Iterator[Item], depth: int) -> Generator[Result, None, None]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead: deque[Future[Result]] = deque(pool.submit(load, item) for item in islice(items, depth))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(load, item) for item in islice(items, 1))
            yield result
            del result  # the caller's to free while the next is loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
