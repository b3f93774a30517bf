"""The attention kernel against distance, and what it says about a similar key."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ropewalk.analysis.figures.style import (
    GREY,
    MethodStyle,
    canvas,
    draw_bands,
    finish,
    in_house_style,
    label,
    mark_length,
    method_styles,
    nested,
    panel_grid,
    short,
    tokens,
    tokens_axis,
)
from ropewalk.analysis.kernels import banded, first_not_positive, kernel, semantic_advantage
from ropewalk.rope.spectrum import FloatArray, Spectrum


@in_house_style
def kernel_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """The kernel a^2 2/d sum_i cos(m theta_i) of each method, over every distance m up to the target length.

    The kernel oscillates faster than any axis can show, so each panel has the range and the mean in buckets of equal
    width in log distance, every integer distance counted; the first method's mean is repeated for comparison.

    Args:
        spectra: method name -> spectrum.
        train_length: tokens; marked.
        target_length: tokens; the end of the axis.

    Returns:
        A figure with one panel for each method.
    """
    styles = method_styles(list(spectra))
    kernels = {
        name: kernel(spectrum.inv_freq, target_length, spectrum.attention_scaling) for name, spectrum in spectra.items()
    }
    rows, columns = panel_grid(len(spectra))
    figure = canvas(max(4.2 * columns, 8), 2.9 * rows + 1.2)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    kernel_panels(panels, kernels, styles, train_length, width=36)
    lowest = ", ".join(f"{short(name)} {values.min():.2f}" for name, values in kernels.items())
    title = f"Lowest value of the kernel up to {tokens(target_length)} tokens: {lowest}"
    return finish(figure, title, KERNEL_CAPTION)


KERNEL_CAPTION = (
    "The expected logit of a query on its own copy at a distance, relative to an unrotated head: mean (line) and "
    "range (band) over every integer distance of a bucket, 16 buckets an octave. Grey: the mean of the first method. "
    "Stopped pairs lift the curve by their share, attention scaling multiplies it by its square."
)


def kernel_panels(
    panels: NDArray[Any],
    kernels: dict[str, FloatArray],
    styles: dict[str, MethodStyle],
    train_length: int,
    width: int,
) -> None:
    """Draw one banded kernel, values at distances 0, 1, 2, ..., into each panel; panels left over vanish.

    Args:
        panels: Axes (rows, columns) that share their axes.
        kernels: method name -> values.
        styles: method name -> style.
        train_length: tokens; marked.
        width: characters at which a name over a panel is wrapped.
    """
    columns = panels.shape[1]
    reference = banded(next(iter(kernels.values())))
    for place, (name, values) in enumerate(kernels.items()):
        panel: Axes = panels.flat[place]
        panel.axhline(0, color=GREY, linewidth=0.8)
        panel.plot(reference.distance, reference.mean, color=GREY, linewidth=1, linestyle=(0, (2, 1)), zorder=2)
        draw_bands(panel, banded(values), styles[name], name)
        panel.set_title(label(name, width), color=styles[name].color, fontweight="bold", pad=14)
        is_lowest = place + columns >= len(kernels)
        tokens_axis(panel, 1, values.size, "distance (tokens)" if is_lowest else "", ticks=7)
        panel.tick_params(labelbottom=is_lowest)
        mark_length(panel, train_length)
        if place % columns == 0:
            panel.set_ylabel("attention kernel")
    for panel in panels.flat[len(kernels) :]:
        panel.set_visible(False)


@in_house_style
def semantic_figure(spectra: dict[str, Spectrum], *, train_length: int, target_length: int) -> Figure:
    """How far a similar key outscores a random one, relative to distance 0, and the lowest it has been so far.

    See :func:`ropewalk.analysis.kernels.semantic_advantage` (Men et al., arXiv 2405.14591).

    Args:
        spectra: method name -> spectrum.
        train_length: tokens; marked.
        target_length: tokens; the end of the axis.

    Returns:
        A figure with two axes: bucket means, and the running minimum with the first distance at or below 0.
    """
    styles = method_styles(list(spectra))
    figure = canvas(9.5, 4.3)
    average, lowest = figure.subplots(1, 2)
    advantages = {name: semantic_advantage(one.inv_freq, target_length) for name, one in spectra.items()}
    crossings = {name: first_not_positive(values) for name, values in advantages.items()}
    earliest = min((distance for distance in crossings.values() if distance is not None), default=target_length)
    start = 1 << (max(1, min(train_length // 16, target_length // 64, earliest // 2)).bit_length() - 1)
    for (name, values), width in zip(advantages.items(), nested(len(spectra)), strict=True):
        look = {"color": styles[name].color, "linestyle": styles[name].dash, "linewidth": width, "label": label(name)}
        bands = banded(values, per_octave=2)  # wide enough to average out the ripple between neighbouring pairs
        average.plot(bands.distance, bands.mean, **look)
        distance, minimum = _running_minimum(values, start)
        lowest.step(distance, minimum, where="post", **look)
        if (crossing := crossings[name]) is not None:
            marker: dict[str, Any] = {"marker": styles[name].marker, "markersize": 7, "markeredgecolor": "white"}
            lowest.plot([crossing], [0], color=styles[name].color, gid=f"crossing {name}", zorder=5, **marker)
    for axes in (average, lowest):
        axes.axhline(0, color=GREY, linewidth=0.8)
        tokens_axis(axes, start if axes is lowest else 1, target_length, ticks=7)
        mark_length(axes, train_length)
    average.set_title("mean over similar distances", pad=14)
    lowest.set_title(f"lowest so far, from {tokens(start)} on (marker: first at 0 or below)", pad=14)
    average.set_ylabel("advantage of a similar key (1 at distance 0)")
    return finish(figure, _semantic_title(crossings, target_length), SEMANTIC_CAPTION, styles)


def _running_minimum(values: FloatArray, start: int) -> tuple[FloatArray, FloatArray]:
    """Distances from ``start`` at which a new minimum is reached, with both ends, and the minima."""
    minimum = np.minimum.accumulate(values)
    new = start + 1 + np.flatnonzero(np.diff(minimum[start:]))
    distance = np.concatenate([[start], new, [values.size - 1]])
    return distance.astype(np.float64), minimum[distance]


SEMANTIC_CAPTION = (
    "Expected score of a key that resembles the query, less that of a random key, over its value at distance 0: "
    "2/d sum_i cos(m theta_i) (Men et al., arXiv 2405.14591). Left: mean in half octaves. Right: the minimum over "
    "all distances so far; from the marker on, a similar key may lose to a random one."
)


def _semantic_title(crossings: dict[str, int | None], target_length: int) -> str:
    never = [short(name) for name, distance in crossings.items() if distance is None]
    lost = [f"{short(name)} ({distance:,})" for name, distance in crossings.items() if distance is not None]
    kept = f"A similar key stays ahead at every distance to {tokens(target_length)} tokens under {', '.join(never)}"
    if not lost:
        return kept
    first = f"no longer under {', '.join(lost)}" if never else f"A similar key falls level with {', '.join(lost)}"
    return f"{kept}; {first}" if never else f"{first} tokens away"
