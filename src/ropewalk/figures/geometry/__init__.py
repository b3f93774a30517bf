"""Figures of queries and keys before and after RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ropewalk.figures.figure import Figure
from ropewalk.figures.geometry.key_clouds import AttentionMap, attention_figure, key_score_figure, pca_figure
from ropewalk.figures.geometry.layer_curves import (
    LayerTable,
    cluster_figure,
    cosine_figure,
    dot_figure,
    singular_value_figure,
    sink_figure,
)

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
        table: of :class:`ropewalk.figures.geometry.layer_curves.LayerTable`.
        scores: of :func:`ropewalk.figures.geometry.key_clouds.key_score_figure`.
        clouds: of :func:`ropewalk.figures.geometry.key_clouds.pca_figure`.
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


__all__ = ["GEOMETRY_FIGURES", "AttentionMap", "geometry_figures"]
