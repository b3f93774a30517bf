import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.data.prepare import packing
from ropewalk.data.prepare.packing import cut, pack, packed_sequences, whole_sequences

lengths_and_capacity = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=60), st.just(capacity))
)


def brute_force_rooms(lengths: list[int], capacity: int) -> list[int]:
    """What best-fit decreasing leaves empty in each bin, by its plain rule: scan all bins."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(case=lengths_and_capacity)
def test_pack_is_best_fit_decreasing(case):
    lengths, capacity = case
    bins = pack(np.array(lengths), capacity, "test")
    contents = [bins.order[a:b] for a, b in zip(bins.offsets[:-1], bins.offsets[1:], strict=True)]
    rooms = [capacity - sum(lengths[i] for i in content) for content in contents]
    assert sorted(rooms) == brute_force_rooms(lengths, capacity)
    assert sorted(bins.order.tolist()) == list(range(len(lengths)))


@settings(max_examples=150, deadline=None)
@given(case=lengths_and_capacity)
def test_of_equal_bins_the_one_that_came_to_its_space_last_is_taken(case):
    """The bytes of stores depend on it."""
    lengths, capacity = np.sort(np.array(case[0]))[::-1], case[1]
    bins: list[tuple[int, int]] = []  # space left, when it came to that
    expected = []
    for number, length in enumerate(lengths.tolist()):
        fitting = [(space, -since) for space, since in bins if space >= length]
        if fitting:
            space, since = min(fitting)
            chosen = bins.index((space, -since))
            bins[chosen] = (space - length, number)
        else:
            chosen = len(bins)
            bins.append((capacity - length, number))
        expected.append(chosen)
    bin_of, count = packing._best_fit(lengths, capacity)
    assert bin_of.tolist() == expected
    assert count == len(bins)


def test_pack_of_a_case_by_hand():
    """Capacity 10, pieces 6 5 4 3 2: 6 opens A, 5 opens B, 4 fills A, 3 goes to B, 2 fills B."""
    bins = pack(np.array([2, 6, 3, 5, 4]), 10)
    contents = {tuple(bins.order[a:b]) for a, b in zip(bins.offsets[:-1], bins.offsets[1:], strict=True)}
    assert contents == {(1, 4), (3, 2, 0)}


def test_bins_are_shuffled_by_their_key():
    lengths = np.arange(1, 1001) % 100 + 1
    one, other = pack(lengths, 100, "a"), pack(lengths, 100, "b")
    assert not np.array_equal(one.order, other.order)
    first = lengths[one.order[one.offsets[:-1]]]
    assert np.corrcoef(np.arange(len(first)), first)[0, 1] == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("bad", [0, 11])
def test_pack_refuses_pieces_that_are_no_pieces(bad):
    with pytest.raises(ValueError, match=rf"a piece of {bad} tokens .* 1 to 10 tokens: cut documents first"):
        pack(np.array([3, bad]), 10)


def test_cut_by_hand():
    whole, rest = cut([3, 10, 25, 0, 9], 10)
    assert list(zip(whole.document, whole.start, whole.length, strict=True)) == [
        (1, 0, 10),
        (2, 0, 10),
        (2, 10, 10),
    ]
    assert list(zip(rest.document, rest.start, rest.length, strict=True)) == [
        (0, 0, 3),
        (2, 20, 5),
        (4, 0, 9),
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(2, 30))
def test_every_token_is_packed_once_and_no_document_that_fits_is_cut(lengths, sequence_length):
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(a, b, dtype=np.uint32) for a, b in itertools.pairwise(starts)]
    whole, rest = cut(lengths, sequence_length)
    bins = pack(rest.length, sequence_length)
    sequences = [
        *whole_sequences(documents, whole),
        *packed_sequences(documents, rest, bins, sequence_length),
    ]
    pieces = []
    for sequence in sequences:
        assert sequence.tokens.shape == (sequence_length,)
        assert not sequence.tokens[sequence.ends[-1] :].any()
        pieces += np.split(sequence.tokens[: sequence.ends[-1]], sequence.ends[:-1])
    assert sorted(np.concatenate(pieces).tolist()) == list(range(starts[-1]))
    found = {tuple(piece.tolist()) for piece in pieces}
    assert all(tuple(document.tolist()) in found for document in documents if len(document) <= sequence_length)
