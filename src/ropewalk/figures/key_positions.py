"""Keys by their position: softmax weight beside the normalised dot product, and norms."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ropewalk.figures.figure import Figure, Panel
from ropewalk.figures.layer_curves import SIDES, entry, include, length_colors
from ropewalk.figures.style import GREY, PALETTE, tokens


def key_score_figure(scores: pd.DataFrame) -> Figure:
    """Attention weight and normalised dot product of every key by its position; mean over measured layers and heads.

    Args:
        scores: means over the queries that see a key and the heads of a layer: model, layer, length (tokens), rope,
            position, value (softmax weight), cosine (normalised dot product).
    """
    models = list(dict.fromkeys(scores["model"]))
    lengths = sorted(int(length) for length in scores["length"].unique())
    weights, cosines = (_by_position(scores, column) for column in ("value", "cosine"))
    kinds = (
        ("softmax weight", weights, partial(_draw_weights, limits=_limits(weights.values(), is_log=True))),
        ("normalised dot product", cosines, partial(_draw_cosines, limits=_limits(cosines.values()))),
    )
    rows: list[list[Panel | None]] = []
    for rope in SIDES:
        row: list[Panel | None] = []
        for model in models:
            for title, curves, draw in kinds:
                shown = {n: curves[model, rope, n] for n in lengths}
                row.append(Panel(partial(draw, curves=shown, rope=rope), "" if rows else f"{model}: {title}"))
        rows.append(row)
    legend = [entry(f"{tokens(n)} tokens", color, marker="o") for n, color in length_colors(lengths).items()]
    legend.append(entry(f"uniform, {tokens(lengths[-1])}", GREY, ":"))
    caption = (
        "Softmax weight of a key and its normalised dot product (cosine) with queries, means over the queries that see "
        "it and over the measured layers and heads; past 32, means of bins of equal width on the axis. Dots: position "
        "0. Dotted: every query spreads its weight evenly. The last keys are seen by few queries, near to them. Before "
        "RoPE, attention is what the same vectors would give without rotation."
    )
    longest = [(model, "after", lengths[-1]) for model in models]
    numbers = _score_numbers(models, [weights[key] for key in longest], [cosines[key] for key in longest])
    title = f"Attention by key position; numbers at {tokens(lengths[-1])} tokens after RoPE"
    return Figure("geometry_key_scores", title, rows, caption, numbers=numbers, legend=legend, size=(3.1, 2.2))


def _by_position(scores: pd.DataFrame, column: str) -> dict[tuple[str, str, int], NDArray[np.float64]]:
    """Mean over layers by model, side and length: float64 (length,)."""
    groups = scores.groupby(["model", "rope", "length", "position"], observed=True)[column]
    means = groups.mean(skipna=False).sort_index()
    keys = means.index.droplevel("position").unique()
    return {(model, rope, int(length)): means[model, rope, length].to_numpy(float) for model, rope, length in keys}


def _limits(curves: Collection[NDArray[np.float64]], *, is_log: bool = False) -> tuple[float, float]:
    """Limits that all panels of a quantity share, over what is drawn: bins lower peaks."""
    drawn = np.concatenate([log_bins(values)[1] for values in curves])
    if is_log:
        shown = drawn[drawn > 0]
        return float(shown.min()) / 1.5, float(shown.max()) * 1.5
    margin = 0.06 * float(np.ptp(drawn)) or 0.1
    return float(drawn.min()) - margin, float(drawn.max()) + margin


def _score_numbers(
    models: Sequence[str], weights: Sequence[NDArray[Any]], cosines: Sequence[NDArray[Any]]
) -> pd.DataFrame:
    """Of position 0, and of the strongest other key of the first half: the last keys are seen by few queries."""
    return pd.DataFrame(
        {
            "weight of position 0": [f"{values[0]:.0%}" for values in weights],
            "of the strongest other key of the first half": [
                f"{values[1 : values.size // 2].max():.1%}" for values in weights
            ],
            "cosine with position 0": [f"{values[0]:.2f}" for values in cosines],
            "with later keys": [f"{values[1:].mean():.2f}" for values in cosines],
        },
        index=list(models),
    )


def _draw_weights(axes: Axes, curves: dict[int, NDArray[Any]], rope: str, limits: tuple[float, float]) -> None:
    axes.set_yscale("log")
    _draw_by_position(axes, curves, limits)
    axes.plot(*_uniform(max(curves)), color=GREY, linestyle=":", linewidth=1.2)
    axes.set_ylabel(f"{SIDES[rope]}\nmean attention weight")


def _draw_cosines(axes: Axes, curves: dict[int, NDArray[Any]], rope: str, limits: tuple[float, float]) -> None:
    _draw_by_position(axes, curves, limits)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel(f"{SIDES[rope]}\nmean cosine")


def _draw_by_position(axes: Axes, curves: dict[int, NDArray[Any]], limits: tuple[float, float]) -> None:
    colors = length_colors(list(curves))
    for length, values in curves.items():
        positions, means = log_bins(values)
        axes.plot(positions + 1, means, color=colors[length], linewidth=1.2)
        axes.plot(1, values[0], marker="o", color=colors[length], markersize=5)
    axes.set_ylim(*limits)
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("key position + 1 (tokens)")


def key_norm_figure(scores: pd.DataFrame) -> Figure:
    """Norm of every key by its position over the longest input, after RoPE; a panel for each checkpoint.

    Args:
        scores: as in :func:`key_score_figure`, with key_norm (mean over a layer's key heads).
    """
    longest = int(scores["length"].max())
    shown = scores[(scores["length"] == longest) & (scores["rope"] == "after")]
    norms = {
        model: of_model.pivot(index="layer", columns="position", values="key_norm").to_numpy(float)
        for model, of_model in shown.groupby("model", sort=False, observed=True)
    }
    rows: list[list[Panel | None]] = [
        [Panel(partial(_draw_norms, norms=values), str(model)) for model, values in norms.items()]
    ]
    caption = (
        f"Euclidean norm of the keys of {tokens(longest)} tokens after RoPE. Line: mean over the measured layers and "
        "heads; band: the middle 80% of the layers; past 32, means of bins of equal width on the axis. Dot: position "
        "0. A rotation leaves norms as they are; an attention scaling multiplies them."
    )
    numbers = pd.DataFrame(
        {
            "position 0": [f"{values[:, 0].mean():.2f}" for values in norms.values()],
            "1 to 31": [f"{values[:, 1:32].mean():.2f}" for values in norms.values()],
            "32 and later": [f"{values[:, 32:].mean():.2f}" for values in norms.values()],
        },
        index=list(norms),
    )
    return Figure(
        "geometry_key_norms", "Key norms by position", rows, caption, numbers=numbers, size=(3.6, 2.4), share="row"
    )


def _draw_norms(axes: Axes, norms: NDArray[np.float64]) -> None:
    binned = [log_bins(of_layer) for of_layer in norms]
    positions, values = binned[0][0] + 1, np.array([means for _, means in binned])
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    axes.fill_between(positions, low, high, color=PALETTE[0], alpha=0.18, linewidth=0)
    axes.plot(positions, values.mean(0), color=PALETTE[0], linewidth=1.4)
    axes.plot(1, values[:, 0].mean(), marker="o", color=PALETTE[0], markersize=5)
    include(axes, 0.0)
    axes.set_ylabel("key norm")
    _dress(axes)


def log_bins(values: NDArray[np.floating], exact: int = 32, bins: int = 72) -> tuple[NDArray[Any], NDArray[Any]]:
    """Positions and means of ``values``: the first ``exact`` one by one, then in bins of equal width on a log scale."""
    edges = np.unique(np.geomspace(exact, values.size, bins).astype(int)) if values.size > exact else np.array([])
    singles = np.arange(min(exact, values.size))
    starts, ends = edges[:-1], edges[1:]
    middles = np.sqrt(starts * (ends - 1.0)) if edges.size else np.array([])
    means = [values[start:end].mean() for start, end in zip(starts, ends, strict=True)]
    return np.concatenate([singles, middles]), np.concatenate([values[: singles.size], means])


def _uniform(length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over queries i >= j of 1 / (i + 1): the weight of key j under attention without any preference."""
    inverse = 1 / np.arange(1, length + 1)
    sums = np.cumsum(inverse[::-1])[::-1]
    positions, means = log_bins(sums / np.arange(length, 0, -1))
    return positions + 1, means
