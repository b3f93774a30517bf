"""Dealing a global batch: nothing lost, optimal against every other deal at small sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.data.order.balance import deal, span


def brute_force(costs, world_size, micro=1):
    """The cheapest of all ways to cut the sequences into micro batches, and those into slots."""

    def groups(items, size):
        if not items:
            yield []
            return
        for rest in itertools.combinations(items[1:], size - 1):
            left = [i for i in items[1:] if i not in rest]
            for others in groups(left, size):
                yield [(items[0], *rest), *others]

    best = None
    for micros in groups(list(range(len(costs))), micro):
        sums = [sum(costs[i] for i in one) for one in micros]
        for slots in groups(list(range(len(sums))), world_size):
            value = sum(max(sums[i] for i in slot) for slot in slots)
            best = value if best is None else min(best, value)
    return best


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_micro_batches_of_one_are_dealt_as_well_as_can_be(data):
    world_size = data.draw(st.sampled_from([1, 2, 3, 4]))
    slots = data.draw(st.integers(1, {1: 8, 2: 4, 3: 3, 4: 2}[world_size]))
    costs = data.draw(st.lists(st.integers(0, 20), min_size=world_size * slots, max_size=world_size * slots))
    assert span(deal(costs, world_size), costs) == brute_force(costs, world_size)


def test_larger_micro_batches_are_dealt_nearly_as_well():
    """One slot of pairs is optimal (dearest with cheapest); several come within a tenth of the best on average."""
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(12):
        costs = random.lognormal(3, 1, 8).astype(int).tolist()
        assert span(deal(costs, 4, 2), costs) == brute_force(costs, 4, 2)
        ratios.append(span(deal(costs, 2, 2), costs) / brute_force(costs, 2, 2))
    assert max(ratios) < 1.35
    assert np.mean(ratios) < 1.1


def test_a_dear_sequence_is_put_with_cheap_ones():
    costs = [10, 3, 3, 3, 3, 0, 0, 0]
    assert span(deal(costs, 2, 2), costs) == 13


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_every_sequence_is_dealt_once(world_size, slots, micro, seed):
    costs = np.random.default_rng(seed).integers(0, 9, world_size * slots * micro).tolist()
    dealt = deal(costs, world_size, micro)
    assert [len(dealt), {len(slot) for slot in dealt}] == [slots, {world_size}]
    assert {len(one) for slot in dealt for one in slot} == {micro}
    assert sorted(i for slot in dealt for one in slot for i in one) == list(range(len(costs)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 1000), st.sampled_from([1, 2, 3]), st.integers(0, 2**31))
def test_linear_flops_and_the_models_size_change_nothing(linear, attention, micro, seed):
    """Every sequence has the same linear FLOPs, and attention's are in proportion to the squares."""
    costs = np.random.default_rng(seed).integers(0, 1000, 24 * micro).tolist()
    assert deal([linear + attention * cost for cost in costs], 4, micro) == deal(costs, 4, micro)


def test_equal_costs_keep_the_batchs_order():
    assert deal([5] * 6, 2) == [[[0], [1]], [[2], [3]], [[4], [5]]]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"global_batch_size=7 is not a multiple of world size 2 x micro_batch_size 2"):
        deal([1] * 7, 2, 2)
