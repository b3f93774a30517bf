"""What the number of clipped pairs and the window do to the spectrum and the kernel, and to trained runs."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ropewalk.analysis.figures.leakage import compared_clip
from ropewalk.analysis.figures.response import draw_response, panels_of
from ropewalk.analysis.figures.style import (
    DASHES,
    GREY,
    canvas,
    finish,
    in_house_style,
    method_styles,
    nested,
    positive,
    tokens,
)
from ropewalk.analysis.kernels import kernel
from ropewalk.rope import Spectrum
from ropewalk.rope.methods.windows import TaperDomain, Window
from ropewalk.rope.registry import get_method
from ropewalk.rope.spectrum import FloatArray

WINDOW_NAMES: tuple[Window, ...] = get_args(Window)
DOMAINS: tuple[TaperDomain, ...] = get_args(TaperDomain)
HARD, SOFT = "hard cut (hardclip)", "raised cosine (cope)"
SHOWN_CLIPS = 8  # spectra drawn between no clip and all pairs


@in_house_style
def clips_figure(
    spectra: dict[str, Spectrum],
    *,
    train_length: int,
    target_length: int,
    responses: pd.DataFrame | None = None,
) -> Figure:
    """Spectra and lowest kernel values as the clip grows, for a hard cut, CoPE and the other windows.

    Args:
        spectra: method name -> spectrum; of the first are taken the base and the head width, and the clip at which
            windows are compared is that of :func:`ropewalk.analysis.figures.leakage.compared_clip`.
        train_length: tokens; the kernel's minimum is taken up to there,
        target_length: tokens; and up to there.
        responses: of :func:`ropewalk.analysis.figures.response.read_responses`; None: no trained runs are drawn.

    Returns:
        A figure with four axes, and one more for each metric in ``responses``.
    """
    first = next(iter(spectra.values()))
    base = first.rebased(first.theta)
    at = compared_clip({"base": first, **spectra}, train_length).clip
    metrics = [] if responses is None else panels_of(responses)
    figure = canvas(10.5, 7.4 + (3.6 if metrics else 0))
    grid = figure.add_gridspec(3 if metrics else 2, 2)
    family, lowest, weights, windows = (figure.add_subplot(grid[i // 2, i % 2]) for i in range(4))
    _draw_family(figure, family, base)
    minima = _draw_minima(lowest, base, train_length, target_length)
    _draw_windows(weights, base, at)
    _draw_window_minima(windows, base, target_length)
    for place, (task, metric) in enumerate(metrics):
        assert responses is not None
        draw_response(figure.add_subplot(grid[2, place]), responses, task, metric, train_length)
    caption = _caption(base, at, train_length, target_length)
    if responses is not None:
        caption += f" Below: {responses.attrs['note']}"
    return finish(figure, _title(minima, target_length), caption)


def _clipped(base: Spectrum, method: str, clip: int, **options: str) -> FloatArray:
    return get_method(method)(base, clip=clip, **options).inv_freq


def _minima(base: Spectrum, method: str, lengths: tuple[int, ...], **options: str) -> FloatArray:
    """The lowest kernel value up to each length, for every clip: float64 (lengths, d/2 + 1)."""
    columns = []
    for clip in range(base.inv_freq.size + 1):
        values = kernel(_clipped(base, method, clip, **options), max(lengths))
        columns.append([values[:length].min() for length in lengths])
    return np.array(columns).T


def _draw_family(figure: Figure, axes: Axes, base: Spectrum) -> None:
    pairs = base.inv_freq.size
    clips = np.unique(np.linspace(0, pairs, SHOWN_CLIPS + 1).astype(int))
    colors, scale = colormaps["viridis"], Normalize(0, pairs * 1.08)  # the map's yellow end vanishes on white
    for clip in clips:
        inv_freq = positive(_clipped(base, "cope", int(clip)))
        axes.plot(np.arange(pairs), inv_freq, color=colors(scale(clip)), linewidth=1.5, label=f"clip {clip}")
    axes.set_yscale("log")
    # A taper's slowest pairs run off to 1e-12 and would press the rest into a corner.
    axes.set_ylim(base.inv_freq[-1] ** 1.35, 2)
    axes.set_xlabel("rotary pair (0: fastest)")
    axes.set_ylabel("frequency (radians per token)")
    axes.set_title("cope: spectrum as the clip grows")
    bar = figure.colorbar(ScalarMappable(scale, colors), ax=axes, ticks=list(clips), pad=0.01, aspect=30)
    bar.ax.set_ylim(0, pairs)
    bar.set_label("clip (pairs)")


def _draw_minima(axes: Axes, base: Spectrum, train_length: int, target_length: int) -> dict[str, FloatArray]:
    """Draw the lowest kernel values, and return those up to the target length."""
    styles = method_styles([HARD, SOFT])
    clips = np.arange(base.inv_freq.size + 1)
    found = {}
    for name, method in ((HARD, "hardclip"), (SOFT, "cope")):
        trained, target = _minima(base, method, (train_length, target_length))
        axes.plot(clips, target, color=styles[name].color, label=name)
        axes.plot(clips, trained, color=styles[name].color, linestyle=DASHES[2], linewidth=1.4)
        found[name] = target
    axes.set_title(f"lowest kernel value: to {tokens(target_length)} (line), to {tokens(train_length)} (dotted)")
    axes.legend(loc="upper left")
    _dress_minima(axes)
    return found


def _dress_minima(axes: Axes) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("clip (pairs)")
    axes.set_ylabel("lowest kernel value")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def _draw_windows(axes: Axes, base: Spectrum, clip: int) -> None:
    styles = method_styles(WINDOW_NAMES)
    pairs = np.arange(base.inv_freq.size - clip, base.inv_freq.size)
    for window, width in zip(WINDOW_NAMES, nested(len(WINDOW_NAMES), 0.4), strict=True):
        for domain, dash in zip(DOMAINS, (DASHES[0], DASHES[2]), strict=True):
            weights = _clipped(base, "cope", clip, window=window, taper_domain=domain)[pairs] / base.inv_freq[pairs]
            axes.plot(
                pairs, weights, color=styles[window].color, linestyle=dash, linewidth=width,
                label=f"{window} {domain}",
            )  # fmt: skip
    handles = [Line2D([], [], color=styles[window].color, label=window.replace("_", " ")) for window in WINDOW_NAMES]
    handles += [
        Line2D([], [], color=GREY, linestyle=dash, label=f"over the {domain}")
        for domain, dash in zip(DOMAINS, (DASHES[0], DASHES[2]), strict=True)
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=8)
    axes.set_title(f"cope, clip {clip}: weight by window")
    axes.set_xlabel("rotary pair (0: fastest)")
    axes.set_ylabel("frequency over RoPE's")
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))


def _draw_window_minima(axes: Axes, base: Spectrum, target_length: int) -> None:
    styles = method_styles(WINDOW_NAMES)
    for window, width in zip(WINDOW_NAMES, nested(len(WINDOW_NAMES), 0.4), strict=True):
        (values,) = _minima(base, "cope", (target_length,), window=window)
        axes.plot(np.arange(values.size), values, color=styles[window].color, linewidth=width, label=window)
    axes.set_title(f"cope by window (over the index): lowest kernel value to {tokens(target_length)}")
    _dress_minima(axes)


def first_positive_from(minima: FloatArray) -> int | None:
    """The smallest clip from which on every larger one keeps the kernel above 0; None where none does."""
    below = np.flatnonzero(minima <= 0)
    start = int(below[-1]) + 1 if below.size else 0
    return start if start < minima.size else None


def _title(minima: dict[str, FloatArray], target_length: int) -> str:
    hard, soft = (first_positive_from(minima[name]) for name in (HARD, SOFT))
    also = "CoPE's soft clip has no such number" if soft is None else f"with CoPE's soft clip it takes {soft}"
    return f"The kernel stays above 0 to {tokens(target_length)} tokens with a hard cut of {hard} pairs or more; {also}"


def _caption(base: Spectrum, at: int, train_length: int, target_length: int) -> str:
    return (
        f"Base {base.theta:,.0f}, {base.inv_freq.size} pairs, clips from none to all. The lowest kernel value is the "
        f"least expected score of a similar key over any distance to {tokens(target_length)} tokens (and, dotted, to "
        f"{tokens(train_length)}); stopped pairs raise it by their share. Windows are weights on the frequencies of "
        f"the slowest {at} pairs, over the pair index or over frequency, where all but the first few are close to 0."
    )
