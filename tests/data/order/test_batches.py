import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from ropewalk.data import Mixture, PackedSequence, SequenceRef
from ropewalk.data.order.batches import collate, rank_micro_batches, read_batch
from ropewalk.model.attention import Documents


def sequence(tokens: list[int], ends: list[int]) -> PackedSequence:
    return PackedSequence(np.array(tokens, dtype=np.uint32), np.array(ends, dtype=np.int32))


def test_collate_by_hand():
    """Two sequences of five: documents 10 11 12 | 20 | padding, then one document of the whole length."""
    batch = collate([sequence([10, 11, 12, 20, 0], [3, 4]), sequence([30, 31, 32, 33, 34], [5])])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 0, 30, 31, 32, 33, 34]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[11, 12, -100, -100, -100, 31, 32, 33, 34, -100]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 10]
    assert batch.trained_tokens == 2 + 0 + 4
    assert (batch.input_ids.dtype, batch.position_ids.dtype, batch.labels.dtype) == (torch.int64,) * 3
    assert batch.cu_seqlens.dtype == torch.int32


def test_padding_is_one_document_without_labels():
    batch = collate([sequence([5, 6, 7, 0, 0, 0], [3])])
    assert batch.cu_seqlens.tolist() == [0, 3, 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch.labels.tolist() == [[6, 7, -100, -100, -100, -100]]


def test_a_sequence_of_padding_alone_has_no_labels():
    batch = collate([sequence([0, 0, 0], []), sequence([4, 5, 6], [3])])
    assert batch.labels.tolist() == [[-100, -100, -100, 5, 6, -100]]
    assert batch.cu_seqlens.tolist() == [0, 3, 6]


def test_labels_equal_those_of_each_document_alone(store_64):
    """Against the plain rule, document by document: within a document the label is the next token."""
    mixture = Mixture(0, {"short": 1}, store_64, 6)
    refs = mixture.global_batch(0)
    batch = read_batch(store_64, refs)
    expected, positions = [], []
    for ref in refs:
        packed = store_64.read(ref.domain, *ref.rows)
        bounds = [0, *packed.ends.tolist()]
        for start, end in itertools.pairwise(bounds):
            expected += [*packed.tokens[start + 1 : end].tolist(), -100]
            positions += range(end - start)
        padding = len(packed.tokens) - bounds[-1]
        expected += [-100] * padding
        positions += range(padding)
    assert batch.labels[0].tolist() == expected
    assert batch.position_ids[0].tolist() == positions
    assert batch.trained_tokens == mixture.trained_tokens(0)


def test_loss_masks_take_labels_away():
    """Token t is a label at t - 1: masked tokens are no label, and a mask gives the first of a document none either."""
    masked = PackedSequence(
        tokens=np.arange(10, 18, dtype=np.uint32),
        ends=np.array([3, 7], np.int32),
        loss_mask=np.array([1, 0, 1, 1, 1, 0, 1, 1], bool),
    )
    batch = collate([masked, sequence([1, 2, 3], [3])])
    assert batch.labels.tolist() == [[-100, 12, -100, 14, -100, 16, -100, -100, 2, 3, -100]]


def test_documents_know_their_domain_and_the_longest():
    batch = collate([sequence([1, 2, 3, 4, 0], [1, 4]), sequence([5, 6, 7, 8, 9], [5])], [3, 1])
    assert batch.domain_ids.tolist() == [3, 3, -1, 1]
    assert (batch.domain_ids.dtype, len(batch.domain_ids)) == (torch.int32, len(batch.cu_seqlens) - 1)
    assert Documents.from_cu_seqlens(batch.cu_seqlens, torch.device("cpu")).max_seqlen == 5


def test_domain_ids_are_places_among_the_sorted_names(store_64):
    mixture = Mixture(0, {}, store_64, 6)
    refs = mixture.global_batch(0)
    batch = read_batch(mixture.store, refs)
    expected = []
    for ref in refs:
        packed = store_64.read(ref.domain, *ref.rows)
        expected += [sorted(store_64.domains).index(ref.domain)] * len(packed.ends)
        expected += [-1] * int(packed.ends[-1] < len(packed.tokens))
    assert batch.domain_ids.tolist() == expected


def test_short_rows_are_joined_with_their_boundaries(store_64, store_256):
    """A sequence of 256 tokens from a store of 64: four rows one after the other, no document across them."""
    mixture = Mixture(0, {"rows/short": 1, "long": 1}, {"": store_256, "rows": store_64}, 4)
    ref = next(ref for step in range(9) for ref in mixture.global_batch(step) if ref.domain == "rows/short")
    joined = read_batch(mixture.store, [ref])
    alone = [read_batch(store_64, [SequenceRef("short", (row,))]) for row in ref.rows]
    assert joined.input_ids.shape == (1, 256)
    for field in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(joined, field), torch.cat([getattr(one, field) for one in alone], 1))
    lengths = torch.cat([one.cu_seqlens.diff() for one in alone])
    assert torch.equal(joined.cu_seqlens.diff(), lengths)


def test_micro_batches_are_dealt_by_attention(store_64):
    """Every sequence once; costs, taken from the tokens' own boundaries, fall from slot to slot."""
    mixture = Mixture(0, {}, store_64, 24)
    for world_size, micro in ((1, 1), (2, 1), (4, 1), (2, 3), (4, 6)):
        ranks = [rank_micro_batches(mixture, 3, rank, world_size, micro) for rank in range(world_size)]
        assert all(len(part) == micro for rank in ranks for part in rank)
        flat = [ref for rank in ranks for part in rank for ref in part]
        assert Counter(flat) == Counter(mixture.global_batch(3))
        slots = [
            [int(read_batch(store_64, part).cu_seqlens.diff().square().sum()) for part in slot]
            for slot in zip(*ranks, strict=True)
        ]
        for dearer, cheaper in itertools.pairwise(slots):
            assert min(dearer) >= max(cheaper)


def test_a_global_batch_that_does_not_divide_is_refused(store_64):
    mixture = Mixture(0, {}, store_64, 10)
    with pytest.raises(
        ValueError, match=r"global_batch_size=10 is not a multiple of world size 2 x micro_batch_size 3"
    ):
        rank_micro_batches(mixture, 0, 0, 2, 3)
