import itertools

import numpy as np
import pytest
import torch

from ropewalk.data import Mixture, PackedSequence
from ropewalk.data.batches import collate, rank_micro_batches, read_batch


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
    mixture = Mixture(store_64, {"short": 1}, 0, 6)
    refs = mixture.batch(0)
    batch = read_batch(store_64, refs)
    expected, positions = [], []
    for ref in refs:
        packed = store_64.read(ref.domain, ref.index)
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


def test_ranks_share_the_global_batch_in_order(store_64):
    mixture = Mixture(store_64, {}, 0, 24)
    for world_size in (1, 2, 4):
        for micro in (1, 3, 6):
            batches = [list(rank_micro_batches(mixture, 3, rank, world_size, micro)) for rank in range(world_size)]
            assert all(len(part) == micro for rank in batches for part in rank)
            assert [ref for rank in batches for part in rank for ref in part] == mixture.batch(3)


def test_a_global_batch_that_does_not_divide_is_refused(store_64):
    mixture = Mixture(store_64, {}, 0, 10)
    with pytest.raises(
        ValueError, match=r"global_batch_size=10 is not a multiple of world size 2 x micro_batch_size 3"
    ):
        rank_micro_batches(mixture, 0, 0, 2, 3)
