"""Statistics of queries and keys by layer and by input length: a dash for each side of RoPE."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ropewalk.figures.figure import Figure, Panel
from ropewalk.figures.style import GREY, INK, MARKERS, PAGE, PALETTE, tokens, tokens_axis

SIDES = {"before": "before RoPE", "after": "after RoPE"}
SIDE_DASHES: dict[str, Any] = {"before": (0, (3, 1.6)), "after": "-"}
SIZE, NARROW = (3.6, 2.1), (2.7, 2.1)  # inches, of a panel
BY_LENGTH = "mean over layers and heads"  # title of the panels over input length


@dataclass(frozen=True)
class Quantity:
    """One row of panels: a statistic with its axis label."""

    statistic: str
    label: str
    sides: tuple[str, ...] = ("before", "after")


class LayerTable:
    """The statistics as curves over layers.

    Args:
        table: a row for each model, layer, head (query head; null for a statistic of keys alone), kv_head, length
            (tokens), rope ("before" or "after") and statistic, with its value.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self.models = list(dict.fromkeys(table["model"]))
        self.lengths = sorted(int(length) for length in table["length"].unique())

    def over_heads(self, statistic: str, model: str, length: int, rope: str) -> pd.DataFrame:
        """Mean and lower and upper decile over a layer's heads, NaN where one of them is; index layer."""
        rows = self.table[
            (self.table["statistic"] == statistic)
            & (self.table["model"] == model)
            & (self.table["length"] == length)
            & (self.table["rope"] == rope)
        ]
        by_layer = rows.groupby("layer")["value"]
        mean = by_layer.mean(skipna=False)
        spread = pd.DataFrame({"mean": mean, "low": by_layer.quantile(0.1), "high": by_layer.quantile(0.9)})
        return spread.where(mean.notna())

    def mean(self, statistic: str, model: str, length: int, rope: str) -> float:
        """Mean over all layers and heads."""
        return float(self.over_heads(statistic, model, length, rope)["mean"].mean(skipna=False))

    def by_length(self, statistic: str, model: str, rope: str) -> list[float]:
        """The same for every length."""
        return [self.mean(statistic, model, length, rope) for length in self.lengths]

    @property
    def has_lengths(self) -> bool:
        """True if there are several lengths, so that a curve over them is one."""
        return len(self.lengths) > 1

    def of_key_heads(self, heads: Collection[tuple[int, int]]) -> LayerTable:
        """The same of some (layer, key head) alone, with their query heads."""
        kept = [head in heads for head in zip(self.table["layer"], self.table["kv_head"], strict=True)]
        return LayerTable(self.table[kept])

    def numbers(self, statistic: str, name: str, form: str = ".2f") -> pd.DataFrame:
        """The mean of a statistic before RoPE over the longest input, and after it over the shortest and longest."""
        longest = self.lengths[-1]
        sides = [("before", longest), *(("after", n) for n in dict.fromkeys((self.lengths[0], longest)))]
        return pd.DataFrame(
            {
                f"{name}, {SIDES[rope]}, {tokens(length)}": [
                    f"{self.mean(statistic, model, length, rope):{form}}" for model in self.models
                ]
                for rope, length in sides
            },
            index=self.models,
        )

    @property
    def band(self) -> str:
        """The lines and the band of :func:`draw_layers`, for captions."""
        return (
            f"Lines: mean over heads. Bands: the middle 80% of them, {tokens(self.lengths[-1])} tokens after RoPE. "
            f"Numbers{' and the panels over input length' if self.has_lengths else ''}: mean over layers and heads."
        )


def length_colors(lengths: Sequence[int]) -> dict[int, str]:
    """A colour for each length."""
    return {length: PALETTE[i % len(PALETTE)] for i, length in enumerate(lengths)}


def entry(name: str, color: str, dash: Any = "-", marker: str = "") -> Line2D:
    """A legend entry."""
    return Line2D([], [], color=color, linestyle=dash, marker=marker, markersize=4, label=name)


def rope_legend(lengths: Sequence[int]) -> list[Line2D]:
    """Entries for lengths by colour and the sides of RoPE by dash."""
    entries = [entry(f"{tokens(length)} tokens", color) for length, color in length_colors(lengths).items()]
    return [*entries, *(entry(SIDES[rope], GREY, SIDE_DASHES[rope]) for rope in ("after", "before"))]


def figure_legend(layers: LayerTable) -> list[Line2D]:
    """Entries of :func:`rope_legend`, and the markers of several checkpoints over input length."""
    is_marked = layers.has_lengths and len(layers.models) > 1
    return [*rope_legend(layers.lengths), *(_model_entries(layers) if is_marked else [])]


def _model_entries(layers: LayerTable) -> list[Line2D]:
    return [Line2D([], [], color=INK, label=model, **look) for model, look in _marks(layers).items()]


