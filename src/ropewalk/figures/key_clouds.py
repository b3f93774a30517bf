"""Single heads (PCA snapshots, attention maps, maps of cosines), and all figures of geometry."""

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
from ropewalk.figures.key_positions import key_norm_figure, key_score_figure
from ropewalk.figures.layer_curves import (
    SIDES,
    LayerTable,
    cluster_figure,
    cosine_figure,
    dot_figure,
    singular_value_figure,
    sink_figure,
)
from ropewalk.figures.style import GREY, INK, PAGE, PALETTE, label, tokens

CLOUDS = {"key": PALETTE[0], "query": PALETTE[1]}
SINK: dict[str, Any] = {"marker": "*", "markersize": 11, "color": INK, "markeredgecolor": PAGE, "linestyle": "none"}
ORIGIN: dict[str, Any] = {"marker": "+", "markersize": 7, "color": INK, "linestyle": "none"}
STRIP = 0.05  # width of the sink's own strip beside a map, as a share of the map


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one head over the longest prefix of the first document.

    Attributes:
        model: label.
        layer: index.
        head: query head.
        rope: before or after.
        tokens: of the prefix.
        weights: float32 (cells, cells), mean softmax weight of each cell, NaN where no query sees a key.
        cosines: likewise the mean normalised dot product.
        sink: float32 (tokens,), weight of every query on position 0, NaN where it is out of sight.
        sink_cosines: likewise its normalised dot product with that key.
    """

    model: str
    layer: int
    head: int
    rope: str
    tokens: int
    weights: NDArray[np.float32]
    cosines: NDArray[np.float32]
    sink: NDArray[np.float32]
    sink_cosines: NDArray[np.float32]


def pca_figure(clouds: pd.DataFrame, bases: pd.DataFrame, layers: LayerTable) -> Figure:
    """A row for each sampled key head of each checkpoint: before RoPE, then after it at every length.

    Args:
        clouds: points: model, layer, kv_head, rope, length (tokens), cloud ("query" or "key"), position, pc1, pc2.
        bases: a row for each sampled head, ascending: layer, kv_head, share (of the variance that both components
            show), origin_pc1, origin_pc2 (the zero vector).
        layers: the statistics, of which the heads' silhouettes and stable ranks are shown.
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
                note = _stable_rank(layers.of_key_heads({(basis.layer, basis.kv_head)}), model, length, rope)
                draw = partial(_draw_cloud, points=of_head[shown], around=of_head, basis=basis, name=name, note=note)
                row.append(Panel(draw, title))
            rows.append(row)
    handles = [Line2D([], [], color=CLOUDS[name], marker="o", ms=5, ls="none", label=name) for name in CLOUDS]
    sinks = [Line2D([], [], label="key at position 0", **SINK), Line2D([], [], label="zero vector", **ORIGIN)]
    caption = (
        f"One basis for each head: the first two principal components of its keys and queries before RoPE over the "
        f"first {tokens(lengths[0])} tokens of {layers.models[0]}, with the share of their variance that it shows. "
        "Points: a seeded sample of positions, and position 0. Across: the first component; up: the second. A head has "
        "the same axes for all checkpoints. r: stable rank of all its queries and of its keys, in all channels."
    )
    numbers = layers.of_key_heads({(basis.layer, basis.kv_head) for basis in heads}).numbers(
        "silhouette", "silhouette of these heads"
    )
    title = "Queries and keys of single heads"
    return Figure("geometry_pca", title, rows, caption, numbers=numbers, legend=[*handles, *sinks], size=(2.1, 1.75))


def _stable_rank(layers: LayerTable, model: str, length: int, rope: str) -> str:
    """The stable rank of a key head's queries, mean over its query heads, and of its keys."""
    queries, keys = (layers.mean(f"stable_rank_{side}", model, length, rope) for side in ("queries", "keys"))
    return f"r: queries {queries:.1f}, keys {keys:.1f}"


def _row_name(model: str, basis: Any) -> str:
    return f"{label(model)}\nlayer {basis.layer}, key head {basis.kv_head}\n({basis.share:.0%} of variance)"


def _draw_cloud(axes: Axes, points: pd.DataFrame, around: pd.DataFrame, basis: Any, name: str, note: str) -> None:
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
    axes.set_xlabel(note, fontsize=8, color=GREY, labelpad=1)
    axes.set_ylabel(name, fontsize=8)


