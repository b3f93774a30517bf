"""The attention kernel and the advantage of a similar key, read back from the drawing."""

from __future__ import annotations

import numpy as np
import pytest
from figures.drawings import LENGTHS, ROPE, axes_of, curve, has_mark, marked, sample_spectra

from ropewalk.figures.spectrum.attention_kernel import kernel_figure, semantic_figure
from ropewalk.rope import Spectrum


@pytest.fixture(scope="module")
def spectra() -> dict[str, Spectrum]:
    return sample_spectra()


def test_kernel_bands_hold_the_kernel(spectra: dict[str, Spectrum]) -> None:
    rope, hard, _, yarn = axes_of(kernel_figure(spectra, **LENGTHS))
    distance, mean = curve(hard, "hardclip20")
    assert (distance[0], mean[0]) == (1, pytest.approx((np.cos(ROPE[:44]).sum() + 20) / 64))
    assert marked(rope, "length 65536")[0] == 65536
    assert curve(yarn, "cope20+yarn4")[1][0] == pytest.approx((0.1 * np.log(4) + 1) ** 2, rel=0.02)
    assert rope.get_xlim() == (1, 262144)
    # The last bucket in full: each of its distances is summed here one by one.
    start = int(np.ceil(distance[-1] ** 2 / 262143))
    within = np.cos(np.outer(np.arange(start, 262144), ROPE[:44])).sum(axis=1) / 64 + 20 / 64
    assert mean[-1] == pytest.approx(within.mean(), abs=1e-4)
    low_and_high = hard.collections[0].get_paths()[0].vertices[:, 1]
    assert low_and_high.min() <= within.min()
    assert low_and_high.max() >= within.max()


def test_semantic_marks_where_the_advantage_ends(spectra: dict[str, Spectrum]) -> None:
    figure = semantic_figure(spectra, **LENGTHS)
    average, lowest = axes_of(figure)
    distance = int(marked(lowest, "crossing rope")[0])
    around = np.cos(np.outer(np.arange(distance + 1), ROPE)).sum(axis=1)
    assert around[distance] <= 0 < around[:distance].min()
    assert not has_mark(lowest, "crossing hardclip20")
    places, minima = curve(lowest, "rope")
    assert (np.diff(minima) <= 0).all()
    assert minima[0] == pytest.approx(around[: int(places[0]) + 1].min() / 64)
    assert marked(average, "length 65536")[0] == marked(lowest, "length 65536")[0] == 65536
    assert figure.numbers.iloc[:2, 0].tolist() == [f"{distance:,}", "none to 256k"]
