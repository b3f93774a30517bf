"""The attention kernel against distance, and how far a similar key outscores a random one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import Figure, Panel, rows_of
from ropewalk.figures.spectrum.kernels import Bands, banded, first_not_positive, kernel, semantic_advantage
from ropewalk.figures.style import (
    GREY,
    PAGE,
    FloatArray,
    Style,
    mark_length,
    method_styles,
    nested,
    tokens,
    tokens_axis,
    with_tips,
)
from ropewalk.rope.spectrum import Spectrum

KERNEL_CAPTION = (
    "The expected logit of a query on its own copy at a distance, relative to an unrotated head: mean (line) and "
    "range (band) over every integer distance of a bucket, 16 buckets an octave. Grey: the mean of the first method. "
    "Stopped pairs lift the curve by their share, attention scaling multiplies it by its square."
)
SEMANTIC_CAPTION = (
    "Expected score of a key that resembles the query, less that of a random key, over its value at distance 0: "
    "2/d sum_i cos(m theta_i) (Men et al., arXiv 2405.14591). Left: mean in half octaves. Right: the minimum over "
    "all distances so far; from the marker on, a similar key may lose to a random one."
)


def kernel_figure(
    spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int, styles: Mapping[str, Style] | None = None
) -> Figure:
    """The kernel a^2 2/d sum_i cos(m theta_i) of each method, over every distance m up to the target length.

    The kernel oscillates faster than any axis can show, so each panel has the range and the mean in buckets of equal
    width in log distance, every integer distance counted; the first method's mean is repeated for comparison.

    Args:
        spectra: method or run -> spectrum.
        train_length: tokens; marked.
        target_length: tokens; the end of the axis.
        styles: method or run -> style; None: :func:`ropewalk.figures.style.method_styles`.

    Returns:
        A figure with a panel for each method.
    """
    looks = {name: (styles or method_styles(spectra))[name] for name in spectra}
    panels, lowest = kernel_panels(spectra, looks, target_length, train_length)
    title = f"The attention kernel to {tokens(target_length)} tokens"
    numbers = pd.DataFrame({"lowest value": [f"{value:.2f}" for value in lowest]}, index=list(spectra))
    return Figure("kernel", title, rows_of(panels), KERNEL_CAPTION, looks, numbers)


def kernel_panels(
    spectra: Mapping[str, Spectrum], styles: Mapping[str, Style], length: int, train_length: int
) -> tuple[list[Panel], list[float]]:
    """A panel with the banded kernel of each method on one scale, and the lowest value of each kernel."""
    kernels = {
        name: kernel(spectrum.inv_freq, length, spectrum.attention_scaling) for name, spectrum in spectra.items()
    }
    bands = {name: banded(values) for name, values in kernels.items()}
    low, high = min(band.low.min() for band in bands.values()), max(band.high.max() for band in bands.values())
    margin = 0.05 * (high - low)
    draws = {
        name: partial(
            _draw_kernel, name=name, bands=band, style=styles[name], reference=next(iter(bands.values())),
            length=length, train_length=train_length, limits=(low - margin, high + margin),
        )
        for name, band in bands.items()
    }  # fmt: skip
    return [Panel(draw, name) for name, draw in draws.items()], [float(values.min()) for values in kernels.values()]


def _draw_kernel(
    axes: Axes,
    name: str,
    bands: Bands,
    style: Style,
    reference: Bands,
    length: int,
    train_length: int,
    limits: tuple[float, float],
) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.plot(reference.distance, reference.mean, color=GREY, linewidth=1, linestyle=(0, (2, 1)), zorder=2)
    axes.fill_between(bands.distance, bands.low, bands.high, color=style.color, alpha=0.22, linewidth=0, label=name)
    axes.plot(bands.distance, bands.mean, color=style.color, linestyle=style.dash, label=name)
    tokens_axis(axes, 1, length, ticks=7)
    axes.set_ylim(*limits)
    mark_length(axes, train_length)
    axes.set_ylabel("attention kernel")


def semantic_figure(
    spectra: Mapping[str, Spectrum], *, train_length: int, target_length: int, styles: Mapping[str, Style] | None = None
) -> Figure:
    """How far a similar key outscores a random one, relative to distance 0, and the lowest it has been so far.

    See :func:`ropewalk.figures.spectrum.kernels.semantic_advantage` (Men et al., arXiv 2405.14591). Arguments as in
    :func:`kernel_figure`.

    Returns:
        A figure with two panels: bucket means, and the running minimum with the first distance at or below 0.
    """
    looks = {name: (styles or method_styles(spectra))[name] for name in spectra}
    advantages = {name: semantic_advantage(spectrum.inv_freq, target_length) for name, spectrum in spectra.items()}
    crossings = {name: first_not_positive(values) for name, values in advantages.items()}
    earliest = min((distance for distance in crossings.values() if distance is not None), default=target_length)
    start = 1 << (max(1, min(train_length // 16, target_length // 64, earliest // 2)).bit_length() - 1)
    common: dict[str, Any] = {"advantages": advantages, "styles": looks, "train_length": train_length}
    panels = [
        Panel(partial(_draw_means, **common), "mean over similar distances"),
        Panel(
            partial(_draw_minima, **common, crossings=crossings, start=start),
            f"lowest so far, from {tokens(start)} on (marker: first at 0 or below)",
        ),
    ]
    none = f"none to {tokens(target_length)}"
    numbers = pd.DataFrame(
        {"first distance at 0 or below": [none if n is None else f"{n:,}" for n in crossings.values()]},
        index=list(spectra),
    )
    title = "How far a similar key outscores a random one"
    return Figure("semantic", title, rows_of(panels), SEMANTIC_CAPTION, looks, numbers)


def _looks(advantages: Mapping[str, FloatArray], styles: Mapping[str, Style]) -> dict[str, dict[str, Any]]:
    return {
        name: {"color": styles[name].color, "linestyle": styles[name].dash, "linewidth": width, "label": name}
        for name, width in zip(advantages, nested(len(advantages)), strict=True)
    }


def _draw_means(
    axes: Axes, advantages: Mapping[str, FloatArray], styles: Mapping[str, Style], train_length: int
) -> None:
    looks = _looks(advantages, styles)
    for name, values in advantages.items():
        bands = banded(values, per_octave=2)  # wide enough to average out the ripple between neighbouring pairs
        axes.plot(bands.distance, bands.mean, **looks[name])
    _dress(axes, 1, next(iter(advantages.values())).size, train_length)
    axes.set_ylabel("advantage of a similar key")


def _draw_minima(
    axes: Axes,
    advantages: Mapping[str, FloatArray],
    styles: Mapping[str, Style],
    train_length: int,
    crossings: Mapping[str, int | None],
    start: int,
) -> None:
    looks = _looks(advantages, styles)
    for name, values in advantages.items():
        axes.step(*_running_minimum(values, start), where="post", **looks[name])
        if (crossing := crossings[name]) is not None:
            (mark,) = axes.plot(
                [crossing], [0], color=styles[name].color, gid=f"crossing {name}", zorder=5, label=name, linestyle="",
                marker=styles[name].marker, markersize=7, markeredgecolor=PAGE,
            )  # fmt: skip
            with_tips(mark, [f"{name}: {crossing:,} tokens"])
    _dress(axes, start, next(iter(advantages.values())).size, train_length)
    axes.set_ylabel("lowest advantage so far")


def _dress(axes: Axes, low: float, high: float, train_length: int) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    tokens_axis(axes, low, high, ticks=7)
    mark_length(axes, train_length)


def _running_minimum(values: FloatArray, start: int) -> tuple[FloatArray, FloatArray]:
    """Distances from ``start`` at which a new minimum is reached, with both ends, and the minima."""
    minimum = np.minimum.accumulate(values)
    new = start + 1 + np.flatnonzero(np.diff(minimum[start:]))
    distance = np.concatenate([[start], new, [values.size - 1]])
    return distance.astype(np.float64), minimum[distance]
