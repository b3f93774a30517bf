"""Single heads and single keys (PCA snapshots, key scores by position, attention maps), and all figures of geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ropewalk.figures.figure import ColorScale, Figure, Panel
from ropewalk.figures.layer_curves import (
    SIDES,
    LayerTable,
    cluster_figure,
    cosine_figure,
    dot_figure,
    entry,
    length_colors,
    singular_value_figure,
    sink_figure,
)
from ropewalk.figures.style import GREY, INK, PAGE, PALETTE, label, tokens

CLOUDS = {"key": PALETTE[0], "query": PALETTE[1]}
SINK: dict[str, Any] = {"marker": "*", "markersize": 11, "color": INK, "markeredgecolor": PAGE, "linestyle": "none"}
ORIGIN: dict[str, Any] = {"marker": "+", "markersize": 7, "color": INK, "linestyle": "none"}
STRIP = 0.05  # width of the sink's own strip beside a map, as a share of the map
WEIGHTS = ColorScale("cividis", 1e-6, 1, "mean attention weight of a cell", is_log=True)


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one head over the longest prefix of the first document.

    Attributes:
        model: label.
        layer: index.
        head: query head.
        rope: before or after.
        tokens: of the prefix.
        weights: float32 (cells, cells), mean softmax weight of each cell, NaN where causality leaves nothing.
        sink: float32 (tokens,), weight of every query on position 0.
    """

    model: str
    layer: int
    head: int
    rope: str
    tokens: int
    weights: NDArray[np.float32]
    sink: NDArray[np.float32]


def pca_figure(clouds: pd.DataFrame, bases: pd.DataFrame, layers: LayerTable) -> Figure:
    """A row for each sampled key head of each checkpoint: before RoPE, then after it at every length.

    Args:
        clouds: points: model, layer, kv_head, rope, length (tokens), cloud ("query" or "key"), position, pc1, pc2.
        bases: a row for each sampled head, ascending: layer, kv_head, share (of the variance that both components
            show), origin_pc1, origin_pc2 (the zero vector).
        layers: the statistics, of which the heads' silhouettes are shown.
    """
    lengths, heads = layers.lengths, list(bases.itertuples())
    columns = [("before", lengths[-1]), *(("after", length) for length in lengths)]
    rows: list[list[Panel | None]] = []
    for basis in heads:
        of_head = clouds[(clouds["layer"] == basis.layer) & (clouds["kv_head"] == basis.kv_head)]
        for model in layers.models:
            row: list[Panel | None] = []
            for rope, length in columns:
                shown = (of_head["model"] == model) & (of_head["rope"] == rope) & (of_head["length"] == length)
                title = f"{SIDES[rope]}, {tokens(length)}" if not rows else ""
                name = _row_name(model, basis) if not row else ""
                draw = partial(_draw_cloud, points=of_head[shown], around=of_head, basis=basis, name=name)
                row.append(Panel(draw, title))
            rows.append(row)
    handles = [Line2D([], [], color=CLOUDS[name], marker="o", ms=5, ls="none", label=name) for name in CLOUDS]
    sinks = [Line2D([], [], label="key at position 0", **SINK), Line2D([], [], label="zero vector", **ORIGIN)]
    caption = (
        f"One basis for each head: the first two principal components of its keys and queries before RoPE over the "
        f"first {tokens(lengths[0])} tokens of {layers.models[0]}, with the share of their variance that it shows. "
        "Points: a seeded sample of positions, and position 0. Across: the first component; up: the second."
    )
    numbers = layers.of_key_heads({(basis.layer, basis.kv_head) for basis in heads}).numbers(
        "silhouette", "silhouette of these heads"
    )
    title = "Queries and keys of single heads"
    return Figure("geometry_pca", title, rows, caption, numbers=numbers, legend=[*handles, *sinks], size=(2.1, 1.75))


def _row_name(model: str, basis: Any) -> str:
    return f"{label(model)}\nlayer {basis.layer}, key head {basis.kv_head}\n({basis.share:.0%} of variance)"


