"""Frequencies, phases and turns of every pair, read back from the drawing."""

from __future__ import annotations

import numpy as np
import pytest
from figures.drawings import COPE, LENGTHS, ROPE, axes_of, curve, has_mark, marked, sample_spectra

from ropewalk.figures.spectrum.spectra import coverage_figure, phases_figure, spectra_figure
from ropewalk.rope import Spectrum


@pytest.fixture(scope="module")
def spectra() -> dict[str, Spectrum]:
    return sample_spectra()


def test_spectra_show_frequencies_and_stopped_pairs_apart(spectra: dict[str, Spectrum]) -> None:
    main, strip = axes_of(spectra_figure(spectra, **LENGTHS))
    np.testing.assert_allclose(curve(main, "rope")[1], ROPE, rtol=1e-12)
    pairs, hard = curve(main, "hardclip20")
    assert pairs.tolist() == list(range(64))
    np.testing.assert_allclose(hard[:44], ROPE[:44], rtol=1e-12)
    assert np.isnan(hard[44:]).all()  # 0 is not drawn at some small number
    np.testing.assert_allclose(curve(main, "cope20")[1][:63], COPE[:63], rtol=1e-9)
    assert curve(strip, "hardclip20")[0].tolist() == list(range(44, 64))
    assert curve(strip, "cope20")[0].tolist() == [63]
    assert curve(strip, "rope")[0].size == 0
    assert [text.get_text() for text in strip.get_yticklabels()] == ["none", "20 stopped", "1 stopped", "1 stopped"]


def test_spectra_mark_the_lengths_and_each_onset(spectra: dict[str, Spectrum]) -> None:
    figure = spectra_figure(spectra, **LENGTHS)
    main, strip = axes_of(figure)
    assert marked(main, "length 65536")[1] == pytest.approx(2 * np.pi / 65536)
    assert marked(main, "length 262144")[1] == pytest.approx(2 * np.pi / 262144)
    assert marked(main, "onset cope20") == (45, pytest.approx(COPE[45]))
    assert marked(strip, "onset hardclip20") == (44, 1)
    assert not has_mark(main, "onset rope")
    assert marked(main, "onset cope20+yarn4")[0] == 23  # YaRN's ramp is 22..37 at 64k
    assert figure.numbers.loc["hardclip20"].tolist() == ["64", "27", "21", "44", "20"]
    assert figure.numbers["under one turn in 64k"].tolist() == ["27", "27", "27", "30"]


def test_rounding_to_float32_is_not_a_change_and_interpolation_changes_all(spectra: dict[str, Spectrum]) -> None:
    rope = spectra["rope"]
    rounded = Spectrum(rope.inv_freq.astype(np.float32), rope.theta, 8192, 65536)
    slowed = Spectrum(rope.inv_freq / 8, rope.theta, 8192, 65536)
    figure = spectra_figure({"rounded": rounded, "slowed": slowed}, **LENGTHS)
    assert figure.numbers["first changed pair"].tolist() == ["none", "0"]


def test_coverage_bars_are_the_shares(spectra: dict[str, Spectrum]) -> None:
    figure = coverage_figure(spectra, **LENGTHS)
    heights = {}
    for axes, name in zip(axes_of(figure), spectra, strict=True):
        needed, circle = axes.containers
        heights[name] = np.array([bar.get_height() for bar in needed])
        turns = 262144 * spectra[name].inv_freq / (2 * np.pi)
        slow = turns < 1
        np.testing.assert_allclose([bar.get_height() for bar in circle][-1], 0.75 * turns[-1], atol=1e-12)
        np.testing.assert_allclose(heights[name][slow & (turns > 0)], 0.75)
    assert (heights["hardclip20"][44:] == 0).all()
    assert int(np.sum(heights["rope"] > 0)) == 27
    assert marked(axes_of(figure)[1], "stopped hardclip20")[0] == 44
    assert figure.numbers.loc["rope", "phases never met, mean share"] == f"{heights['rope'].mean():.0%}"
    # docs/position.md: CoPE-20 leaves 5.22 circles of unseen phase where RoPE leaves 5.49
    assert figure.numbers["circles, all pairs"].tolist()[::2] == ["5.49", "5.22"]


def test_phases_show_turns_at_three_lengths_and_kernels_to_a_million(spectra: dict[str, Spectrum]) -> None:
    figure = phases_figure(spectra, **LENGTHS)
    turns, kernels = axes_of(figure)[:3], axes_of(figure)[3:]
    for axes, length in zip(turns, (65536, 262144, 2**20), strict=True):
        np.testing.assert_allclose(curve(axes, "rope")[1], length * ROPE / (2 * np.pi))
        assert marked(axes, "one turn")[1] == 1
        assert np.isnan(curve(axes, "hardclip20")[1][44:]).all()
    assert [axes.get_xlim()[1] for axes in kernels] == [2**20] * 4
    assert figure.numbers.loc["rope"].tolist() == [
        "27",
        "21",
        "16",
    ]  # 2 pi 1e7^(i/64) > 2^18 from i = 43 on, > 2^20 from 48 on
