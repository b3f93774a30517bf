"""Statistics of one number a seed: spread, variance components, power, exact tests, equivalence.

A seed is one training run. Values are (seeds,) for one arm; differences are those of two arms seed by seed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

from ropewalk.errors import UserError

ALPHA = 0.05  # two-sided
POWER = 0.8
EQUIVALENCE_CONFIDENCE = 0.90  # two one-sided tests at 5% each
MOST_SEEDS = 10_000  # beyond it the answer is "more"
MOST_EXACT = 40  # seeds of the exact test: 2^20 sums for each half


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval, over ``n`` seeds; the interval is NaN below two."""

    value: float
    low: float
    high: float
    n: int


def mean_over_seeds(values: ArrayLike, confidence: float = 1 - ALPHA) -> Interval:
    """Mean with Student's t interval over seeds."""
    sample = np.asarray(values, np.float64)
    n = sample.size
    if n < 2:
        return Interval(float(sample.mean()), math.nan, math.nan, n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n))
    return Interval(float(sample.mean()), float(sample.mean()) - half, float(sample.mean()) + half, n)


def spread(values: ArrayLike, confidence: float = 1 - ALPHA) -> Interval:
    """Standard deviation between seeds with its chi-square interval, for normal values; NaN below two seeds."""
    sample = np.asarray(values, np.float64)
    n = sample.size
    if n < 2:
        return Interval(math.nan, math.nan, math.nan, n)
    deviation = float(sample.std(ddof=1))
    upper, lower = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], n - 1)
    return Interval(deviation, deviation * math.sqrt((n - 1) / upper), deviation * math.sqrt((n - 1) / lower), n)


@dataclass(frozen=True)
class Components:
    """Standard deviations of a crossed design of seeds and items (documents, prompts).

    Attributes:
        seeds: between seeds over infinitely many items.
        items: between items over infinitely many seeds.
        rest: of one item under one seed, beyond both.
        seeds_of_mean: between seeds of the mean over these items, sqrt(seeds^2 + rest^2 / number of items): what
            :func:`spread` of the means estimates.
    """

    seeds: float
    items: float
    rest: float
    seeds_of_mean: float


def variance_components(values: ArrayLike) -> Components | None:
    """Seeds and items separated by the two-way analysis of variance without replication, both random.

    Expected mean squares (Searle, Casella, McCulloch, Variance Components, 1992, section 4.5): rest^2;
    rest^2 + items x seeds^2; rest^2 + number of seeds x items^2. A negative estimate counts as 0.

    Args:
        values: (seeds, items), every item under every seed.

    Returns:
        None with fewer than two seeds or items.
    """
    table = np.asarray(values, np.float64)
    seeds, items = table.shape
    if seeds < 2 or items < 2:
        return None
    by_seed, by_item = table.mean(axis=1), table.mean(axis=0)
    residual = table - by_seed[:, None] - by_item[None] + table.mean()
    rest = float((residual**2).sum() / ((seeds - 1) * (items - 1)))
    of_seeds = max(0.0, float(by_seed.var(ddof=1)) - rest / items)
    of_items = max(0.0, float(by_item.var(ddof=1)) - rest / seeds)
    return Components(math.sqrt(of_seeds), math.sqrt(of_items), math.sqrt(rest), math.sqrt(of_seeds + rest / items))


def correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of two arms over their common seeds; NaN below three seeds or without spread."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.size < 3 or not first.std() or not second.std():
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def detection_power(sd: float, difference: float, seeds: int, *, paired: bool, alpha: float = ALPHA) -> float:
    """Power of the two-sided t test for a true ``difference``, by the noncentral t distribution.

    Args:
        sd: paired: of the differences seed by seed; else of either arm.
        difference: true difference of the means.
        seeds: of each arm, 2 or more.
        paired: one sample of differences, or two samples.
        alpha: two-sided level.
    """
    if not sd:
        return 1.0
    scale = math.sqrt((1 if paired else 2) / seeds)
    return _power(abs(difference) / (sd * scale), (seeds - 1) * (1 if paired else 2), alpha)


