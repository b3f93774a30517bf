"""Clip count and window: their effect on the spectrum and the kernel, and on trained runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ropewalk.figures.figure import Figure, Panel
from ropewalk.figures.spectrum.clip_leakage import compared_clip
from ropewalk.figures.spectrum.kernels import kernel
from ropewalk.figures.style import DASHES, GREY, FloatArray, label, method_styles, nested, pairs_axis, positive, tokens
from ropewalk.rope import Spectrum
from ropewalk.rope.methods.clipping import TaperDomain, Window
from ropewalk.rope.registry import get_method

WINDOW_NAMES: tuple[Window, ...] = get_args(Window)
DOMAINS: tuple[TaperDomain, ...] = get_args(TaperDomain)
HARD, SOFT = "hard cut (hardclip)", "raised cosine (cope)"
METHODS = {HARD: "hardclip", SOFT: "cope"}
SHOWN_CLIPS = 8  # spectra drawn between no clip and all pairs
SIZE = (5.0, 3.4)  # inches
# Metric of trained runs -> title and unit of its panel.
RESPONSES = {
    ("loss_at_length", "nll"): ("trained runs: loss", "nats per token"),
    ("needle_at_length", "exact_match"): ("trained runs: needle, exact match", "share of the prompts"),
}
UNCLIPPED = ""  # family of the runs without a clip, with which every line begins


def clips_figure(
    spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int, responses: pd.DataFrame | None = None
) -> Figure:
    """Spectra and lowest kernel values as the clip grows, for a hard cut, CoPE and the other windows.

    Args:
        spectra: method -> spectrum; of the first are taken the base and the head width, and the clip at which windows
            are compared is that of :func:`ropewalk.figures.spectrum.clip_leakage.compared_clip`.
        train_length: tokens; the kernel's minimum is taken up to there,
        target_length: tokens; and up to there.
        responses: measured on trained runs, a row for each run, test-time setting, metric and context length: family
            ("" without a clip), clip (pairs), test_time (name of the setting), task, metric (a key of ``RESPONSES``),
            context_length (tokens), value, ci_low, ci_high; ``attrs["note"]`` is added to the caption. None: no trained
            runs are drawn.

    Returns:
        A figure with four panels, and one more for each metric in ``responses``.
    """
    first = next(iter(spectra.values()))
    base = first.rebased(first.theta)
    clip = compared_clip({"base": first, **spectra}, train_length).clip
    minima = {name: _minima(base, method, (train_length, target_length)) for name, method in METHODS.items()}
    lowest = f"lowest kernel value: to {tokens(target_length)} (line), to {tokens(train_length)} (dotted)"
    by_window = f"cope by window (over the index): lowest kernel value to {tokens(target_length)}"
    rows = [
        [
            Panel(partial(_draw_family, base=base), "cope: spectrum as the clip grows"),
            Panel(partial(_draw_minima, minima=minima), lowest),
        ],
        [
            Panel(partial(_draw_windows, base=base, clip=clip), f"cope, clip {clip}: weight by window"),
            Panel(partial(_draw_window_minima, base=base, target_length=target_length), by_window),
        ],
    ]
    caption = _caption(base, clip, train_length, target_length)
    if responses is not None:
        rows.append(_response_panels(responses, train_length))
        caption += f" Below: {responses.attrs['note']}"
    starts = [first_positive_from(values[1]) for values in minima.values()]
    column = f"kernel stays above 0 to {tokens(target_length)} from a clip of"
    numbers = pd.DataFrame({column: ["no clip does" if n is None else str(n) for n in starts]}, index=list(minima))
    title = "Clip count and window"
    return Figure("clips", title, rows, caption, method_styles(METHODS), numbers, size=SIZE)


def _clipped(base: Spectrum, method: str, clip: int, **options: str) -> FloatArray:
    return get_method(method)(base, clip=clip, **options).inv_freq


def _minima(base: Spectrum, method: str, lengths: tuple[int, ...], **options: str) -> FloatArray:
    """The lowest kernel value up to each length, for every clip: float64 (lengths, d/2 + 1)."""
    columns = []
    for clip in range(base.inv_freq.size + 1):
        values = kernel(_clipped(base, method, clip, **options), max(lengths))
        columns.append([values[:length].min() for length in lengths])
    return np.array(columns).T


def first_positive_from(minima: FloatArray) -> int | None:
    """The smallest clip from which on every larger one keeps the kernel above 0; None where none does."""
    below = np.flatnonzero(minima <= 0)
    start = int(below[-1]) + 1 if below.size else 0
    return start if start < minima.size else None


def _draw_family(axes: Axes, base: Spectrum) -> None:
    pairs = base.inv_freq.size
    clips = np.unique(np.linspace(0, pairs, SHOWN_CLIPS + 1).astype(int))
    # The map's yellow end vanishes on white.
    colors, scale = matplotlib.colormaps["viridis"], Normalize(0, pairs * 1.08)
    for clip in clips:
        inv_freq = positive(_clipped(base, "cope", int(clip)))
        axes.plot(np.arange(pairs), inv_freq, color=colors(scale(clip)), linewidth=1.5, label=f"clip {clip}")
    axes.set_yscale("log")
    # A taper's slowest pairs run off to 1e-12 and would press the rest into a corner.
    axes.set_ylim(base.inv_freq[-1] ** 1.35, 2)
    axes.set_ylabel("frequency (radians per token)")
    pairs_axis(axes)
    bar = axes.figure.colorbar(ScalarMappable(scale, colors), ax=axes, ticks=list(clips), pad=0.01, aspect=30)
    bar.ax.set_ylim(0, pairs)
    bar.set_label("clip (pairs)")


def _draw_minima(axes: Axes, minima: Mapping[str, FloatArray]) -> None:
    styles = method_styles(minima)
    for name, (trained, target) in minima.items():
        clips = np.arange(target.size)
        axes.plot(clips, target, color=styles[name].color, label=name)
        axes.plot(clips, trained, color=styles[name].color, linestyle=DASHES[2], linewidth=1.4)
    axes.legend(loc="upper left")
    _dress_minima(axes)


def _dress_minima(axes: Axes) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("clip (pairs)")
    axes.set_ylabel("lowest kernel value")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def _draw_windows(axes: Axes, base: Spectrum, clip: int) -> None:
    styles = method_styles(WINDOW_NAMES)
    dashes = (DASHES[0], DASHES[2])
    pairs = np.arange(base.inv_freq.size - clip, base.inv_freq.size)
    for window, width in zip(WINDOW_NAMES, nested(len(WINDOW_NAMES), 0.4), strict=True):
        for domain, dash in zip(DOMAINS, dashes, strict=True):
            weights = _clipped(base, "cope", clip, window=window, taper_domain=domain)[pairs] / base.inv_freq[pairs]
            look: dict[str, Any] = {"color": styles[window].color, "linestyle": dash, "linewidth": width}
            axes.plot(pairs, weights, label=f"{window} {domain}", **look)
    handles = [Line2D([], [], color=styles[window].color, label=window.replace("_", " ")) for window in WINDOW_NAMES]
    handles += [
        Line2D([], [], color=GREY, linestyle=dash, label=f"over the {domain}")
        for domain, dash in zip(DOMAINS, dashes, strict=True)
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=8)
    axes.set_ylabel("frequency over RoPE's")
    pairs_axis(axes)


def _draw_window_minima(axes: Axes, base: Spectrum, target_length: int) -> None:
    styles = method_styles(WINDOW_NAMES)
    for window, width in zip(WINDOW_NAMES, nested(len(WINDOW_NAMES), 0.4), strict=True):
        (values,) = _minima(base, "cope", (target_length,), window=window)
        axes.plot(np.arange(values.size), values, color=styles[window].color, linewidth=width, label=window)
    _dress_minima(axes)


def _response_panels(responses: pd.DataFrame, train_length: int) -> list[Panel]:
    """A panel for each metric that the runs have."""
    panels = []
    lines = responses.loc[responses["family"] != UNCLIPPED, ["family", "test_time"]]
    names = {(family, setting): family for family, setting in sorted(set(lines.itertuples(index=False, name=None)))}
    if responses["test_time"].nunique() > 1:
        names = {(family, setting): f"{family}, test_time={setting or 'unknown'}" for family, setting in names}
    for (task, metric), (title, unit) in RESPONSES.items():
        rows = responses[(responses["task"] == task) & (responses["metric"] == metric)]
        if len(rows):
            draw = partial(_draw_response, rows=rows, names=names, unit=unit, train_length=train_length)
            panels.append(Panel(draw, title))
    return panels


def _draw_response(
    axes: Axes, rows: pd.DataFrame, names: Mapping[tuple[str, str], str], unit: str, train_length: int
) -> None:
    """One metric against the clip at the longest length in training and the longest of all.

    ``names`` has a line for each family and test-time setting; runs without a clip begin those of their own setting.
    """
    lengths = np.array(sorted(rows["context_length"].astype(int).unique()))
    chosen = sorted({int(lengths[lengths <= train_length].max(initial=lengths[0])), int(lengths[-1])})
    styles = method_styles(names.values())
    for (family, setting), name in names.items():
        of_line = rows[rows["family"].isin([family, UNCLIPPED]) & (rows["test_time"] == setting)]
        for length, dash in zip(chosen, DASHES, strict=False):
            line = of_line[of_line["context_length"] == length].sort_values(["clip", "value"])
            bars = np.maximum([line["value"] - line["ci_low"], line["ci_high"] - line["value"]], 0)
            axes.errorbar(
                line["clip"], line["value"], yerr=bars, color=styles[name].color, linestyle=dash,
                marker=styles[name].marker, linewidth=1.5, elinewidth=1, capsize=2.5,
                label=label(f"{name}, {tokens(length)}"),
            )  # fmt: skip
    axes.set_xlabel("clip (pairs)")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.legend(loc="best", fontsize=8, handlelength=3.5)


def _caption(base: Spectrum, clip: int, train_length: int, target_length: int) -> str:
    return (
        f"Base {base.theta:,.0f}, {base.inv_freq.size} pairs, clips from none to all. The lowest kernel value is the "
        f"least expected score of a similar key over any distance to {tokens(target_length)} tokens (and, dotted, to "
        f"{tokens(train_length)}); stopped pairs raise it by their share. Windows are weights on the frequencies of "
        f"the slowest {clip} pairs, over the pair index or over frequency, where all but the first few are close to 0."
    )