@dataclass(frozen=True)
class MapKind:
    """A quantity of the maps.

    Attributes:
        name: of the figure.
        title: of it.
        field: of :class:`AttentionMap`, with the cells.
        sink: likewise, with position 0's own values.
        scale: of colours.
        words: the caption's first.
        numbers: and its last.
        form: of the numbers.
    """

    name: str
    title: str
    field: str
    sink: str
    scale: ColorScale
    words: str
    numbers: str
    form: str


WEIGHT_MAPS = MapKind(
    "geometry_attention", "Attention maps of single heads", "weights", "sink",
    ColorScale("cividis", 1e-6, 1, "mean attention weight of a cell", is_log=True), "Softmax weight",
    "mean weight on position 0 over the later queries", ".0%",
)  # fmt: skip
COSINE_MAPS = MapKind(
    "geometry_cosine_maps", "Normalised dot products of single heads", "cosines", "sink_cosines",
    ColorScale("RdBu_r", -1, 1, "mean cosine of a cell"), "Normalised dot product (cosine) of queries and keys",
    "mean cosine of the later queries with position 0", ".2f",
)  # fmt: skip


def attention_figure(maps: Sequence[AttentionMap], kind: MapKind = WEIGHT_MAPS) -> Figure:
    """A row for each chosen head; before and after RoPE for every checkpoint, the sink in a strip of its own."""
    heads = sorted({(shown.layer, shown.head) for shown in maps})
    models = list(dict.fromkeys(shown.model for shown in maps))
    by_key = {(shown.model, shown.layer, shown.head, shown.rope): shown for shown in maps}
    columns = [(model, rope) for model in models for rope in SIDES]
    rows: list[list[Panel | None]] = []
    for layer, head in heads:
        names = [f"layer {layer}, head {head}\nquery position (tokens)", *[""] * (len(columns) - 1)]
        draws = [
            partial(_draw_map, shown=by_key[model, layer, head, rope], kind=kind, name=name)
            for (model, rope), name in zip(columns, names, strict=True)
        ]
        titles = ["" if rows else f"{model}: {SIDES[rope]}" for model, rope in columns]
        rows.append([Panel(draw, title) for draw, title in zip(draws, titles, strict=True)])
    caption = (
        f"{kind.words} over the first {tokens(maps[0].tokens)} tokens, mean over the pairs of a cell that are seen; "
        "the strip at the left is position 0 alone. Before RoPE is what the same vectors would give without rotation. "
        f"Numbers: {kind.numbers}."
    )
    numbers = pd.DataFrame(
        {
            f"{model}, {SIDES[rope]}": [
                f"{np.nanmean(getattr(by_key[model, *head, rope], kind.sink)[1:]):{kind.form}}" for head in heads
            ]
            for model in models
            for rope in SIDES
        },
        index=[f"layer {layer}, head {head}" for layer, head in heads],
    )
    return Figure(kind.name, kind.title, rows, caption, numbers=numbers, scale=kind.scale, size=(2.7, 2.5))


def _draw_map(axes: Axes, shown: AttentionMap, kind: MapKind, name: str) -> None:
    values, first = getattr(shown, kind.field), getattr(shown, kind.sink)
    cells = values.shape[0]
    strip = max(3, round(STRIP * cells))
    sink = np.array([part.mean() for part in np.array_split(first, cells)])  # NaN where it is out of sight
    gap = np.full((cells, max(1, strip // 2)), np.nan)
    picture = np.hstack([np.repeat(sink[:, None], strip, axis=1), gap, values])
    offset = strip + gap.shape[1]
    axes.imshow(picture, norm=kind.scale.norm, cmap=kind.scale.colors, interpolation="nearest", aspect="auto")
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
    "geometry_key_norms",
    "geometry_attention",
    "geometry_cosine_maps",
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
        table: of :class:`ropewalk.figures.layer_curves.LayerTable`.
        scores: of :func:`ropewalk.figures.key_positions.key_score_figure` and ``key_norm_figure``.
        clouds: of :func:`pca_figure`.
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
        key_norm_figure(scores),
    ]
    figures += [pca_figure(clouds, bases, layers)] if len(bases) else []
    return figures + ([attention_figure(maps, kind) for kind in (WEIGHT_MAPS, COSINE_MAPS)] if maps else [])
