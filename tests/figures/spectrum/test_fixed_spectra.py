"""The textbook head against the published rule, and the decay against numpy's singular values."""

from __future__ import annotations

import numpy as np
import pytest
from figures.drawings import LENGTHS, ROPE, axes_of, curve, marked, sample_spectra

from ropewalk.figures.spectrum.fixed_spectra import COMPARED, decay_figure, textbook_figure
from ropewalk.rope import Spectrum


@pytest.fixture(scope="module")
def spectra() -> dict[str, Spectrum]:
    return sample_spectra()


def test_textbook_has_the_three_spectra_and_the_thresholds(spectra: dict[str, Spectrum]) -> None:
    figure = textbook_figure(spectra, **LENGTHS)
    frequency, ratio = axes_of(figure)
    original = 1e4 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(curve(frequency, "original")[1], original)
    np.testing.assert_allclose(curve(frequency, "linear, factor 8")[1], original / 8)
    scaled = curve(ratio, "Llama 3.1, factor 8")[1]
    wavelength = 2 * np.pi / original
    np.testing.assert_allclose(scaled[wavelength < 2048], 1)
    np.testing.assert_allclose(scaled[wavelength > 8192], 1 / 8)
    # The published rule: smooth = (8192 / wavelength - 1) / (4 - 1), (1 - smooth) / 8 + smooth
    smooth = (8192 / wavelength - 1) / 3
    between = (wavelength >= 2048) & (wavelength <= 8192)
    np.testing.assert_allclose(scaled[between], ((1 - smooth) / 8 + smooth)[between])
    assert marked(frequency, "wavelength 4")[1] == pytest.approx(2 * np.pi / 2048)
    assert marked(frequency, "wavelength 1")[1] == pytest.approx(2 * np.pi / 8192)
    counts = int(np.sum(wavelength < 2048)), int(np.sum(wavelength > 8192)), int(np.sum(between))
    kept, divided, blended = map(str, counts)
    assert figure.numbers.loc["Llama 3.1, factor 8"].tolist() == [kept, blended, divided]


def test_decay_draws_four_spectra_with_numpys_singular_values(spectra: dict[str, Spectrum]) -> None:
    figure = decay_figure({"rope": spectra["rope"]}, train_length=512, target_length=2048)
    (axes,) = axes_of(figure)
    half = np.append(1e7 ** (-np.arange(32) / 32), np.zeros(32))
    fast_base = (65536 / (2 * np.pi)) ** (64 / 63)
    expected = {"rope": ROPE, "half_rope": half, "high_frequency": fast_base ** (-np.arange(64) / 64)}
    expected["rope_id"] = np.append(2 * np.pi / np.geomspace(32, 32768, 32), np.zeros(32))
    assert set(expected) == set(COMPARED)
    for name, inv_freq in expected.items():
        lengths, ratios = curve(axes, name)
        assert lengths[-1] == 2048
        phases = np.outer(np.arange(2048), inv_freq)
        rotated = np.hstack([np.cos(phases), np.sin(phases)])
        assert ratios[-1] == pytest.approx(np.linalg.norm(rotated, 2) / np.sqrt(2048 * 64), rel=1e-9)
    assert marked(axes, "length 512")[0] == 512
    assert marked(axes, f"bound {128**-0.5:.6f}")[1] == pytest.approx(128**-0.5)
