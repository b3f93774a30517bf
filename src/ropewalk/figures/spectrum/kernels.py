"""Kernels, phases, ringing and the first singular value of a spectrum, in numbers.

Throughout, ``inv_freq`` is float64 (d/2,), radians per token, highest first, 0 where a pair does not rotate. Distances
and lengths are tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ropewalk.rope.methods.clipping import raised_cosine
from ropewalk.rope.spectrum import FloatArray, Spectrum, geometric

BLOCK = 1024  # distances whose cosines are tabulated; every other one follows by the addition theorem
SMOOTH_NODES = 512  # Gauss-Legendre nodes: exact to rounding for up to about 800 radians across the interval
LAGUERRE_NODES = 48
SERIES_LIMIT = 4.0  # below, Ci by its power series; above, by its auxiliary functions
# A run records its frequencies as float32; a base read off the first two carries that rounding to the last pair.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Bands:
    """A function of distance summarised in buckets of equal width on a logarithmic axis.

    Attributes:
        distance: float64 (buckets,), tokens, the geometric middle of each bucket.
        low: float64 (buckets,), the minimum over all integer distances of the bucket.
        mean: float64 (buckets,), their mean.
        high: float64 (buckets,), their maximum.
    """

    distance: FloatArray
    low: FloatArray
    mean: FloatArray
    high: FloatArray


def kernel(inv_freq: FloatArray, length: int, attention_scaling: float = 1.0) -> FloatArray:
    """The attention kernel a^2 2/d sum_i cos(m theta_i) at every distance m = 0..length-1.

    It is the expected logit of a query on its own copy m tokens back, over d channels of equal variance, relative to
    plain attention; a is the attention scaling, which multiplies queries and keys alike. Splitting m into a multiple
    of 1,024 and a rest turns 1M x d/2 cosines into one product of (length/1024, d) and (d, 1024).

    Returns:
        float64 (length,); the result and tables of about length/8 numbers are all that is held.
    """
    starts = np.arange(0, length, BLOCK, dtype=np.float64)
    rest = np.arange(BLOCK, dtype=np.float64)
    of_starts, of_rest = np.outer(starts, inv_freq), np.outer(inv_freq, rest)
    left = np.hstack([np.cos(of_starts), -np.sin(of_starts)])
    right = np.vstack([np.cos(of_rest), np.sin(of_rest)])
    right *= attention_scaling**2 / inv_freq.size
    return (left @ right).ravel()[:length]


def semantic_advantage(inv_freq: FloatArray, length: int) -> FloatArray:
    """How far a similar key outscores a random one at distance m = 0..length-1, relative to distance 0.

    With queries and random keys independent, of zero mean and variance sigma^2 per channel, and a similar key equal to
    the query plus independent noise, E[q^T R_m (q + noise)] - E[q^T R_m k] = 2 sigma^2 sum_i cos(m theta_i): the cross
    terms of the 2 x 2 rotation vanish (after Men et al., arXiv 2405.14591). A mean that q and k share would cancel.
    Attention scaling multiplies every distance alike, so the ratio is free of it.

    Returns:
        float64 (length,), 1 at distance 0.
    """
    return kernel(inv_freq, length)


def first_not_positive(values: FloatArray) -> int | None:
    """The smallest index at which ``values`` is zero or below; None where it never is."""
    where = values <= 0
    return int(where.argmax()) if where.any() else None


def banded(values: FloatArray, per_octave: int = 16) -> Bands:
    """``values`` at distances 0, 1, 2, ... in logarithmic buckets; distance 0, which has no place there, is left out.

    Args:
        values: float64 (length,), one for each integer distance.
        per_octave: buckets in a doubling of distance; at small distances a bucket is one integer.
    """
    powers = np.arange(0, np.log2(values.size), 1 / per_octave)
    starts = np.unique(np.round(2.0**powers).astype(np.int64))
    starts = starts[starts < values.size]
    ends = np.append(starts[1:], values.size)
    return Bands(
        np.sqrt(starts * (ends - 1.0)),
        np.minimum.reduceat(values, starts),
        np.add.reduceat(values, starts) / (ends - starts),
        np.maximum.reduceat(values, starts),
    )


def changed_pairs(spectrum: Spectrum) -> NDArray[np.bool_]:
    """Pairs that differ from RoPE of the spectrum's own base by more than rounding; bool (d/2,)."""
    return ~np.isclose(spectrum.inv_freq, geometric(spectrum.theta, spectrum.head_dim), rtol=ROUNDING, atol=0)


def unseen_phases(inv_freq: FloatArray, train_length: int, target_length: int) -> tuple[FloatArray, FloatArray]:
    """The phases at ``target_length`` that training at ``train_length`` never reached, as two shares.

    A pair trained to T tokens has met the phases [0, min(2 pi, T theta_i)); at L it needs [0, min(2 pi, L theta_i)).

    Returns:
        float64 (d/2,) each, in [0, 1): (needed - seen) / needed, the out-of-distribution share, which is 0 once a pair
        turns whole in T and 1 - T/L where it does not even in L; and (needed - seen) / (2 pi), the same angle as a
        share of the circle, which is small for pairs that hardly move. A pair that does not rotate has the one phase
        0, which is seen: both are 0.
    """
    covered = np.minimum(train_length * inv_freq / (2 * np.pi), 1)
    needed = np.minimum(target_length * inv_freq / (2 * np.pi), 1)
    unseen = np.maximum(needed - covered, 0)
    return np.where(needed > 0, unseen / np.where(needed > 0, needed, 1), 0.0), unseen


