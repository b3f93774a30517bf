"""Kernels, phases, ringing and the singular value against closed forms, explicit matrices and sampling."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import sici

from ropewalk.figures.spectrum.kernels import (
    banded,
    changed_pairs,
    cosine_integral,
    first_not_positive,
    first_singular_value_ratio,
    kernel,
    many_pair_kernel,
    ringing,
    semantic_advantage,
    unseen_phases,
    upper_envelope,
)
from ropewalk.rope import RopeChain, Spectrum

ABF = {"method": "abf", "theta": 1e7}


def spectrum(*steps: dict, head_dim: int = 128) -> Spectrum:
    chain = RopeChain([ABF, *steps])
    return chain.spectrum(head_dim=head_dim, theta=5e5, pretrained_length=8192, trained_length=65536)


def test_kernel_is_the_mean_cosine_at_every_distance() -> None:
    inv_freq = np.append(1e4 ** (-np.arange(15) / 15), 0.0)
    found = kernel(inv_freq, 5000, attention_scaling=1.25)
    expected = 1.25**2 * np.cos(np.outer(np.arange(5000), inv_freq)).mean(axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025])
def test_kernel_has_one_value_for_each_distance(length: int) -> None:
    found = kernel(np.array([0.3]), length)
    assert found.shape == (length,)
    assert found[-1] == pytest.approx(np.cos(0.3 * (length - 1)), abs=1e-12)


def test_kernel_is_exact_at_a_million_tokens() -> None:
    inv_freq = spectrum().inv_freq
    # 2^20 theta mod 2 pi in extended precision
    phases = np.longdouble(2**20) * inv_freq.astype(np.longdouble)
    assert kernel(inv_freq, 2**20 + 1)[-1] == pytest.approx(float(np.cos(phases).mean()), abs=1e-9)


def test_bands_hold_every_integer_distance_once() -> None:
    values = np.arange(1000.0)  # at distance m the value m
    bands = banded(values, per_octave=4)
    assert bands.low[0] == bands.high[0] == bands.mean[0] == 1
    np.testing.assert_array_equal(bands.low[1:], bands.high[:-1] + 1)  # no gap, no overlap
    assert bands.high[-1] == 999
    np.testing.assert_allclose(bands.mean, (bands.low + bands.high) / 2)
    np.testing.assert_allclose(bands.distance, np.sqrt(bands.low * bands.high))


def test_semantic_advantage_by_sampling() -> None:
    """E[q^T R_m (q + noise)] - E[q^T R_m k], sampled with explicit rotations."""
    rng = np.random.default_rng(0)
    head_dim, samples, sigma = 16, 100_000, 1.7
    inv_freq = 100.0 ** (-np.arange(8) / 8)
    distances = (1, 7, 40)
    expected = semantic_advantage(inv_freq, 41)
    assert expected[0] == 1
    q, noise, k = (rng.normal(0, s, (samples, head_dim)) for s in (sigma, 0.5, sigma))
    for distance in distances:
        cos, sin = np.cos(distance * inv_freq), np.sin(distance * inv_freq)
        scores = []
        for key in (q + noise, k):
            x, y = key[:, :8], key[:, 8:]
            rotated = np.hstack([x * cos - y * sin, x * sin + y * cos])
            scores.append((q * rotated).sum(axis=1))
        difference = (scores[0] - scores[1]) / (head_dim * sigma**2)  # its value at distance 0: d sigma^2
        standard_error = difference.std() / np.sqrt(samples)
        assert difference.mean() == pytest.approx(expected[distance], abs=4 * standard_error)


def test_first_not_positive() -> None:
    assert first_not_positive(np.array([1.0, 0.5, 0.0, -1.0])) == 2
    assert first_not_positive(np.array([1.0, 0.5])) is None
    # A single pair, cos(m): positive at 0 and 1, negative at 2 (2 > pi/2).
    assert first_not_positive(semantic_advantage(np.array([1.0]), 10)) == 2


def test_changed_pairs_of_known_methods() -> None:
    assert not changed_pairs(spectrum()).any()
    hard = changed_pairs(spectrum({"method": "hardclip", "clip": 20}))
    assert np.flatnonzero(hard).tolist() == list(range(44, 64))
    soft = changed_pairs(spectrum({"method": "cope", "clip": 20}))
    assert np.flatnonzero(soft).tolist() == list(range(45, 64))  # the first weight is 1


def test_unseen_phases_of_every_kind_of_pair() -> None:
    # Trained to 100, used at 400. Periods: 50 (whole in training), 200 (half a turn seen, whole needed), 800 (1/8 seen,
    # 1/2 needed), infinite.
    inv_freq = np.array([2 * np.pi / 50, 2 * np.pi / 200, 2 * np.pi / 800, 0.0])
    share, circle = unseen_phases(inv_freq, 100, 400)
    np.testing.assert_allclose(share, [0, 0.5, 0.75, 0], atol=1e-15)
    np.testing.assert_allclose(circle, [0, 0.5, 3 / 8, 0], atol=1e-15)


def test_unseen_phases_count_as_the_design_does() -> None:
    share, _ = unseen_phases(spectrum().inv_freq, 65536, 262144)
    assert int(np.sum(share > 0)) == 27  # periods above 64k at base 1e7
    assert share.max() == pytest.approx(1 - 65536 / 262144)


@pytest.mark.parametrize("length", [1, 2, 17, 1500])
@pytest.mark.parametrize("stopped", [0, 3])
def test_first_singular_value_is_numpys(length: int, stopped: int) -> None:
    inv_freq = 1e3 ** (-np.arange(8) / 8)
    inv_freq[8 - stopped :] = 0
    rng = np.random.default_rng(length)
    angle = rng.uniform(0, 2 * np.pi, 8)  # the direction of v within each pair does not matter
    phases = np.outer(np.arange(length), inv_freq) + angle
    rotated = np.hstack([np.cos(phases), np.sin(phases)])
    unrotated = np.ones((length, 1)) * rotated[0]
    expected = np.linalg.svd(rotated)[1][0] / np.linalg.svd(unrotated)[1][0]
    assert first_singular_value_ratio(inv_freq, length) == pytest.approx(expected, rel=1e-10)


def test_first_singular_value_limits() -> None:
    turning = 2 * np.pi / np.geomspace(5, 60, 16)
    # All pairs turn many times: the Gram is I/d plus terms of order 1/N.
    assert first_singular_value_ratio(turning, 10**6) == pytest.approx(32**-0.5, rel=1e-3)
    assert first_singular_value_ratio(np.array([0.7]), 10**6) == pytest.approx(2**-0.5, rel=1e-5)
    assert first_singular_value_ratio(np.zeros(16), 1000) == pytest.approx(1)
    half = np.where(np.arange(16) < 8, turning, 0.0)
    assert first_singular_value_ratio(half, 10**6) == pytest.approx(0.5**0.5, rel=1e-3)


@pytest.mark.parametrize("pairs", [1, 2, 8, 64])
def test_first_singular_value_lies_between_its_bounds_where_all_turn(pairs: int) -> None:
    inv_freq = 2 * np.pi / np.geomspace(3, 200, pairs)
    ratio = first_singular_value_ratio(inv_freq, 10**6)
    assert (2 * pairs) ** -0.5 * (1 - 1e-12) <= ratio <= 2**-0.5 * (1 + 1e-5)


def test_cosine_integral_is_scipys() -> None:
    x = np.geomspace(1e-6, 1e8, 5001)
    np.testing.assert_allclose(cosine_integral(x), sici(x)[1], atol=1e-13)


@pytest.mark.parametrize("taper", ["cut", "frequency", "amplitude"])
def test_many_pair_kernel_is_the_limit_of_many_pairs(taper: str) -> None:
    """The mean over 200,000 pairs at midpoints, the cut's clipped pairs counted as nothing."""
    theta, kept, pairs = 1e3, 0.6, 200_000
    u = (np.arange(pairs) + 0.5) / pairs
    window = np.where(u < kept, 1.0, 0.5 * (1 + np.cos(np.pi * (u - kept) / (1 - kept))))
    frequency, share = theta**-u, np.ones(pairs)
    if taper == "cut":
        share = (u < kept).astype(float)
    elif taper == "frequency":
        frequency = frequency * window
    else:
        share = window
    distance = np.array([1.0, 30.0, 500.0, 4000.0])
    expected = np.cos(np.outer(distance, frequency)) @ share / pairs
    np.testing.assert_allclose(many_pair_kernel(distance, theta, kept, taper), expected, atol=2e-6)


