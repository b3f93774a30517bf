"""The figure of RoPE-ID's ablations: a panel for each argument, measured and published lines."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from figures.drawings import axes_of

from ropewalk.figures.rope_id_ablations import ablations_figure

MEASURED = pd.DataFrame(
    [
        ("share", 0.5, 4096, 39.0, 1.0), ("share", 0.25, 4096, 42.0, 2.0), ("share", 0.5, 8192, 36.0, 1.0),
        ("share", 0.25, 8192, 33.0, math.nan), ("shortest_period", 32.0, 4096, 39.0, 1.0),
    ],
    columns=["argument", "setting", "context_length", "value", "stderr"],
)  # fmt: skip
MEASURED.attrs["note"] = ""
PUBLISHED = pd.DataFrame(
    [("shortest_period", 2.0, 4096, 37.0), ("shortest_period", 64.0, 4096, 41.0)],
    columns=["argument", "setting", "context_length", "value"],
)


def test_each_argument_has_its_lines_by_length() -> None:
    figure = ablations_figure(MEASURED, PUBLISHED)
    share, shortest, longest, exponent = axes_of(figure)
    bars = [container.lines[0] for container in share.containers]
    assert [line.get_xdata().tolist() for line in bars] == [[0.25, 0.5]] * 2
    assert [line.get_ydata().tolist() for line in bars] == [[42, 39], [33, 36]]
    heights = [segment[:, 1].tolist() for segment in share.containers[0].lines[2][0].get_segments()]
    assert heights == [[40, 44], [38, 40]]  # value less and plus its standard error
    theirs = [line for line in shortest.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "--"]
    assert [line.get_ydata().tolist() for line in theirs] == [[37, 41]]
    np.testing.assert_allclose(shortest.get_xlim(), (2 / 1.2, 64 * 1.2))
    assert not [line for line in (*longest.lines, *exponent.lines) if len(line.get_xdata())]
    assert figure.numbers.loc["share of the channels that rotate"].tolist() == ["0.25 (42.0)", "0.5 (36.0)"]
    assert figure.numbers.loc["longest period"].tolist() == ["not measured"] * 2
