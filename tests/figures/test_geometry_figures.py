"""Geometry's figures: every drawing holds the numbers of its table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figures.drawings import assert_words_are_whole, axes_of

from ropewalk.figures.figure import compose
from ropewalk.figures.key_clouds import COSINE_MAPS, AttentionMap, attention_figure, geometry_figures, pca_figure
from ropewalk.figures.key_positions import key_norm_figure, key_score_figure
from ropewalk.figures.layer_curves import LayerTable, cosine_figure, singular_value_figure, sink_figure

COLUMNS = ["model", "layer", "head", "kv_head", "length", "rope", "statistic", "value"]
MODELS, LENGTHS, LAYERS = ("plain", "clipped"), (64, 96), 3
STATISTICS = (
    "intra_cosine_queries", "intra_cosine_keys", "inter_cosine", "intra_dot_queries", "intra_dot_keys", "inter_dot",
    "silhouette", "davies_bouldin", "fsv_share_queries", "fsv_share_keys", "fsv_ratio_queries", "fsv_ratio_keys",
    "stable_rank_queries", "stable_rank_keys", "sink_weight", "max_dot", "sink_key_norm", "other_key_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (model, layer, head, head // 2, length, rope, statistic, rng.random())
        for model in MODELS
        for layer in range(LAYERS)
        for head in range(4)
        for length in LENGTHS
        for rope in ("before", "after")
        for statistic in STATISTICS
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


@pytest.fixture(scope="module")
def scores() -> pd.DataFrame:
    """Weight 1 / (position + 1) + layer / 10, half of it before RoPE; cosine 1 less that; norm 2, or 6 at layer 1."""
    parts = [
        pd.DataFrame(
            {"position": np.arange(length), "value": side * (1 / np.arange(1, length + 1) + layer / 10)}
        ).assign(model=model, layer=layer, length=length, rope=rope, key_norm=2.0 + 4 * layer)
        for model in MODELS
        for layer in (0, 1)
        for length in LENGTHS
        for rope, side in (("before", 0.5), ("after", 1.0))
    ]
    joined = pd.concat(parts, ignore_index=True)
    return joined.assign(cosine=1 - joined["value"])


def value(table: pd.DataFrame, **where: object) -> pd.DataFrame:
    for name, wanted in where.items():
        table = table[table[name] == wanted]
    return table


def test_curves_are_means_over_heads_and_bands_their_deciles(table: pd.DataFrame) -> None:
    figure = cosine_figure(LayerTable(table))
    axes = axes_of(figure)
    assert [one.get_title(loc="left") for one in axes[:3]] == [*MODELS, "mean over layers and heads"]
    assert [one.get_ylabel() for one in axes[::3]] == ["query-query cosine", "key-key cosine", "query-key cosine"]
    keys = axes[4]  # second row, second model
    rows = value(table, model="clipped", statistic="intra_cosine_keys")
    curves = [np.asarray(line.get_ydata()) for line in keys.lines]
    sides = [(length, rope) for length in LENGTHS for rope in ("before", "after")]
    for (length, rope), drawn in zip(sides, curves, strict=True):
        by_layer = [value(rows, length=length, rope=rope, layer=layer)["value"] for layer in range(LAYERS)]
        np.testing.assert_allclose(drawn, [part.mean() for part in by_layer])
    heights = keys.collections[0].get_paths()[0].vertices[:, 1]
    by_layer = [value(rows, length=96, rope="after", layer=layer)["value"] for layer in range(LAYERS)]
    assert heights.max() == pytest.approx(max(np.quantile(part, 0.9) for part in by_layer))


def test_beside_the_layers_stand_means_over_layers_and_heads_by_input_length(table: pd.DataFrame) -> None:
    axes = axes_of(cosine_figure(LayerTable(table)))[5]  # second row
    assert axes.get_xlabel() == ""  # the last row has it
    sides = [(model, rope) for model in MODELS for rope in ("before", "after")]
    for (model, rope), line in zip(sides, axes.lines, strict=True):
        rows = value(table, model=model, rope=rope, statistic="intra_cosine_keys")
        np.testing.assert_allclose(line.get_xdata(), LENGTHS)
        means = [value(rows, length=length)["value"].mean() for length in LENGTHS]  # as many heads in every layer
        np.testing.assert_allclose(line.get_ydata(), means)
    alone = axes_of(cosine_figure(LayerTable(value(table, length=64))))
    assert len(alone) == 3 * 2  # of one length there is no curve


def test_every_quantity_has_one_axis_for_all_models(table: pd.DataFrame) -> None:
    """The second model's values are 100 times the first's, so limits of its own, or of the first, would show."""
    factors = table["model"].map({"plain": 1.0, "clipped": 100.0})
    layers = LayerTable(table.assign(value=table["value"] * factors))
    for figure, columns in (
        (cosine_figure(layers), 3),
        (sink_figure(layers), 3),
        (singular_value_figure(layers, 16), 6),
    ):
        axes = axes_of(figure)
        for row in range(0, len(axes), columns):
            limits = {one.get_ylim() for one in axes[row : row + columns]}
            assert len(limits) == 1
            low, high = limits.pop()
            drawn = np.concatenate([line.get_ydata() for one in axes[row : row + columns] for line in one.lines])
            assert low <= drawn.min()
            assert drawn.max() <= high


def test_numbers_are_means_over_layers_and_heads_before_and_after() -> None:
    rows = [
        (model, 0, 0, 0, length, rope, "intra_cosine_keys", mean)
        for model, (before, short, long) in {"a": (0.8, 0.6, 0.4), "b": (0.8, 0.7, 0.9)}.items()
        for rope, length, mean in (
            ("before", 64, before), ("before", 96, before), ("after", 64, short), ("after", 96, long),
        )
    ]  # fmt: skip
    numbers = LayerTable(pd.DataFrame(rows, columns=COLUMNS)).numbers("intra_cosine_keys", "cosine")
    assert list(numbers.columns) == ["cosine, before RoPE, 96", "cosine, after RoPE, 64", "cosine, after RoPE, 96"]
    assert numbers.loc["a"].tolist() == ["0.80", "0.60", "0.40"]
    assert numbers.loc["b"].tolist() == ["0.80", "0.70", "0.90"]


def test_a_head_that_is_not_a_number_is_not_averaged_away(table: pd.DataFrame) -> None:
    """Its layer has no mean and no deciles, nor has the model; the other layers keep theirs."""
    head = (table["model"] == "plain") & (table["layer"] == 1) & (table["head"] == 2)
    layers = LayerTable(table.assign(value=table["value"].mask(head)))
    cosines = layers.over_heads("intra_cosine_keys", "plain", 64, "after")
    assert cosines.isna().all(axis=1).tolist() == [False, True, False]
    assert np.isnan(layers.mean("intra_cosine_keys", "plain", 64, "after"))
    assert np.isfinite(layers.mean("intra_cosine_keys", "clipped", 64, "after"))


def test_the_ratio_has_its_bounds(table: pd.DataFrame) -> None:
    axes = axes_of(singular_value_figure(LayerTable(table), head_dim=16))
    assert len(axes) == 18  # three quantities, queries and keys of two models and by length
    for ratio in axes[6:12]:
        levels = {round(float(line.get_ydata()[0]), 6) for line in ratio.lines if line.get_linestyle() == ":"}
        assert levels == {0.25, round(2**-0.5, 6)}


def test_key_scores_are_means_over_layers(scores: pd.DataFrame) -> None:
    figure = key_score_figure(scores)
    axes = axes_of(figure)
    titles = [f"{model}: {kind}" for model in MODELS for kind in ("softmax weight", "normalised dot product")]
    assert [one.get_title(loc="left") for one in axes[:4]] == titles
    for row, side in ((axes[:4], 0.5), (axes[4:], 1.0)):
        expected = side * (1 / np.arange(1, 33) + 0.05)
        for one, wanted in zip(row, [expected, 1 - expected] * 2, strict=True):
            positions, drawn = (np.asarray(values, dtype=float) for values in one.lines[2].get_data())
            assert positions[0] == 1
            np.testing.assert_allclose(drawn[:32], wanted)
    uniform = np.asarray(axes[4].lines[-1].get_ydata())
    assert uniform[0] == pytest.approx(np.mean(1 / np.arange(1, 97)))  # what every query gives the first key
    assert figure.numbers.loc["plain"].tolist()[:3] == ["105%", "55.0%", "-0.05"]
    for kind in (0, 1):
        assert len({one.get_ylim() for one in axes[kind::2]}) == 1


def test_key_norms_are_a_curve_over_positions(scores: pd.DataFrame) -> None:
    figure = key_norm_figure(scores)
    for axes in axes_of(figure):
        positions, norms = (np.asarray(values, dtype=float) for values in axes.lines[0].get_data())
        assert positions[:3].tolist() == [1, 2, 3]
        np.testing.assert_allclose(norms, 4)  # of layers 2 and 6
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (pytest.approx(2.4), pytest.approx(5.6))
        assert axes.get_ylim()[0] <= 0
    assert figure.numbers.loc["clipped"].tolist() == ["4.00"] * 3


def test_clouds_are_the_points_of_each_head_side_and_length(table: pd.DataFrame) -> None:
    rng = np.random.default_rng(1)
    clouds = pd.concat(
        [
            pd.DataFrame({"pc1": rng.normal(size=5), "pc2": rng.normal(size=5), "position": range(5)})
            .assign(model=model, layer=1, kv_head=1, rope=rope, length=length, cloud=cloud)
            for model in MODELS
            for rope in ("before", "after")
            for length in LENGTHS
            for cloud in ("query", "key")
        ]
    )  # fmt: skip
    bases = pd.DataFrame([(1, 1, 0.4, 0.1, 0.2)], columns=["layer", "kv_head", "share", "origin_pc1", "origin_pc2"])
    axes = axes_of(pca_figure(clouds, bases, LayerTable(table)))
    assert len(axes) == 2 * 3
    assert axes[3].get_ylabel() == "clipped\nlayer 1, key head 1\n(40% of variance)"
    last = axes[5]  # clipped, after RoPE, 96 tokens
    points = value(clouds, model="clipped", rope="after", length=96)
    for collection, cloud in zip(last.collections, ("key", "query"), strict=True):
        np.testing.assert_allclose(collection.get_offsets(), value(points, cloud=cloud)[["pc1", "pc2"]])
    origin, first = (line.get_xydata()[0] for line in last.lines)
    np.testing.assert_allclose(origin, [0.1, 0.2])
    np.testing.assert_allclose(first, value(points, cloud="key", position=0)[["pc1", "pc2"]].iloc[0])
    head = value(table, model="clipped", layer=1, kv_head=1, length=96, rope="after")
    ranks = [value(head, statistic=f"stable_rank_{side}")["value"].mean() for side in ("queries", "keys")]
    assert last.get_xlabel() == f"r: queries {ranks[0]:.1f}, keys {ranks[1]:.1f}"
    assert len({(one.get_xlim(), one.get_ylim()) for one in axes}) == 1  # for all models


def test_maps_are_the_weights_or_cosines_beside_the_sink() -> None:
    rng = np.random.default_rng(2)
    maps = [
        AttentionMap(
            "plain", 1, 3, rope, 96, *rng.random((2, 20, 20), dtype=np.float32), np.full(96, sink, np.float32),
            np.full(96, -sink, np.float32),
        )
        for rope, sink in (("before", 0.05), ("after", 0.25))
    ]  # fmt: skip
    weights, cosines = attention_figure(maps), attention_figure(maps, COSINE_MAPS)
    for figure, cells, sign, limits in ((weights, "weights", 1, (1e-6, 1)), (cosines, "cosines", -1, (-1, 1))):
        for axes, shown in zip(axes_of(figure), maps, strict=True):
            picture = np.asarray(axes.images[0].get_array(), dtype=float)
            np.testing.assert_allclose(picture[:, -20:], getattr(shown, cells))
            np.testing.assert_allclose(picture[:, :3], sign * shown.sink[0])
            assert axes.images[0].get_clim() == limits
    assert weights.numbers.loc["layer 1, head 3"].tolist() == ["5%", "25%"]
    assert cosines.numbers.loc["layer 1, head 3"].tolist() == ["-0.05", "-0.25"]
    bar = next(axes for axes in compose(weights).axes if axes.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "mean attention weight of a cell"


def test_no_text_leaves_a_figure_or_overlaps(table: pd.DataFrame, scores: pd.DataFrame) -> None:
    for figure in geometry_figures(table, scores, pd.DataFrame(), pd.DataFrame(), [], 16):
        assert_words_are_whole(figure)
    flat = scores.assign(value=0.05 * scores["value"] ** 0.3)  # within a decade, whose ticks all have numbers
    assert_words_are_whole(key_score_figure(flat))


def test_only_what_there_is_is_drawn(table: pd.DataFrame, scores: pd.DataFrame) -> None:
    figures = geometry_figures(table, scores, pd.DataFrame(), pd.DataFrame(), [], 16)
    assert [figure.name for figure in figures] == [
        "geometry_cosine", "geometry_dot", "geometry_singular_values", "geometry_clusters", "geometry_sink",
        "geometry_key_scores", "geometry_key_norms",
    ]  # fmt: skip
