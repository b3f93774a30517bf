"""The figures of a geometry run, by file name."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ropewalk.analysis.figures.style import house
from ropewalk.analysis.geometry import cloud_figures, layer_figures
from ropewalk.analysis.geometry.canvas import Sheet
from ropewalk.analysis.geometry.measure import Findings
from ropewalk.analysis.geometry.plan import Plan
from ropewalk.analysis.geometry.table import KeyScores

FIGURES = (
    "geometry_cosine",
    "geometry_dot",
    "geometry_singular_values",
    "geometry_clusters",
    "geometry_sink",
    "geometry_pca",
    "geometry_key_scores",
    "geometry_attention",
)


def draw_all(
    plan: Plan, table: pd.DataFrame, scores: list[KeyScores], clouds: pd.DataFrame, findings: Findings
) -> list[Path]:
    """Draw every figure that there is something for, in every format (formats=[]: none); returns the paths."""
    if not plan.config.formats:
        return []
    with house():
        sheets = _sheets(plan, table, scores, clouds, findings)
        return [path for name, sheet in sheets.items() for path in sheet.save(plan.output, name, plan.config.formats)]


def _sheets(
    plan: Plan, table: pd.DataFrame, scores: list[KeyScores], clouds: pd.DataFrame, findings: Findings
) -> dict[str, Sheet]:
    found = layer_figures.LayerTable(table)
    lengths = plan.config.lengths
    sheets = {
        "geometry_cosine": layer_figures.cosine(found),
        "geometry_dot": layer_figures.dot_products(found),
        "geometry_singular_values": layer_figures.singular_values(found, plan.shape.head_dim),
        "geometry_clusters": layer_figures.clusters(found),
        "geometry_sink": layer_figures.sink(found),
        "geometry_key_scores": cloud_figures.key_scores(scores, lengths),
    }
    if findings.bases:
        sheets["geometry_pca"] = cloud_figures.pca(clouds, findings.bases, found)
    if findings.maps:
        sheets["geometry_attention"] = cloud_figures.attention_maps(findings.maps)
    return sheets