def detectable_difference(sd: float, seeds: int, *, paired: bool, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest true difference that ``seeds`` seeds an arm detect at ``power``; arguments of detection_power.

    NaN below two seeds or for an unknown ``sd``.
    """
    if seeds < 2 or math.isnan(sd):
        return math.nan
    degrees, scale = (seeds - 1) * (1 if paired else 2), math.sqrt((1 if paired else 2) / seeds)
    most = 10 * float(stats.t.ppf(1 - alpha / 2, degrees)) + 10
    shift = brentq(lambda noncentrality: _power(noncentrality, degrees, alpha) - power, 0.0, most)
    return float(shift) * sd * scale


def equivalence_power(sd: float, difference: float, seeds: int) -> float:
    """Probability that the 90% interval of the mean lies inside +-``difference`` where the true difference is 0.

    The mean is normal and independent of the sample's deviation, over whose chi-square quantiles this averages.
    """
    if not sd:
        return 1.0
    shares = (np.arange(2000) + 0.5) / 2000
    deviations = sd * np.sqrt(stats.chi2.ppf(shares, seeds - 1) / (seeds - 1))
    error = math.sqrt(seeds)
    left = difference - stats.t.ppf((1 + EQUIVALENCE_CONFIDENCE) / 2, seeds - 1) * deviations / error
    return float(np.maximum(0.0, 2 * stats.norm.cdf(left * error / sd) - 1).mean())


def seeds_to_decide(sd: float, difference: float, family: int = 1, power: float = POWER) -> int | None:
    """Paired seeds with which either answer is to be had at ``power``; None: more than ``MOST_SEEDS``.

    A true difference of ``difference`` passes the test, by the t test's power at the first of Holm's levels,
    ``ALPHA`` / ``family``, and if the exact test can pass it at all. A true difference of 0 is shown to be none.
    """

    def enough(seeds: int) -> bool:
        return (
            smallest_p(seeds) * family < ALPHA
            and detection_power(sd, difference, seeds, paired=True, alpha=ALPHA / family) >= power
            and equivalence_power(sd, difference, seeds) >= power
        )

    seeds = 2 + bisect_left(range(2, MOST_SEEDS + 1), True, key=enough)  # what is enough stays so with more
    return seeds if seeds <= MOST_SEEDS else None


def sign_flip_p(differences: ArrayLike) -> float:
    """Two-sided p of the exact sign-flip test of mean 0: of all 2^n signs, the share whose |sum| is as large.

    Under the hypothesis each seed's difference is symmetric about 0 (Fisher, The Design of Experiments, 1935, section
    21). The sums of both halves of the seeds are enumerated, so this is exact.

    Raises:
        UserError: for more than ``MOST_EXACT`` seeds.
    """
    sample = np.asarray(differences, np.float64)
    if sample.size > MOST_EXACT:
        raise UserError(f"{sample.size} seeds are more than the exact test enumerates, {MOST_EXACT}; leave some out")
    # Sums that differ by rounding alone are equal.
    least = abs(float(sample.sum())) - 1e-9 * float(np.abs(sample).sum())
    if least <= 0:
        return 1.0
    half = sample.size // 2
    first, second = _signed_sums(sample[:half]), np.sort(_signed_sums(sample[half:]))
    above = second.size - np.searchsorted(second, least - first, side="left")
    below = np.searchsorted(second, -least - first, side="right")
    return float((above + below).sum()) / 2**sample.size


def smallest_p(seeds: int) -> float:
    """The smallest two-sided p that the sign-flip test can give: all signs alike, 2^(1 - seeds)."""
    return min(1.0, 2.0 ** (1 - seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (Scandinavian Journal of Statistics 6, 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def is_equivalent(differences: ArrayLike, difference: float) -> bool:
    """True if the 90% t interval of the mean lies inside +-``difference`` (two one-sided tests at 5%)."""
    mean = mean_over_seeds(differences, EQUIVALENCE_CONFIDENCE)
    return -difference < mean.low and mean.high < difference  # NaN below two seeds: not


def _power(noncentrality: float, degrees: int, alpha: float) -> float:
    critical = float(stats.t.ppf(1 - alpha / 2, degrees))
    upper = stats.nct.sf(critical, degrees, noncentrality)
    lower = stats.nct.cdf(-critical, degrees, noncentrality)
    return float(upper + np.nan_to_num(lower))  # of a far tail that scipy cannot compute


def _signed_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums
