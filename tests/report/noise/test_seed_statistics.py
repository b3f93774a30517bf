"""The statistics of seeds against scipy, published tables, enumeration and simulation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from ropewalk.report.noise import seed_statistics as seeds

RNG = np.random.default_rng(7)


def test_spread_covers_the_true_one_as_often_as_it_says() -> None:
    samples = RNG.normal(3.0, 0.25, (4000, 4))
    covered = [interval.low <= 0.25 <= interval.high for interval in map(seeds.spread, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 4000))


def test_spread_of_a_published_table() -> None:
    """Chi-square with 9 degrees of freedom: 2.700 and 19.023 (any table); s = 2 of ten values."""
    values = np.array([-3, 3, 0, 0, 0, 0, 0, 0, 3, -3]) * 1.0
    found = seeds.spread(values)
    assert found.value == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx((2 * math.sqrt(9 / 19.023), 2 * math.sqrt(9 / 2.700)), rel=1e-3)


def test_one_seed_has_no_spread_and_no_interval() -> None:
    assert math.isnan(seeds.spread([1.0]).value)
    assert math.isnan(seeds.mean_over_seeds([1.0]).low)
    assert math.isnan(seeds.detectable_difference(math.nan, 1, paired=True))


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_mean_is_scipys_interval(confidence: float) -> None:
    values = RNG.normal(size=6)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    found = seeds.mean_over_seeds(values, confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_components_are_those_that_made_the_values() -> None:
    """Means over 3,000 tables of known components; and the F test's sums of squares done the slow way."""
    tables = RNG.normal(0, 0.3, (3000, 5, 1)) + RNG.normal(0, 2.0, (3000, 1, 8)) + RNG.normal(0, 0.5, (3000, 5, 8))
    found = [seeds.variance_components(table) for table in tables]
    assert np.mean([one.rest**2 for one in found]) == pytest.approx(0.25, rel=0.02)
    assert np.mean([one.items**2 for one in found]) == pytest.approx(4.0, rel=0.05)
    assert np.mean([one.seeds**2 for one in found]) == pytest.approx(0.09, rel=0.1)
    assert np.mean([one.seeds_of_mean**2 for one in found]) == pytest.approx(0.09 + 0.25 / 8, rel=0.08)
    one = found[0]
    if one.seeds:  # then it is exactly the spread of the means
        assert one.seeds_of_mean == pytest.approx(seeds.spread(tables[0].mean(axis=1)).value)


def test_components_of_a_textbook_table() -> None:
    """Seeds 0 and 2 apart on every item, items 0, 10, 20: no rest; variances 2 and 100."""
    found = seeds.variance_components([[0, 10, 20], [2, 12, 22]])
    assert (found.seeds, found.items, found.rest) == pytest.approx((math.sqrt(2), 10, 0))
    assert seeds.variance_components([[1.0, 2.0]]) is None


def test_detectable_differences_of_the_published_table() -> None:
    """Cohen (1988), table 2.4.1: at two-sided .05 and power .80, d = 1.00 takes 17 an arm, 0.50 takes 64, 0.80, 26."""
    for effect, needed in ((1.0, 17), (0.5, 64), (0.8, 26)):
        assert seeds.detection_power(1.0, effect, needed, paired=False) >= 0.8
        assert seeds.detection_power(1.0, effect, needed - 1, paired=False) < 0.8
        assert seeds.detectable_difference(1.0, needed, paired=False) <= effect
        assert seeds.detectable_difference(1.0, needed - 1, paired=False) > effect


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("paired", [True, False])
def test_the_detectable_difference_is_detected_at_its_power(count: int, paired: bool) -> None:
    difference = seeds.detectable_difference(0.5, count, paired=paired)
    if paired:
        p = stats.ttest_1samp(RNG.normal(difference, 0.5, (20000, count)), 0, axis=1).pvalue
    else:
        a, b = (RNG.normal(shift, 0.5, (20000, count)) for shift in (difference, 0))
        p = stats.ttest_ind(a, b, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.012)


def test_equivalence_is_shown_as_often_as_its_power_says() -> None:
    samples = RNG.normal(0, 0.5, (20000, 8))
    shown = np.mean([seeds.is_equivalent(sample, 0.45) for sample in samples[:5000]])
    assert shown == pytest.approx(seeds.equivalence_power(0.5, 0.45, 8), abs=0.022)
    assert seeds.is_equivalent([0.01, -0.01, 0.02], 0.1)
    assert not seeds.is_equivalent([0.01], 0.1)
    assert not seeds.is_equivalent([0.09, 0.11, 0.10], 0.1)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 11])
def test_sign_flips_are_all_enumerated(count: int) -> None:
    for values in (RNG.normal(0.4, 1, count), RNG.integers(-2, 3, count) * 0.1, np.full(count, 0.3)):
        sums = [abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
                for signs in product((1, -1), repeat=count)]  # fmt: skip
        expected = np.mean(np.array(sums) >= abs(values.sum()) - 1e-9)
        assert seeds.sign_flip_p(values) == pytest.approx(expected)


def test_sign_flip_is_scipys_permutation_test() -> None:
    values = RNG.normal(0.3, 1, 9)
    expected = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert seeds.sign_flip_p(values) == pytest.approx(expected)


def test_few_seeds_can_pass_nothing() -> None:
    """By hand, 2^(1 - seeds): 5 seeds 0.0625, 8 seeds 0.0078, 10 seeds 0.002."""
    for count, p in ((5, 0.0625), (8, 0.0078125), (10, 0.001953125)):
        assert seeds.smallest_p(count) == p
        assert seeds.sign_flip_p(np.arange(1, count + 1)) == p
    assert seeds.sign_flip_p(np.linspace(1, 2, 30)) == 2.0**-29  # not one of a billion enumerated by itself
    with pytest.raises(ValueError, match="41 seeds are more than the exact test enumerates"):
        seeds.sign_flip_p(np.ones(41))


def test_holm_of_the_published_example() -> None:
    """Holm's step-down done by hand: .01 x 4, .02 x 3, .03 x 2 -> monotone, .04 x 1 below it."""
    assert seeds.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert seeds.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert seeds.holm([]) == []


def test_seeds_to_decide_give_both_answers() -> None:
    """By simulation at the number it names; and with no noise at all, the seeds that the exact test needs."""
    needed = seeds.seeds_to_decide(0.5, 0.5, family=2)
    detected = stats.ttest_1samp(RNG.normal(0.5, 0.5, (20000, needed)), 0, axis=1).pvalue < 0.025
    shown = [seeds.is_equivalent(sample, 0.5) for sample in RNG.normal(0, 0.5, (3000, needed))]
    assert min(np.mean(detected), np.mean(shown)) >= 0.78
    fewer = needed - 1
    detected = stats.ttest_1samp(RNG.normal(0.5, 0.5, (20000, fewer)), 0, axis=1).pvalue < 0.025
    shown = [seeds.is_equivalent(sample, 0.5) for sample in RNG.normal(0, 0.5, (3000, fewer))]
    assert min(np.mean(detected), np.mean(shown)) < 0.82
    assert [seeds.seeds_to_decide(0.0, 0.1, family) for family in (1, 3, 7)] == [6, 7, 9]  # 2^(1-k) < 0.05 / family
    assert seeds.seeds_to_decide(1.0, 1e-4) is None


def test_correlation_over_seeds() -> None:
    a, b = RNG.normal(size=(2, 7))
    assert seeds.correlation(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert math.isnan(seeds.correlation([1, 2], [1, 2]))
    assert math.isnan(seeds.correlation([1, 1, 1], [1, 2, 3]))
