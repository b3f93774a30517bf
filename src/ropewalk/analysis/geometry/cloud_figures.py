"""Figures of single heads and single keys: PCA snapshots, key scores by position, attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ropewalk.analysis.figures.style import GREY, PALETTE, label, tokens
from ropewalk.analysis.geometry.canvas import SIDES, Sheet, length_colors, line, log_bins
from ropewalk.analysis.geometry.layer_figures import LayerTable
from ropewalk.analysis.geometry.measure import AttentionMap
from ropewalk.analysis.geometry.pca import Basis
from ropewalk.analysis.geometry.table import KeyScores

CLOUDS = {"key": PALETTE[0], "query": PALETTE[1]}
SINK: dict[str, Any] = {
    "marker": "*",
    "markersize": 11,
    "color": "black",
    "markeredgecolor": "white",
    "linestyle": "none",
}
ORIGIN: dict[str, Any] = {"marker": "+", "markersize": 7, "color": "black", "linestyle": "none"}
STRIP = 0.05  # width of the sink's own strip beside a map, as a share of the map


def pca(clouds: pd.DataFrame, bases: dict[tuple[int, int], Basis], found: LayerTable) -> Sheet:
    """A row for each sampled key head of each checkpoint: before RoPE, then after it at every length."""
    models, lengths = found.models, found.lengths
    rows = [(place, model) for place in sorted(bases) for model in models]
    columns = [("before", lengths[-1]), *(("after", length) for length in lengths)]
    sheet = Sheet(len(rows), len(columns), width=2.1, height=1.75, share_y="none")
    for row, (place, model) in enumerate(rows):
        of_head = clouds[(clouds["layer"] == place[0]) & (clouds["kv_head"] == place[1])]
        mine = of_head[of_head["model"] == model]
        for column, (rope, length) in enumerate(columns):
            panel = sheet.panels[row, column]
            _cloud(panel, mine[(mine["rope"] == rope) & (mine["length"] == length)], bases[place])
            _limits(panel, of_head)
            if row == 0:
                panel.set_title(f"{SIDES[rope]}, {tokens(length)}", fontweight="bold")
        share = bases[place].share.sum()
        name = f"{label(model)}\nlayer {place[0]}, key head {place[1]}\n({share:.0%} of variance)"
        sheet.panels[row, 0].set_ylabel(name, fontsize=8)
    handles = [Line2D([], [], color=CLOUDS[name], marker="o", ms=5, ls="none", label=name) for name in CLOUDS]
    sinks = [Line2D([], [], label="key at position 0", **SINK), Line2D([], [], label="zero vector", **ORIGIN)]
    title = f"The silhouette of queries against keys in these heads {found.of_key_heads(bases).reading('silhouette')}"
    caption = (
        f"One basis for each head: the first two principal components of its keys and queries before RoPE over the "
        f"first {tokens(lengths[0])} tokens of {models[0]}, with the share of their variance that it shows. Points: a "
        "seeded sample of positions, and position 0. Across: the first component; up: the second."
    )
    return sheet.words(title, caption, [*handles, *sinks])


def _cloud(panel: Axes, points: pd.DataFrame, basis: Basis) -> None:
    for name, color in CLOUDS.items():
        of = points[points["cloud"] == name]
        panel.scatter(of["pc1"], of["pc2"], s=3, color=color, alpha=0.35, linewidths=0, rasterized=True)
    origin = basis.project(np.zeros((1, basis.center.size)))[0]
    panel.plot(*origin, **ORIGIN)
    first = points[(points["cloud"] == "key") & (points["position"] == 0)]
    panel.plot(first["pc1"], first["pc2"], **SINK)


def _limits(panel: Axes, points: pd.DataFrame) -> None:
    for axis, set_limits in (("pc1", panel.set_xlim), ("pc2", panel.set_ylim)):
        low, high = points[axis].min(), points[axis].max()
        margin = 0.05 * (high - low)
        set_limits(low - margin, high + margin)
    panel.set_xticklabels([])
    panel.set_yticklabels([])
    panel.tick_params(length=0)


def key_scores(scores: Sequence[KeyScores], lengths: Sequence[int]) -> Sheet:
    """Mean attention weight of every key by its position; mean over measured layers and heads."""
    models = list(dict.fromkeys(entry.where["model"] for entry in scores))
    colors = length_colors(lengths)
    curves = {
        (model, rope, length): np.mean(
            [
                e.values
                for e in scores
                if (e.where["model"], e.where["rope"], e.where["length"]) == (model, rope, length)
            ],
            axis=0,
        )
        for model in models
        for rope in SIDES
        for length in lengths
    }
    sheet = Sheet(2, len(models), height=2.2, share_y="all")
    for row, rope in enumerate(SIDES):
        for column, model in enumerate(models):
            panel = sheet.panels[row, column]
            for length in lengths:
                values = curves[model, rope, length]
                positions, means = log_bins(values)
                panel.plot(positions + 1, means, color=colors[length], linewidth=1.2)
                panel.plot(1, values[0], marker="o", color=colors[length], ms=5)
            panel.plot(*_uniform(lengths[-1]), color=GREY, linestyle=":", linewidth=1.2)
            panel.set(xscale="log", yscale="log")
        sheet.panels[row, 0].set_ylabel(f"{SIDES[rope]}\nmean attention weight")
    for column, model in enumerate(models):
        sheet.panels[0, column].set_title(label(model), fontweight="bold")
        sheet.panels[1, column].set_xlabel("key position, counted from 1 (tokens)")
    legend = [line(f"{tokens(n)} tokens", colors[n], marker="o") for n in lengths]
    legend.append(line(f"uniform, {tokens(lengths[-1])}", GREY, ":"))
    caption = (
        "Softmax weight of a key, mean over the queries that see it and over the measured layers and heads; past 32, "
        "means of bins of equal width on the axis. Dots: position 0. Dotted: every query spreads its weight evenly. "
        "The last keys are seen by few queries, near to them. Before RoPE, attention is what the same vectors would "
        "give without rotation."
    )
    return sheet.words(_key_score_title(curves, models, lengths[-1]), caption, legend)


def _key_score_title(curves: dict[tuple[str, str, int], NDArray[Any]], models: Sequence[str], length: int) -> str:
    parts = []
    for model in models:
        values = curves[model, "after", length]
        # Of the first half, because the last keys are seen by few queries and theirs is hardly a mean.
        parts.append(
            f"{values[0]:.0%} in {model}, the strongest other key of the first half {values[1 : length // 2].max():.1%}"
        )
    return f"Position 0 stands out with a mean attention weight at {tokens(length)} after RoPE of {'; '.join(parts)}"


def _uniform(length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over queries i >= j of 1 / (i + 1): what attention that prefers nothing would give key j."""
    inverse = 1 / np.arange(1, length + 1)
    sums = np.cumsum(inverse[::-1])[::-1]
    positions, means = log_bins(sums / np.arange(length, 0, -1))
    return positions + 1, means


