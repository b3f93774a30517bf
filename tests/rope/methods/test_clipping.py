"""Windows against SciPy's, and the two taper domains against their formulas."""

import numpy as np
import pytest
from scipy.signal import windows as scipy_windows

from ropewalk.rope import RopeChain
from ropewalk.rope.methods.clipping import WINDOWS, taper

GEOMETRIC = 1e7 ** (-np.arange(44, 64) / 64)


@pytest.mark.parametrize(("name", "scipy"), [
    ("raised_cosine", scipy_windows.hann), ("blackman", scipy_windows.blackman), ("linear", scipy_windows.bartlett),
    ("kaiser", lambda n: scipy_windows.kaiser(n, 8.6)),
])  # fmt: skip
@pytest.mark.parametrize("clip", [2, 3, 20, 64])
def test_falling_half_of_the_named_window(name, scipy, clip):
    whole = np.clip(scipy(2 * clip - 1), 0, 1)
    weights = taper(np.geomspace(1, 1e-3, clip), name, "index")
    np.testing.assert_allclose(weights, whole[clip - 1 :], atol=1e-15)


def test_quarter_cosine_at_known_angles():
    weights = taper(np.geomspace(1, 1e-3, 4), "quarter_cosine", "index")
    np.testing.assert_allclose(weights, [1, np.sqrt(3) / 2, 0.5, 0], atol=1e-15)


@pytest.mark.parametrize("domain", ["index", "frequency"])
@pytest.mark.parametrize("name", list(WINDOWS))
@pytest.mark.parametrize("clip", [0, 1, 2, 7, 20])
def test_every_taper_falls_from_one_within_bounds(name, domain, clip):
    weights = taper(GEOMETRIC[:clip], name, domain)
    assert weights.shape == (clip,)
    assert np.all((weights >= 0) & (weights <= 1))
    assert np.all(np.diff(weights) <= 0)
    if clip > 1:
        assert weights[0] == 1.0
        assert (weights[-1] == 0.0) == (name != "kaiser")
        if name == "kaiser":
            assert weights[-1] == pytest.approx(1 / np.i0(8.6), rel=1e-12)
    elif clip == 1:
        assert weights[0] == 1.0


def test_frequency_domain_is_linear_in_frequency():
    weights = taper(GEOMETRIC, "linear", "frequency")
    np.testing.assert_allclose(weights, (GEOMETRIC - GEOMETRIC[-1]) / (GEOMETRIC[0] - GEOMETRIC[-1]), atol=1e-15)
    cope = {"method": "cope", "clip": 20, "taper_domain": "frequency"}
    inputs = {"head_dim": 128, "theta": 1e7, "pretrained_length": 8192, "trained_length": 65536}
    s, rope = RopeChain([cope]).spectrum(**inputs).inv_freq, RopeChain([]).spectrum(**inputs).inv_freq
    share = (rope[44] - rope[44:]) / (rope[44] - rope[63])
    np.testing.assert_allclose(s[44:], rope[44:] * (1 + np.cos(np.pi * share)) / 2, atol=1e-18)
    assert np.array_equal(s[:45], rope[:45])


def test_pairs_of_one_frequency_are_untouched():
    assert taper(np.full(3, 0.1), "raised_cosine", "frequency").tolist() == [1, 1, 1]
