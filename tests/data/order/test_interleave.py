"""Slots: exact counts in every period, a shuffled order inside it."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ropewalk.data.order.mixture import Slots, apportioned

PROLONG = [Fraction(n, 100) for n in (30, 30, 10, 10, 4, 4, 3, 3, 3, 3)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 10**18), min_size=1, max_size=12), st.integers(0, 400))
def test_apportionment_equals_webster_slot_by_slot(shares, slots):
    """The rule itself: the next slot goes to the largest share / (2 k + 1)."""
    counts = [0] * len(shares)
    for _ in range(slots):
        counts[max(range(len(shares)), key=lambda d: (Fraction(shares[d], 2 * counts[d] + 1), -d))] += 1
    assert apportioned(shares, slots) == counts


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.integers(0, 10**15))
def test_far_slots_are_divided_without_history(shares, slots):
    counts, total = apportioned(shares, slots), sum(shares)
    assert sum(counts) == slots
    for share, count in zip(shares, counts, strict=True):
        assert abs(count - Fraction(share * slots, total)) <= (1 + Fraction(len(shares) * share, total)) / 2
    assert apportioned(shares, total * 7) == [7 * share for share in shares]


def test_every_period_of_prolongs_shares_holds_the_same_counts():
    slots = Slots(PROLONG, "k")
    assert slots.period == 1000
    for number in (0, 1, 10**9):
        held = Counter(slots.between(number * 1000, (number + 1) * 1000).tolist())
        assert [held[d] for d in range(10)] == [300, 300, 100, 100, 40, 40, 30, 30, 30, 30]


@pytest.mark.parametrize("shares", [PROLONG, [Fraction(2), Fraction(1)], [Fraction("0.123456789"), Fraction(1)]])
def test_before_counts_what_between_gives(shares):
    slots = Slots(shares, "k")
    everything = slots.between(0, 5000)
    for slot in (0, 1, 63, slots.period - 1, slots.period, slots.period + 1, 4999):
        assert slots.before(slot).tolist() == np.bincount(everything[:slot], minlength=len(shares)).tolist()
    assert Slots(shares, "k").between(1500, 3700).tolist() == everything[1500:3700].tolist()


def test_the_order_inside_a_period_is_a_shuffle():
    """Places of the rarest share in 400 periods are spread evenly; neighbours are no likelier equal than chance."""
    slots = Slots(PROLONG, "k")
    owners = slots.between(0, 400 * 1000).reshape(400, 1000)
    places = np.bincount(np.nonzero(owners == 9)[1] // 50, minlength=20)
    assert stats.chisquare(places).pvalue > 1e-4
    same = (owners[:, 1:] == owners[:, :-1]).mean()
    expected = sum(n * (n - 1) for n in (300, 300, 100, 100, 40, 40, 30, 30, 30, 30)) / (1000 * 999)
    assert abs(same - expected) < 4 * np.sqrt(expected / owners.size)
    assert len({row.tobytes() for row in owners}) == 400


def test_the_key_changes_the_order_and_not_the_counts():
    one, other = (Slots(PROLONG, key).between(0, 1000) for key in ("a", "b"))
    assert one.tolist() != other.tolist()
    assert sorted(one.tolist()) == sorted(other.tolist())
