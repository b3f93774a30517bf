"""Spectra: the period of every rotary pair, where the clip begins, and which pairs do not rotate."""

from __future__ import annotations

import math

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from ropewalk.report.figures.style import GREY, Figure, Panel, Row, RunStyle, canvas, plain
from ropewalk.report.runs import Run
from ropewalk.report.text import listed
from ropewalk.rope.spectrum import base_of, geometric

# Stored frequencies are float32; read off the first two, the base carries that rounding to the last pair.
TOLERANCE = 1e-5
ROW_GAP = 0.3  # decades between the rows of unrotated pairs


def spectra_figure(runs: list[Run], styles: dict[str, RunStyle]) -> Figure:
    """Period in tokens against pair index, one curve a run."""
    drawn = [run for run in runs if run.inv_freq is not None]
    missing = [f"{run.name}: no inv_freq in run.json, so no spectrum." for run in runs if run.inv_freq is None]
    if not drawn:
        return Figure("Spectra", "", missing=missing)
    plot = canvas("rotary pair (0: fastest)", "period (tokens)", height=440)
    for length, text in _lengths(drawn).items():
        plot.add_hline(y=length, line={"color": GREY, "width": 1.5, "dash": "dash"})
        _annotate(plot, math.log10(length), text, "right")
    for run in drawn:
        _add_spectrum(plot, run, styles[run.name])
    _add_unrotated(plot, drawn, styles)
    rows = [Row([Panel("", plot, _note(drawn))])]
    return Figure("Spectra", _reading(drawn), rows, [run.name for run in drawn], missing)


def clip_onset(inv_freq: NDArray[np.float64]) -> int | None:
    """The first pair that differs from the RoPE spectrum of the same base; None where none does.

    The base is read off the ratio of the first two frequencies, which holds for any RoPE vector.

    Args:
        inv_freq: float (head_dim // 2,), radians per token, highest first.
    """
    base = base_of(inv_freq)
    if base is None:
        return 0
    unclipped = geometric(base, 2 * inv_freq.size)
    differs = np.abs(inv_freq - unclipped) > TOLERANCE * unclipped
    return int(differs.argmax()) if differs.any() else None


def _frequencies(run: Run) -> NDArray[np.float64]:
    return run.inv_freq if run.inv_freq is not None else np.zeros(0)


def _lengths(runs: list[Run]) -> dict[int, str]:
    """Length in tokens -> label, for every pretrained and trained length."""
    roles: dict[int, set[str]] = {}
    for run in runs:
        for role, length in (("pretrained", run.pretrained_length), ("trained", run.trained_length)):
            if length:
                roles.setdefault(length, set()).add(role)
    return {
        length: f"{'pretrained' if 'pretrained' in names and len(roles) > 1 else 'trained'} {length:,}"
        for length, names in sorted(roles.items())
    }


def _annotate(plot: go.Figure, height: float, text: str, side: str) -> None:
    """Text at the left edge, or at the right one and on the line there; ``height`` in powers of ten."""
    plot.add_annotation(
        x=0 if side == "left" else 1,
        xref="paper",
        xanchor=side,
        y=height,
        yanchor="bottom" if side == "right" else "middle",
        text=text,
        showarrow=False,
        font={"size": 11},
    )


def _add_spectrum(plot: go.Figure, run: Run, style: RunStyle) -> None:
    inv_freq = _frequencies(run)
    turning = np.flatnonzero(inv_freq)
    plot.add_scatter(
        x=turning.tolist(),
        y=(2 * np.pi / inv_freq[turning]).tolist(),
        mode="lines+markers",
        line={"color": style.color, "width": 2, "dash": style.dash},
        marker={"symbol": style.symbol, "size": 5, "color": style.color},
        hovertemplate=f"{plain(run.name)}<br>pair %{{x}}: %{{y:,.1f}} tokens<extra></extra>",
        name=plain(run.name),
        legendgroup=plain(run.name),
    )
    onset = clip_onset(inv_freq)
    if onset is not None and inv_freq[onset] > 0:
        _add_ring(plot, run, style, onset, 2 * np.pi / inv_freq[onset])


def _add_unrotated(plot: go.Figure, runs: list[Run], styles: dict[str, RunStyle]) -> None:
    """Pairs of frequency 0, whose period is infinite, in rows above the longest period: one row a run."""
    longest = max(float(2 * np.pi / f[f > 0].min()) if (f := _frequencies(run)).any() else 1.0 for run in runs)
    floor = math.log10(longest)
    still = [run for run in runs if (_frequencies(run) == 0).any()]
    for row, run in enumerate(still):
        pairs = np.flatnonzero(_frequencies(run) == 0)
        style, height = styles[run.name], 10 ** (floor + ROW_GAP * (row + 1.5))
        plot.add_scatter(
            x=pairs.tolist(),
            y=[height] * pairs.size,
            mode="markers",
            marker={"symbol": style.symbol, "size": 8, "color": style.color},
            hovertemplate=f"{plain(run.name)}<br>pair %{{x}}: no rotation<extra></extra>",
            name=plain(run.name),
            legendgroup=plain(run.name),
        )
        onset = clip_onset(_frequencies(run))
        if onset is not None and onset in pairs:
            _add_ring(plot, run, style, onset, height)
    if still:
        plot.add_hline(y=10 ** (floor + ROW_GAP * 0.75), line={"color": GREY, "width": 0.5})
        _annotate(plot, floor + ROW_GAP * (1 + len(still) / 2), "no rotation (frequency 0)", "left")
    # No tick where the axis has no number: the rows of unrotated pairs stand for infinity.
    ticks = [10**k for k in range(1, math.floor(floor) + 1)]
    top = floor + ROW_GAP * (len(still) + 1.5 if still else 0.5)
    plot.update_yaxes(type="log", range=[0.5, top], tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])


def _add_ring(plot: go.Figure, run: Run, style: RunStyle, pair: int, height: float) -> None:
    plot.add_scatter(
        x=[pair],
        y=[height],
        mode="markers",
        marker={"symbol": "circle-open", "size": 16, "color": style.color, "line": {"width": 2.5}},
        hovertemplate=f"{plain(run.name)}<br>first altered pair: %{{x}}<extra></extra>",
        name=plain(run.name),
        legendgroup=plain(run.name),
    )


def _note(runs: list[Run]) -> str:
    altered = any(clip_onset(_frequencies(run)) is not None for run in runs)
    return "Ringed: the first pair that differs from the run's unclipped RoPE spectrum." if altered else ""


def _reading(runs: list[Run]) -> str:
    return f"Of {_pairs(runs)} rotary pairs: {'; '.join(_describe(run) for run in runs)}."


def _pairs(runs: list[Run]) -> str:
    return listed(sorted({_frequencies(run).size for run in runs}))


def _describe(run: Run) -> str:
    inv_freq = _frequencies(run)
    parts = []
    if run.trained_length is not None:
        slow = int(np.sum(inv_freq * run.trained_length < 2 * np.pi))
        parts.append(f"{slow} turn less than once in {run.trained_length:,} tokens")
    onset, still = clip_onset(inv_freq), int(np.sum(inv_freq == 0))
    parts.append("unclipped" if onset is None else f"altered from pair {onset} on, {still} without rotation")
    return f"{run.name}, {', '.join(parts)}"
