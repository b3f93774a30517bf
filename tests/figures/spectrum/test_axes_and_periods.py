"""The figure of axis and period: each mark where its pair's axis and frequency put it."""

from __future__ import annotations

import numpy as np
from figures.drawings import FACTS, LENGTHS, axes_of

from ropewalk.figures.spectrum.axes_and_periods import axes_figure
from ropewalk.rope import RopeChain

BANDS = {"method": "axes", "layout": "bands", "positions": "mrope"}
ALTERNATING = {"method": "axes", "layout": "alternating", "positions": "diagonal"}
PERIODS = 2 * np.pi * 5e5 ** (np.arange(64) / 64)


def test_each_pair_is_drawn_on_its_axis_at_its_period() -> None:
    chains = {"mrope": [BANDS], "hope": [ALTERNATING, {"method": "hardclip", "clip": 16}], "text": []}
    figure = axes_figure({name: RopeChain(chain).spectrum(**FACTS) for name, chain in chains.items()}, **LENGTHS)
    mrope, hope, text = axes_of(figure)
    expected = {
        mrope: {"time": range(16), "height": range(16, 40), "width": range(40, 64)},
        hope: {"time": [], "height": range(0, 48, 2), "width": range(1, 48, 2)},
        text: {"one dimension": range(64)},
    }
    for axes, pairs_of in expected.items():
        lines = {line.get_label(): line for line in axes.lines if not line.get_gid()}
        assert set(lines) == set(pairs_of)
        for name, pairs in pairs_of.items():
            assert list(lines[name].get_xdata()) == list(pairs)
            np.testing.assert_allclose(lines[name].get_ydata(), PERIODS[list(pairs)])
    still = {line.get_gid(): list(line.get_xdata()) for line in hope.lines if str(line.get_gid()).startswith("still")}
    assert still == {"still time": list(range(48, 64)), "still height": [], "still width": []}
    assert figure.numbers.loc["hope"].tolist() == [
        "16 pairs", f"24 pairs, 6 to {PERIODS[46]:,.0f}", f"24 pairs, {PERIODS[1]:,.0f} to {PERIODS[47]:,.0f}", "none",
        "16",
    ]  # fmt: skip
    assert figure.numbers.loc["text", "time"] == "none"
