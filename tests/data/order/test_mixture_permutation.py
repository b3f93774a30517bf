"""The keyed permutation: a bijection at every size, and as even as a fair shuffle is."""

from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ropewalk.data.order.mixture import permuted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_size_and_key_gives_a_permutation(count, key):
    assert sorted(permuted(np.arange(count), count, np.uint64(key)).tolist()) == list(range(count))


def test_one_position_needs_no_other():
    whole = permuted(np.arange(1000), 1000, np.uint64(5))
    places = np.array([999, 0, 123])
    assert permuted(places, 1000, np.uint64(5)).tolist() == whole[places].tolist()
    huge = permuted([0, 2**62], 2**63 - 1, np.uint64(5))
    assert ((huge >= 0) & (huge < 2**63 - 1)).all()


def test_counts_and_keys_are_each_positions_own():
    counts, keys = np.array([3, 50, 7]), np.array([1, 2, 3], np.uint64)
    alone = [permuted([2], count, key)[0] for count, key in zip(counts, keys, strict=True)]
    assert permuted([2, 2, 2], counts, keys).tolist() == alone


def test_the_rule_in_plain_integers():
    """Hoang, Morris and Rogaway's figure 1, with splitmix64 as it is published, one position at a time."""
    mask, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    def swap_or_not(x, count, state):
        for _ in range(64):
            state = (state + gamma) & mask
            partner = (mix(state) - x) % count
            if mix((mix(state ^ gamma) + max(x, partner)) & mask) >> 63:
                x = partner
        return x

    key = 0xFEDCBA9876543210
    assert permuted(np.arange(101), 101, np.uint64(key)).tolist() == [swap_or_not(x, 101, key) for x in range(101)]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_order_of_a_few_is_equally_likely(count):
    """Over successive keys, the worst kind; p below 1e-4 would be a defect, and the keys are fixed."""
    trials = 150 * factorial(count)
    keys = np.arange(trials, dtype=np.uint64)
    orders = Counter(zip(*(permuted(np.full(trials, i), count, keys).tolist() for i in range(count)), strict=True))
    assert len(orders) == factorial(count)
    assert stats.chisquare(list(orders.values())).pvalue > 1e-4


def test_a_large_permutation_looks_random():
    """Against what a uniform permutation has: descents, serial correlation, fixed points, steps."""
    count = 200_003
    order = permuted(np.arange(count), count, np.uint64(9))
    descents = ((order[1:] < order[:-1]).mean() - 0.5) * np.sqrt(12 * count)  # Eulerian: variance (n + 1) / 12
    assert abs(descents) < 4
    assert abs(stats.pearsonr(order[:-1], order[1:]).statistic) * np.sqrt(count) < 4
    assert (order == np.arange(count)).sum() < 9  # Poisson with mean 1
    steps = np.bincount((np.diff(order) % count) * 64 // count, minlength=64)
    assert stats.chisquare(steps).pvalue > 1e-4
    quarters = np.bincount((order[: count // 4] * 32) // count, minlength=32)
    assert stats.chisquare(quarters).pvalue > 1e-4


def test_neighbouring_keys_give_unrelated_orders():
    orders = [permuted(np.arange(5000), 5000, np.uint64(key)) for key in (0, 1, 2, 2**63)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert abs(stats.spearmanr(one, other).statistic) * np.sqrt(5000) < 4
            assert (one == other).sum() < 9