def _draw_cloud(axes: Axes, points: pd.DataFrame, around: pd.DataFrame, basis: Any, name: str) -> None:
    for cloud, color in CLOUDS.items():
        of = points[points["cloud"] == cloud]
        axes.scatter(of["pc1"], of["pc2"], s=3, color=color, alpha=0.35, linewidths=0, rasterized=True)
    axes.plot(basis.origin_pc1, basis.origin_pc2, **ORIGIN)
    first = points[(points["cloud"] == "key") & (points["position"] == 0)]
    axes.plot(first["pc1"], first["pc2"], **SINK)
    for column, set_limits in (("pc1", axes.set_xlim), ("pc2", axes.set_ylim)):
        low, high = around[column].min(), around[column].max()
        margin = 0.05 * (high - low)
        set_limits(low - margin, high + margin)
    axes.set_xticklabels([])
    axes.set_yticklabels([])
    axes.tick_params(length=0)
    axes.set_ylabel(name, fontsize=8)


def key_score_figure(scores: pd.DataFrame) -> Figure:
    """Mean attention weight of every key by its position; mean over measured layers and heads.

    Args:
        scores: mean weight of each key over the queries that see it and the heads of a layer: model, layer, length
            (tokens), rope, position, value.
    """
    means = scores.groupby(["model", "rope", "length", "position"], observed=True)["value"].mean().sort_index()
    models = list(dict.fromkeys(scores["model"]))
    lengths = sorted(int(length) for length in scores["length"].unique())
    curves = {
        (model, rope, length): means[model, rope, length].to_numpy(dtype=float)
        for model in models
        for rope in SIDES
        for length in lengths
    }
    rows: list[list[Panel | None]] = [
        [
            Panel(
                partial(_draw_scores, curves={n: curves[model, rope, n] for n in lengths}, rope=rope),
                "" if row else model,
            )
            for model in models
        ]
        for row, rope in enumerate(SIDES)
    ]
    legend = [entry(f"{tokens(n)} tokens", color, marker="o") for n, color in length_colors(lengths).items()]
    legend.append(entry(f"uniform, {tokens(lengths[-1])}", GREY, ":"))
    caption = (
        "Softmax weight of a key, mean over the queries that see it and over the measured layers and heads; past 32, "
        "means of bins of equal width on the axis. Dots: position 0. Dotted: every query spreads its weight evenly. "
        "The last keys are seen by few queries, near to them. Before RoPE, attention is what the same vectors would "
        "give without rotation."
    )
    numbers = _score_numbers({model: curves[model, "after", lengths[-1]] for model in models})
    title = f"Attention weight by key position; numbers at {tokens(lengths[-1])} tokens after RoPE"
    return Figure(
        "geometry_key_scores", title, rows, caption, numbers=numbers, legend=legend, size=(3.6, 2.2), share="all"
    )


def _score_numbers(curves: dict[str, NDArray[Any]]) -> pd.DataFrame:
    """Weight on position 0 and on the strongest other key of the first half: the last keys are seen by few queries."""
    return pd.DataFrame(
        {
            "position 0": [f"{values[0]:.0%}" for values in curves.values()],
            "strongest other key of the first half": [
                f"{values[1 : values.size // 2].max():.1%}" for values in curves.values()
            ],
        },
        index=list(curves),
    )


def _draw_scores(axes: Axes, curves: dict[int, NDArray[Any]], rope: str) -> None:
    colors = length_colors(list(curves))
    for length, values in curves.items():
        positions, means = log_bins(values)
        axes.plot(positions + 1, means, color=colors[length], linewidth=1.2)
        axes.plot(1, values[0], marker="o", color=colors[length], markersize=5)
    axes.plot(*_uniform(max(curves)), color=GREY, linestyle=":", linewidth=1.2)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("key position, counted from 1 (tokens)")
    axes.set_ylabel(f"{SIDES[rope]}\nmean attention weight")


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