def first_singular_value_ratio(inv_freq: FloatArray, length: int) -> float:
    """sigma_1 of rotated keys over sigma_1 of the same keys unrotated, for keys that are all one vector.

    K = 1 v^T has ``length`` rows v, of equal energy in every pair, and sigma_1(K) = |v| sqrt(length). Row m rotated by
    m leaves a matrix R(K) whose d x d Gram is made of sums of cos and sin of m (theta_i +- theta_j), each a geometric
    series. The direction of v within a pair does not matter, since turning a pair for all rows alike is orthogonal.

    Where all pairs turn many times and differ, the Gram tends to a multiple of the identity, so the ratio to 1/sqrt(d).
    A lone turning pair has 1/sqrt(2), and a share s of unrotated pairs holds the ratio at sqrt(s) or above.
    """
    difference = _mean_of_series(np.subtract.outer(inv_freq, inv_freq), length)
    total = _mean_of_series(np.add.outer(inv_freq, inv_freq), length)
    cos_cos = (difference + total).real / 2
    sin_sin = (difference - total).real / 2
    cos_sin = (total - difference).imag / 2
    gram = np.block([[cos_cos, cos_sin], [cos_sin.T, sin_sin]]) / inv_freq.size
    return float(np.sqrt(np.linalg.eigvalsh(gram)[-1]))


def _mean_of_series(angle: FloatArray, length: int) -> NDArray[np.complex128]:
    """The mean of exp(i m angle) over m = 0..length-1."""
    half = angle / 2
    sine = np.sin(half)
    flat = sine == 0  # angle 0: every term is 1
    size = np.where(flat, 1.0, np.sin(length * half) / (length * np.where(flat, 1.0, sine)))
    return size * np.exp(1j * (length - 1) * half)


def cosine_integral(x: FloatArray) -> FloatArray:
    """Ci(x) for x > 0, to 1e-13 (Abramowitz and Stegun, 5.2.16 and 5.2.9 with 5.2.12 and 5.2.13).

    Args:
        x: float64, any shape.
    """
    small = np.minimum(x, SERIES_LIMIT)
    term, series = np.ones_like(small), np.euler_gamma + np.log(small)
    for n in range(1, 20):
        term = -term * small**2 / ((2 * n - 1) * 2 * n)
        series = series + term / (2 * n)
    large = np.maximum(x, SERIES_LIMIT)
    nodes, weights = np.polynomial.laguerre.laggauss(LAGUERRE_NODES)
    # f = int exp(-xt) / (1 + t^2) dt and g = int t exp(-xt) / (1 + t^2) dt, with s = x t.
    scaled = nodes / large[..., None]
    share = weights / (1 + scaled**2)
    f, g = share.sum(-1) / large, (share * scaled).sum(-1) / large
    return np.where(x < SERIES_LIMIT, series, f * np.sin(large) - g * np.cos(large))


def many_pair_kernel(distance: FloatArray, theta: float, kept: float, taper: str) -> FloatArray:
    """The kernel of infinitely many pairs, theta^(-u) for u in [0, 1), whose share above ``kept`` is clipped.

    With theta_c = theta^(-kept), the kept part is int_0^kept cos(m theta^(-u)) du = (Ci(m) - Ci(m theta_c)) / ln theta.
    For large m it is -sin(m theta_c) / (m theta_c ln theta): ringing with the cut's own period and the envelope C / m,
    C = 1 / (theta_c ln theta). The clipped part adds, with w the raised cosine from 1 at ``kept`` to 0 at 1:

    - ``cut``: nothing. Its pairs stop, and their constant share 1 - kept is left out.
    - ``frequency``: int cos(m theta^(-u) w(u)) du, CoPE's clip, which slows pairs. Near its end frequencies fall to 0
      as the square of the way left, so a tail of order m^(-1/2) without a sign change remains.
    - ``amplitude``: int w(u) cos(m theta^(-u)) du, the textbook window, which fades pairs out and keeps their speed.

    Args:
        distance: float64 (n,), above 0, at most a few hundred periods of the cut.
        theta: base.
        kept: share of pairs before the clip, 0..1.
        taper: ``cut``, ``frequency`` or ``amplitude``.

    Returns:
        float64 (n,).
    """
    cut = theta**-kept
    head = (cosine_integral(distance) - cosine_integral(distance * cut)) / np.log(theta)
    if taper == "cut":
        return head
    nodes, weights = np.polynomial.legendre.leggauss(SMOOTH_NODES)
    offset = (nodes + 1) / 2  # 0 at the onset, 1 at the last pair
    window = raised_cosine(offset)
    frequency = theta ** -(kept + (1 - kept) * offset)
    speed, share = (frequency * window, 1.0) if taper == "frequency" else (frequency, window)
    return head + np.cos(np.outer(distance, speed)) @ (share * weights * (1 - kept) / 2)


def ringing(values: FloatArray, per_period: int) -> FloatArray:
    """Evenly spaced ``values`` less their mean over one period around each.

    Args:
        values: float64 (n,).
        per_period: samples in a period, even; half of them are lost at either end.

    Returns:
        float64 (n - per_period,), for values[per_period // 2 : -(per_period // 2)].
    """
    half = per_period // 2
    weights = np.full(per_period + 1, 1 / per_period)
    weights[[0, -1]] /= 2  # trapezoid: the two ends are the same phase
    return values[half:-half] - np.convolve(values, weights, mode="valid")


def upper_envelope(values: FloatArray) -> FloatArray:
    """The largest |value| from each index to the end; float64, never rising."""
    return np.maximum.accumulate(np.abs(values)[::-1])[::-1]
