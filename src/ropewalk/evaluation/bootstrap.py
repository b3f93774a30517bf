"""Confidence intervals: the document bootstrap of a ratio, and Wilson's interval of a share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ropewalk.errors import UserError

BUCKET = ["position_start", "position_end"]  # of a document, in tokens
RESAMPLES = 2000
CONFIDENCE = 0.95
FEW_DOCUMENTS = 30  # below it the bootstrap interval itself is rough
Z = 1.959963984540054  # of the standard normal at 97.5%


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval and standard error over ``n`` independent units; NaN if n is 1."""

    value: float
    ci_low: float
    ci_high: float
    stderr: float
    n: int

    def columns(self) -> dict[str, float]:
        """The estimate as columns of the results table."""
        return asdict(self)


def weighted_mean(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean of measured values; one that is not a number makes the mean none, where pandas would leave it out.

    Args:
        values: (n,).
        weights: (n,), such as prompts or tokens; None: equal ones.

    Returns:
        The mean; NaN for no values or no weight.
    """
    measured = np.asarray(values, np.float64)
    shares = np.ones_like(measured) if weights is None else np.asarray(weights, np.float64)
    return float((measured * shares).sum() / shares.sum()) if shares.sum() else math.nan


def extent(values: ArrayLike) -> tuple[float, float]:
    """Lowest and highest of measured values, (n,) with n >= 1; NaN twice where one of them is not a number."""
    measured = np.asarray(values, np.float64)
    return float(measured.min()), float(measured.max())


def resample_counts(n: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """How often each of ``n`` units is drawn in each resample with replacement; int64 (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def ratio(sums: ArrayLike, counts: ArrayLike, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Sum of ``sums`` over sum of ``counts`` with the percentile bootstrap over units.

    Units (documents, prompts) are resampled whole, since tokens within one are not independent. A single unit
    has no spread to resample: interval and standard error are NaN.

    Args:
        sums: (n,) per unit, such as the summed NLL in nats.
        counts: (n,) per unit, such as its tokens.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
    """
    numerators, denominators = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    drawn = resample_counts(numerators.size, seed, resamples)
    return _estimate(
        numerators.sum() / denominators.sum(), (drawn @ numerators) / (drawn @ denominators), numerators.size
    )


def paired_ratio_difference(
    a: tuple[ArrayLike, ArrayLike], b: tuple[ArrayLike, ArrayLike], seed: int, resamples: int = RESAMPLES
) -> Estimate:
    """Ratio of a minus ratio of b over the same units, each resample drawing the same units for both.

    Args:
        a: sums and counts, (n,) each, per unit.
        b: the same, with the units in the same order.
        seed: of the resampling.
        resamples: number of bootstrap resamples.
    """
    (sums_a, counts_a), (sums_b, counts_b) = (np.asarray(side, np.float64) for side in (a, b))
    drawn = resample_counts(sums_a.size, seed, resamples)
    resampled = (drawn @ sums_a) / (drawn @ counts_a) - (drawn @ sums_b) / (drawn @ counts_b)
    return _estimate(sums_a.sum() / counts_a.sum() - sums_b.sum() / counts_b.sum(), resampled, sums_a.size)


def proportion(successes: float, n: int) -> Estimate:
    """``successes`` of ``n`` with Wilson's interval; NaN if some could not be judged.

    At 0 and at n it has a width; the bootstrap has none there.
    """
    if math.isnan(successes):
        return Estimate(math.nan, math.nan, math.nan, math.nan, n)
    share = successes / n
    scale = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # Rounding may leave the bound a hair inside the share at 0 and at n; there it equals it exactly.
    low, high = min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)
    return Estimate(share, low, high, math.sqrt(share * (1 - share) / n), n)


def _estimate(value: float, resampled: NDArray[np.float64], n: int) -> Estimate:
    if n < 2:
        return Estimate(float(value), math.nan, math.nan, math.nan, n)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high), float(resampled.std(ddof=1)), n)


def paired_difference(
    documents_a: pd.DataFrame, documents_b: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """Mean NLL of a minus that of b in each bucket that both have, paired document by document.

    Documents differ far more from one another than methods do on one document; pairing takes that out.
    Losses per token compare only between runs with one tokenizer.

    Args:
        documents_a: losses by document of one run under one setting: document, position_start, position_end,
            nll_sum and tokens at least.
        documents_b: those of the other.
        seed: of the bootstrap over documents.
        resamples: number of resamples.

    Returns:
        position_start, position_end, value, ci_low, ci_high (nats per token), n (documents that both scored).
        Negative: a predicts better. The interval is NaN with one document; no rows: no document is shared.

    Raises:
        UserError: for a document with two rows for one bucket, so that settings or runs are mixed.
    """
    both = documents_a.merge(documents_b, on=["document", *BUCKET], suffixes=("_a", "_b")).sort_values("document")
    if both.duplicated(["document", *BUCKET]).any():
        raise UserError(
            "a document has several rows for one bucket; select one run, setting and context_length of "
            "documents.parquet before comparing"
        )
    rows = []
    for (start, end), bucket in both.groupby(BUCKET):
        a, b = ((bucket[f"nll_sum_{side}"], bucket[f"tokens_{side}"]) for side in "ab")
        estimate = paired_ratio_difference(a, b, seed, resamples)
        rows.append((start, end, estimate.value, estimate.ci_low, estimate.ci_high, estimate.n))
    return pd.DataFrame(rows, columns=[*BUCKET, "value", "ci_low", "ci_high", "n"])