def _marks(layers: LayerTable) -> dict[str, dict[str, Any]]:
    """Marker of each checkpoint: those that are drawn first are hollow and larger, and show where curves coincide."""
    last = len(layers.models) - 1
    return {
        model: {
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4 + 2 * min(last - i, 3),
            "markerfacecolor": INK if i == last else PAGE,
        }
        for i, model in enumerate(layers.models)
    }


def draw_layers(
    axes: Axes, layers: LayerTable, model: str, quantity: Quantity, bounds: Mapping[str, float] | None = None
) -> None:
    """Mean over heads for every length and side, with the deciles of the longest length after RoPE.

    ``bounds``: name -> value of dotted reference lines of a share; the axis then shows 0 and 1.
    """
    colors = length_colors(layers.lengths)
    for length in layers.lengths:
        for rope in quantity.sides:
            values = layers.over_heads(quantity.statistic, model, length, rope)
            axes.plot(
                values.index, values["mean"], color=colors[length], linestyle=SIDE_DASHES[rope], marker=".",
                markersize=3, linewidth=1.4,
            )  # fmt: skip
    longest = layers.over_heads(quantity.statistic, model, layers.lengths[-1], "after")
    color = colors[layers.lengths[-1]]
    axes.fill_between(longest.index, longest["low"], longest["high"], color=color, alpha=0.13, linewidth=0)
    _draw_bounds(axes, bounds)
    _dress(axes, quantity.label)


def draw_lengths(axes: Axes, layers: LayerTable, quantity: Quantity, bounds: Mapping[str, float] | None = None) -> None:
    """Mean over layers and heads against the input's length, a marker for each checkpoint, a dash for each side."""
    for model, look in _marks(layers).items():
        for rope in quantity.sides:
            values = layers.by_length(quantity.statistic, model, rope)
            axes.plot(layers.lengths, values, color=INK, linestyle=SIDE_DASHES[rope], linewidth=1.2, **look)
    _draw_bounds(axes, bounds)
    _dress_lengths(axes, layers, quantity.label)


def _dress_lengths(axes: Axes, layers: LayerTable, label: str) -> None:
    spread = (layers.lengths[-1] / layers.lengths[0]) ** 0.06  # so that the outermost markers are whole
    tokens_axis(axes, layers.lengths[0] / spread, layers.lengths[-1] * spread, "input length (tokens)", ticks=6)
    axes.set_ylabel(label)


def include(axes: Axes, *values: float) -> None:
    """Make the y axis, with all that share it, reach to each of ``values``; set_ylim would cut off what comes later."""
    axes.update_datalim([(0.0, value) for value in values], updatex=False)
    axes.autoscale_view()


def _draw_bounds(axes: Axes, bounds: Mapping[str, float] | None) -> None:
    for name, value in (bounds or {}).items():
        _draw_bound(axes, value, name)
    if bounds:
        include(axes, 0.0, 1.0)


