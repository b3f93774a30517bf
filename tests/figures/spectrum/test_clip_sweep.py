"""Spectra, minima and windows by clip, and trained runs, read back from the drawing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figures.drawings import ABF, FACTS, axes_of, curve

from ropewalk.figures.spectrum.clip_sweep import clips_figure, first_positive_from
from ropewalk.rope import RopeChain

CLIP8 = {"cope8": [ABF, {"method": "cope", "clip": 8}]}


def test_clips_show_spectra_minima_and_windows() -> None:
    small = {name: RopeChain(chain).spectrum(**(FACTS | {"head_dim": 32})) for name, chain in CLIP8.items()}
    figure = clips_figure(small, train_length=1024, target_length=4096)
    family, lowest, weights, windows = axes_of(figure)[:4]
    rope = 1e7 ** (-np.arange(16) / 16)
    np.testing.assert_allclose(curve(family, "clip 0")[1], rope)
    hard = curve(lowest, "hard cut (hardclip)")[1]
    assert hard.shape == (17,)
    assert hard[16] == pytest.approx(1)  # no pair turns
    cosines = np.cos(np.outer(np.arange(4096), rope))
    assert hard[0] == pytest.approx(cosines.mean(axis=1).min())
    assert hard[6] == pytest.approx((cosines[:, :10].sum(axis=1) + 6).min() / 16)
    pairs, taper = curve(weights, "raised_cosine index")
    assert pairs.tolist() == list(range(8, 16))
    np.testing.assert_allclose(taper, (1 + np.cos(np.pi * np.arange(8) / 7)) / 2, atol=1e-12)
    np.testing.assert_allclose(curve(weights, "linear index")[1], 1 - np.arange(8) / 7, atol=1e-12)
    np.testing.assert_allclose(curve(windows, "raised_cosine")[1], curve(lowest, "raised cosine (cope)")[1])


def test_first_positive_from() -> None:
    assert first_positive_from(np.array([-1.0, 1, -0.5, 0.2, 0.3])) == 3
    assert first_positive_from(np.array([0.1, 0.2])) == 0
    assert first_positive_from(np.array([0.1, 0.0])) is None


def test_responses_are_drawn_with_their_intervals() -> None:
    """A run without a clip begins the line of every family; intervals are the table's."""
    rows = [
        (family, clip, length, value, value / 2, value * 2)
        for family, clip, value in (("", 0, 0.05), ("cope", 6, 0.2), ("cope", 11, 0.3), ("hardclip", 11, 0.4))
        for length in (2048, 8192)
    ]
    table = pd.DataFrame(rows, columns=["family", "clip", "context_length", "value", "ci_low", "ci_high"])
    table = table.assign(task="needle_at_length", metric="exact_match", test_time="auto")
    table.attrs["note"] = "Left out: p."
    small = {"cope8": RopeChain(CLIP8["cope8"]).spectrum(**(FACTS | {"head_dim": 32}))}
    figure = clips_figure(small, train_length=2048, target_length=8192, responses=table)
    assert figure.caption.endswith("Below: Left out: p.")
    assert [panel.title for panel in figure.panels][4:] == ["trained runs: needle, exact match"]
    bars = {bar.get_label(): bar for bar in axes_of(figure)[4].containers}
    assert set(bars) == {"cope, 2k", "cope, 8k", "hardclip, 2k", "hardclip, 8k"}
    line, _, (errors,) = bars["cope, 2k"].lines
    assert np.asarray(line.get_xdata()).tolist() == [0, 6, 11]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), [0.05, 0.2, 0.3])
    ends = [segment[:, 1] for segment in errors.get_segments()]
    np.testing.assert_allclose(ends, [[0.025, 0.1], [0.1, 0.4], [0.15, 0.6]])


def test_each_test_time_setting_is_a_line_that_begins_with_its_own_run_without_a_clip() -> None:
    """The losses of two settings: joined into one line they would jump from one to the other."""
    rows = [
        (family, clip, setting, 8192, value + shift, value, value + 1)
        for family, clip, value in (("", 0, 0.1), ("cope", 6, 0.2))
        for setting, shift in (("none", 0.5), ("yarn", 0.0))
    ]
    names = ["family", "clip", "test_time", "context_length", "value", "ci_low", "ci_high"]
    table = pd.DataFrame(rows, columns=names).assign(task="loss_at_length", metric="nll")
    table.attrs["note"] = ""
    small = {"cope8": RopeChain(CLIP8["cope8"]).spectrum(**(FACTS | {"head_dim": 32}))}
    figure = clips_figure(small, train_length=2048, target_length=8192, responses=table)
    bars = {bar.get_label(): bar.lines[0] for bar in axes_of(figure)[4].containers}
    drawn = {name: np.asarray(line.get_ydata(), dtype=float).tolist() for name, line in bars.items()}
    assert drawn == {"cope, test_time=none, 8k": [0.6, 0.7], "cope, test_time=yarn, 8k": [0.1, 0.2]}
