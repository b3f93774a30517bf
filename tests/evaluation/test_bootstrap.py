from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ropewalk.evaluation.bootstrap import paired_ratio_difference, proportion, ratio, resample_counts


def test_ratio_matches_all_possible_resamples() -> None:
    sums, counts = np.array([3.0, 10.0, 4.0, 9.0]), np.array([2.0, 4.0, 3.0, 3.0])
    every = np.array(
        [sums[list(drawn)].sum() / counts[list(drawn)].sum() for drawn in itertools.product(range(4), repeat=4)]
    )
    estimate = ratio(sums, counts, seed=0, resamples=20_000)
    assert estimate.value == pytest.approx(26 / 12)
    assert estimate.stderr == pytest.approx(every.std(), rel=0.03)
    assert estimate.ci_low == pytest.approx(np.quantile(every, 0.025), abs=0.05)
    assert estimate.ci_high == pytest.approx(np.quantile(every, 0.975), abs=0.05)


def test_stderr_of_equal_counts_is_the_closed_form() -> None:
    sums = np.random.default_rng(1).normal(5, 2, size=60)
    estimate = ratio(sums, np.ones(60), seed=0, resamples=20_000)
    assert estimate.stderr == pytest.approx(sums.std() / math.sqrt(60), rel=0.03)


def test_units_are_resampled_whole() -> None:
    counts = resample_counts(7, seed=3, resamples=500)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean() == pytest.approx(1.0)


def test_one_unit_has_no_interval() -> None:
    estimate = ratio([6.0], [3.0], seed=0)
    assert estimate.value == 2.0
    assert estimate.n == 1
    assert math.isnan(estimate.ci_low)
    assert math.isnan(estimate.ci_high)
    assert math.isnan(estimate.stderr)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_the_published_one(successes: int, n: int, low: float, high: float) -> None:
    estimate = proportion(successes, n)
    assert estimate.value == successes / n
    assert estimate.ci_low == pytest.approx(low, abs=5e-5)
    assert estimate.ci_high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_at_all_successes_contains_one() -> None:
    estimate = proportion(20, 20)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert estimate.ci_high == 1.0


def test_paired_difference_of_a_constant_shift_has_no_width() -> None:
    counts = np.full(5, 4.0)
    a = np.array([3.0, 9.0, 1.0, 7.0, 20.0])
    estimate = paired_ratio_difference((a, counts), (a + 4 * 0.25, counts), seed=0)
    assert (estimate.value, estimate.ci_low, estimate.ci_high) == pytest.approx((-0.25, -0.25, -0.25))


def test_paired_difference_uses_each_sides_own_counts() -> None:
    a, b = ([2.0, 4.0], [1.0, 2.0]), ([9.0, 3.0], [3.0, 1.0])
    assert paired_ratio_difference(a, b, seed=0).value == pytest.approx(6 / 3 - 12 / 4)