def attention_figure(maps: Sequence[AttentionMap]) -> Figure:
    """A row for each chosen head; before and after RoPE for every checkpoint, the sink in a strip of its own."""
    heads = sorted({(shown.layer, shown.head) for shown in maps})
    models = list(dict.fromkeys(shown.model for shown in maps))
    by_key = {(shown.model, shown.layer, shown.head, shown.rope): shown for shown in maps}
    columns = [(model, rope) for model in models for rope in SIDES]
    rows: list[list[Panel | None]] = []
    for layer, head in heads:
        names = [f"layer {layer}, head {head}\nquery position (tokens)", *[""] * (len(columns) - 1)]
        draws = [
            partial(_draw_map, shown=by_key[model, layer, head, rope], name=name)
            for (model, rope), name in zip(columns, names, strict=True)
        ]
        titles = ["" if rows else f"{model}: {SIDES[rope]}" for model, rope in columns]
        rows.append([Panel(draw, title) for draw, title in zip(draws, titles, strict=True)])
    caption = (
        f"Softmax weight over the first {tokens(maps[0].tokens)} tokens, mean over the pairs of a cell that causality "
        "allows; the strip at the left is position 0 alone. Before RoPE, attention is what the same vectors would give "
        "without rotation. Numbers: mean weight on position 0 over the later queries."
    )
    numbers = pd.DataFrame(
        {
            f"{model}, {SIDES[rope]}": [f"{by_key[model, *head, rope].sink[1:].mean():.0%}" for head in heads]
            for model in models
            for rope in SIDES
        },
        index=[f"layer {layer}, head {head}" for layer, head in heads],
    )
    title = "Attention maps of single heads"
    return Figure("geometry_attention", title, rows, caption, numbers=numbers, scale=WEIGHTS, size=(2.7, 2.5))


def _draw_map(axes: Axes, shown: AttentionMap, name: str) -> None:
    cells = shown.weights.shape[0]
    strip = max(3, round(STRIP * cells))
    sink = np.array([part.mean() for part in np.array_split(shown.sink, cells)])
    gap = np.full((cells, max(1, strip // 2)), np.nan)
    picture = np.hstack([np.repeat(sink[:, None], strip, axis=1), gap, shown.weights])
    offset = strip + gap.shape[1]
    axes.imshow(picture, norm=WEIGHTS.norm, cmap=WEIGHTS.colors, interpolation="nearest", aspect="auto")
    marks = [0, shown.tokens // 2, shown.tokens]
    axes.set_xticks(
        [strip / 2, *(offset + cells * mark / shown.tokens for mark in marks[1:])],
        ["0", *(tokens(mark) for mark in marks[1:])],
    )
    axes.set_yticks([cells * mark / shown.tokens for mark in marks], [tokens(mark) for mark in marks])
    axes.grid(visible=False)
    axes.set_xlabel("key position (tokens)")
    axes.set_ylabel(name)


GEOMETRY_FIGURES = (
    "geometry_cosine",
    "geometry_dot",
    "geometry_singular_values",
    "geometry_clusters",
    "geometry_sink",
    "geometry_pca",
    "geometry_key_scores",
    "geometry_attention",
)


def geometry_figures(
    table: pd.DataFrame,
    scores: pd.DataFrame,
    clouds: pd.DataFrame,
    bases: pd.DataFrame,
    maps: Sequence[AttentionMap],
    head_dim: int,
) -> list[Figure]:
    """Every figure that there is something for, named as in ``GEOMETRY_FIGURES``.

    Args:
        table: of :class:`ropewalk.figures.key_clouds.layer_curves.LayerTable`.
        scores: of :func:`ropewalk.figures.key_clouds.key_score_figure`.
        clouds: of :func:`ropewalk.figures.key_clouds.pca_figure`.
        bases: of the same; empty: no snapshots.
        maps: of chosen heads; empty: no maps.
        head_dim: channels of a head.
    """
    layers = LayerTable(table)
    figures = [
        cosine_figure(layers),
        dot_figure(layers),
        singular_value_figure(layers, head_dim),
        cluster_figure(layers),
        sink_figure(layers),
        key_score_figure(scores),
    ]
    figures += [pca_figure(clouds, bases, layers)] if len(bases) else []
    return figures + ([attention_figure(maps)] if maps else [])