def _draw_bound(axes: Axes, value: float, name: str) -> None:
    axes.axhline(value, color=GREY, linestyle=":", linewidth=1.0)
    axes.annotate(
        name, (0.98, value), xycoords=("axes fraction", "data"), xytext=(0, -2), textcoords="offset points", ha="right",
        va="top", fontsize=8, color=GREY, bbox={"facecolor": PAGE, "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )  # fmt: skip


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _grid(layers: LayerTable, quantities: Sequence[Quantity]) -> list[list[Panel | None]]:
    """Rows of quantities, a column for each checkpoint, and one over input length for all."""
    rows: list[list[Panel | None]] = []
    for quantity in quantities:
        row: list[Panel | None] = [
            Panel(partial(draw_layers, layers=layers, model=model, quantity=quantity), "" if rows else model)
            for model in layers.models
        ]
        if layers.has_lengths:
            row.append(Panel(partial(draw_lengths, layers=layers, quantity=quantity), "" if rows else BY_LENGTH))
        rows.append(row)
    return rows


def _figure(
    name: str, title: str, layers: LayerTable, quantities: Sequence[Quantity], numbers: pd.DataFrame, caption: str
) -> Figure:
    return Figure(
        name, title, _grid(layers, quantities), f"{caption} {layers.band}", numbers=numbers,
        legend=figure_legend(layers), size=SIZE, share="row",
    )  # fmt: skip


def cosine_figure(layers: LayerTable) -> Figure:
    """Mean cosine within and between the clusters."""
    quantities = [
        Quantity("intra_cosine_queries", "query-query cosine"),
        Quantity("intra_cosine_keys", "key-key cosine"),
        Quantity("inter_cosine", "query-key cosine"),
    ]
    numbers = layers.numbers("intra_cosine_keys", "key-key cosine")
    caption = "Mean cosine over all pairs of different tokens, of the same head, causal or not."
    return _figure("geometry_cosine", "Cosines of queries and keys", layers, quantities, numbers, caption)


def dot_figure(layers: LayerTable) -> Figure:
    """The same as plain dot products."""
    quantities = [
        Quantity("intra_dot_queries", "query-query\ndot product"),
        Quantity("intra_dot_keys", "key-key\ndot product"),
        Quantity("inter_dot", "query-key\ndot product"),
    ]
    numbers = layers.numbers("inter_dot", "query-key dot product", ".1f")
    caption = "Mean dot product over all pairs of different tokens, causal or not, before any scaling of the logits."
    return _figure("geometry_dot", "Dot products of queries and keys", layers, quantities, numbers, caption)


def cluster_figure(layers: LayerTable) -> Figure:
    """Silhouette and Davies-Bouldin index."""
    quantities = [
        Quantity("silhouette", "silhouette\n(1 apart, 0 overlapping)"),
        Quantity("davies_bouldin", "Davies-Bouldin index\n(0 apart, >1 overlapping)"),
    ]
    caption = "Two clusters a head, its queries and its keys, by Euclidean distance over a seeded sample of positions."
    numbers = layers.numbers("silhouette", "silhouette")
    return _figure("geometry_clusters", "Queries against keys as clusters", layers, quantities, numbers, caption)


def singular_value_figure(layers: LayerTable, head_dim: int) -> Figure:
    """First singular value share, its ratio under RoPE, stable rank; queries and keys of every checkpoint."""
    quantities: list[Callable[[str], Quantity]] = [
        lambda side: Quantity(f"fsv_share_{side}", "first singular value share\n$\\sigma_1/\\|X\\|_F$"),
        lambda side: Quantity(f"fsv_ratio_{side}", "$\\sigma_1$ after / before RoPE", ("after",)),
        lambda side: Quantity(f"stable_rank_{side}", "stable rank\n$\\|X\\|_F^2/\\sigma_1^2$"),
    ]
    columns = [(model, side) for model in layers.models for side in ("queries", "keys")]
    sides = ("queries", "keys") if layers.has_lengths else ()
    bounds = {r"$1/\sqrt{2}$": 2**-0.5, r"$1/\sqrt{d}$": head_dim**-0.5}
    rows: list[list[Panel | None]] = []
    for number, quantity in enumerate(quantities):
        common: dict[str, Any] = {"layers": layers, "bounds": bounds if number == 1 else None}
        row: list[Panel | None] = [
            Panel(
                partial(draw_layers, model=model, quantity=quantity(side), **common), "" if rows else f"{model}: {side}"
            )
            for model, side in columns
        ]
        row += [
            Panel(partial(draw_lengths, quantity=quantity(side), **common), "" if rows else f"{side}: {BY_LENGTH}")
            for side in sides
        ]
        rows.append(row)
    caption = (
        "X: one row a token, not centred. Dotted: the bounds of the ratio for a cloud along one line whose pairs all "
        f"turn many times, with d={head_dim}; pairs that have hardly turned keep it above them. {layers.band}"
    )
    numbers = layers.numbers("fsv_share_keys", "first singular value share of keys")
    title, legend = "First singular value of queries and keys", figure_legend(layers)
    return Figure(
        "geometry_singular_values", title, rows, caption, numbers=numbers, legend=legend, size=NARROW, share="row"
    )  # fmt: skip


def sink_figure(layers: LayerTable) -> Figure:
    """Attention on position 0, the norm of its key against the others', and the largest q.k."""
    quantities = [Quantity("sink_weight", "attention weight\non position 0"), Quantity("max_dot", "largest q.k")]
    rows = _grid(layers, quantities)
    norms: list[Panel | None] = [Panel(partial(_draw_norms, layers=layers, model=model)) for model in layers.models]
    rows.append([*norms, Panel(partial(_draw_norms_by_length, layers=layers))] if layers.has_lengths else norms)
    legend = [
        *figure_legend(layers),
        entry("key at position 0", PALETTE[3], marker="o"),
        entry("mean of other keys", GREY, marker="s"),
    ]
    caption = (
        "Weight: softmax, mean over the later queries that see it. Largest q.k: of a query and a key that it sees, "
        "before any scaling of the logits. Before RoPE, attention is what the same vectors would give without "
        f"rotation. {layers.band}"
    )
    numbers = layers.numbers("sink_weight", "weight on position 0")
    title = "The sink: attention on position 0"
    return Figure("geometry_sink", title, rows, caption, numbers=numbers, legend=legend, size=SIZE, share="row")


NORMS = (("sink_key_norm", PALETTE[3], "o"), ("other_key_norm", GREY, "s"))


def _draw_norms(axes: Axes, layers: LayerTable, model: str) -> None:
    for statistic, color, marker in NORMS:
        values = layers.over_heads(statistic, model, layers.lengths[-1], "after")
        axes.plot(values.index, values["mean"], color=color, marker=marker, markersize=3)
    include(axes, 0.0)
    _dress(axes, "key norm")


def _draw_norms_by_length(axes: Axes, layers: LayerTable) -> None:
    for statistic, color, _ in NORMS:
        for model, look in _marks(layers).items():
            axes.plot(layers.lengths, layers.by_length(statistic, model, "after"), color=color, linewidth=1.2, **look)
    include(axes, 0.0)
    _dress_lengths(axes, layers, "key norm")