def attention_maps(maps: Sequence[AttentionMap]) -> Sheet:
    """A row for each chosen head; before and after RoPE for every checkpoint, the sink in a strip of its own."""
    heads = sorted({(found.layer, found.head) for found in maps})
    models = list(dict.fromkeys(found.model for found in maps))
    columns = [(model, rope) for model in models for rope in SIDES]
    sheet = Sheet(len(heads), len(columns), width=2.7, height=2.5, share_y="none")
    image = None
    for row, (layer, head) in enumerate(heads):
        for column, (model, rope) in enumerate(columns):
            wanted = (model, layer, head, rope)
            found = next(m for m in maps if (m.model, m.layer, m.head, m.rope) == wanted)
            panel = sheet.panels[row, column]
            image = _map(panel, found)
            if row == 0:
                panel.set_title(label(f"{model}: {SIDES[rope]}"), fontweight="bold")
            if row == len(heads) - 1:
                panel.set_xlabel("key position (tokens)")
        sheet.panels[row, 0].set_ylabel(f"layer {layer}, head {head}\nquery position (tokens)")
    assert image is not None
    bar = sheet.figure.colorbar(image, ax=list(sheet.panels.flat), shrink=0.8, extend="min", pad=0.01)
    bar.set_label("mean attention weight of a cell")
    caption = (
        f"Softmax weight over the first {tokens(maps[0].tokens)} tokens, mean over the pairs of a cell that causality "
        "allows; the strip at the left is position 0 alone. Before RoPE, attention is what the same vectors would give "
        "without rotation."
    )
    return sheet.words(_map_title(maps, models), caption)


def _map(panel: Axes, found: AttentionMap) -> AxesImage:
    cells = found.weights.shape[0]
    strip = max(3, round(STRIP * cells))
    sink = np.array([part.mean() for part in np.array_split(found.sink, cells)])
    gap = np.full((cells, max(1, strip // 2)), np.nan)
    picture = np.hstack([np.repeat(sink[:, None], strip, axis=1), gap, found.weights])
    offset = strip + gap.shape[1]
    norm = LogNorm(1e-6, 1, clip=False)
    image = panel.imshow(picture, norm=norm, cmap="cividis", interpolation="nearest", aspect="auto")
    places = [0, found.tokens // 2, found.tokens]
    panel.set_xticks(
        [strip / 2, *(offset + cells * place / found.tokens for place in places[1:])],
        ["0", *(tokens(place) for place in places[1:])],
    )
    panel.set_yticks([cells * place / found.tokens for place in places], [tokens(place) for place in places])
    panel.grid(visible=False)
    return image


def _map_title(maps: Sequence[AttentionMap], models: Sequence[str]) -> str:
    weights = {(m.layer, m.head, m.model, m.rope): float(m.sink[1:].mean()) for m in maps}
    layer, head = max(((m.layer, m.head) for m in maps), key=lambda place: weights[(*place, models[0], "after")])
    parts = []
    for model in models:
        before, after = (weights[layer, head, model, rope] for rope in SIDES)
        parts.append(f"{after:.0%} in {model} ({before:.0%} without rotation)")
    return f"Of the chosen heads, layer {layer}, head {head} attends most to position 0: {'; '.join(parts)}"
