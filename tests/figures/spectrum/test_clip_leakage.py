"""The ringing of clips against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
from figures.drawings import ABF, FACTS, LENGTHS, ROPE, axes_of, curve, marked, sample_spectra

from ropewalk.figures.spectrum.clip_leakage import Clip, compared_clip, leakage_figure
from ropewalk.rope import RopeChain, Spectrum


@pytest.fixture(scope="module")
def spectra() -> dict[str, Spectrum]:
    return sample_spectra()


def test_clip_compared_is_that_of_the_first_clipped_method(spectra: dict[str, Spectrum]) -> None:
    assert compared_clip(spectra, 65536) == Clip(1e7, 64, 20)
    soft = RopeChain([ABF, {"method": "cope", "clip": 34}]).spectrum(**FACTS)
    assert compared_clip({"rope": spectra["rope"], "cope34": soft}, 65536).clip == 34
    assert compared_clip({"rope": spectra["rope"]}, 65536).clip == 20  # 75% of 27, rounded down
    assert compared_clip({"rope": spectra["rope"]}, 8192).clip == 26  # 75% of 35
    # YaRN alone clips nothing; what it was put on is no longer a plain clip either.
    assert compared_clip({"yarn": spectra["cope20+yarn4"]}, 65536).clip == 20


def test_leakage_draws_the_closed_form_under_the_hard_cut(spectra: dict[str, Spectrum]) -> None:
    figure = leakage_figure(spectra, **LENGTHS)
    head, signed, level, rings = axes_of(figure)
    cut = 1e7 ** (-44 / 64)
    for axes in (level, rings):
        (reference,) = (one for one in axes.lines if one.get_gid() == "C / distance")
        x, y = (np.asarray(values, dtype=float) for values in reference.get_data())
        np.testing.assert_allclose(x * y, 1 / (cut * np.log(1e7)))
        distance, envelope = curve(axes, "hard cut (hardclip)")
        late = distance > 20 * 2 * np.pi / cut
        # A running maximum is at most one peak, half a period, ahead of the line.
        np.testing.assert_allclose(envelope[late] * distance[late] * cut * np.log(1e7), 1, atol=0.03)
    soft_distance, soft = curve(rings, "soft clip of frequencies (cope)")
    hard_distance, hard = curve(rings, "hard cut (hardclip)")
    assert np.interp(4e6, soft_distance, soft) < np.interp(4e6, hard_distance, hard) / 20
    assert curve(level, "soft clip of frequencies (cope)")[1].min() > curve(level, "hard cut (hardclip)")[1].max()
    assert marked(head, "length 65536")[0] == marked(signed, "length 65536")[0] == 65536
    places, envelope = curve(head, "hard cut (hardclip)")
    values = np.cos(np.outer(np.arange(1000, 4000), ROPE[:44])).sum(axis=1) / 64
    assert np.interp(1000, places, envelope) >= np.abs(values).max() - 1e-9
    # what a doubling takes off: half of C / distance
    assert figure.numbers.loc["hard cut (hardclip)", "ringing lost per doubling of distance"] in ("49%", "50%")