def test_the_hard_cut_rings_with_the_closed_form_envelope() -> None:
    theta, kept = 1e7, 44 / 64
    period = 2 * np.pi * theta**kept
    constant = theta**kept / np.log(theta)
    # Quarter turns after whole periods: sin(m theta_c) = 1, so the kernel is -C/m up to order 1/m^2.
    distance = (np.array([30, 60]) + 0.25) * period
    np.testing.assert_allclose(many_pair_kernel(distance, theta, kept, "cut") * distance / -constant, 1, rtol=1e-3)


def test_the_soft_clip_of_frequencies_leaves_a_slow_tail() -> None:
    """Near its end w(u) ~ (pi s / (2 (1 - kept)))^2, so the tail is Fresnel's: sqrt(pi / (8 m a))."""
    theta, kept = 1.5, 0.5
    curvature = theta**-1 * (np.pi / (2 * (1 - kept))) ** 2  # frequency ~ a s^2, s the way left to the last pair
    distance = np.linspace(300, 360, 2001)  # many turns of the ringing ends, which average out
    values = many_pair_kernel(distance, theta, kept, "frequency")
    assert np.mean(values * np.sqrt(distance)) == pytest.approx(np.sqrt(np.pi / (8 * curvature)), rel=0.02)


def test_ringing_takes_off_what_is_smooth_over_a_period() -> None:
    steps = np.arange(0, 10, 1 / 32)  # periods
    wave, line = np.cos(2 * np.pi * steps), 3 - 0.1 * steps
    np.testing.assert_allclose(ringing(wave + line, 32), wave[16:-16], atol=1e-12)


def test_upper_envelope() -> None:
    np.testing.assert_array_equal(upper_envelope(np.array([1.0, -3.0, 2.0, -1.0])), [3, 3, 2, 1])
