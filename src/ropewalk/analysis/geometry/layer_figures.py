"""Figures of statistics by layer: checkpoints side by side, a colour for each length, before and after RoPE."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ropewalk.analysis.figures.style import GREY, PALETTE, label, tokens
from ropewalk.analysis.geometry.canvas import DASHES, Sheet, length_colors, line, reference, rope_legend


@dataclass(frozen=True)
class Quantity:
    """One row of panels: a statistic with its axis label."""

    statistic: str
    label: str
    sides: tuple[str, ...] = ("before", "after")


class LayerTable:
    """The statistics as curves over layers.

    Args:
        table: as geometry.parquet.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self.models = list(dict.fromkeys(table["model"]))
        self.lengths = sorted(int(length) for length in table["length"].unique())

    def over_heads(self, statistic: str, model: str, length: int, rope: str) -> pd.DataFrame:
        """Mean and lower and upper decile over a layer's heads; index layer."""
        rows = self.table[
            (self.table["statistic"] == statistic)
            & (self.table["model"] == model)
            & (self.table["length"] == length)
            & (self.table["rope"] == rope)
        ]
        by_layer = rows.groupby("layer")["value"]
        return pd.DataFrame({"mean": by_layer.mean(), "low": by_layer.quantile(0.1), "high": by_layer.quantile(0.9)})

    def mean(self, statistic: str, model: str, length: int, rope: str) -> float:
        """Mean over all layers and heads."""
        return float(self.over_heads(statistic, model, length, rope)["mean"].mean())

    def of_key_heads(self, places: Collection[tuple[int, int]]) -> LayerTable:
        """The same of some (layer, key head) alone, with their query heads."""
        kept = [place in places for place in zip(self.table["layer"], self.table["kv_head"], strict=True)]
        return LayerTable(self.table[kept])

    def reading(self, statistic: str, form: str = ".2f") -> str:
        """``falls under RoPE: MODEL from 0.62 to 0.55 at 1k and 0.41 at 8k``, for every model, for titles."""
        shown = list(dict.fromkeys((self.lengths[0], self.lengths[-1])))
        rises, parts = set(), []
        for model in self.models:
            before = self.mean(statistic, model, self.lengths[-1], "before")
            after = [self.mean(statistic, model, length, "after") for length in shown]
            rises.add(after[-1] > before)
            steps = (f"{value:{form}} at {tokens(length)}" for value, length in zip(after, shown, strict=True))
            parts.append(f"{model} from {before:{form}} to {' and '.join(steps)}")
        verb = "changes" if len(rises) > 1 else "rises" if rises.pop() else "falls"
        return f"{verb} under RoPE: {'; '.join(parts)}"

    @property
    def band(self) -> str:
        """What the band of :func:`curves` is, for captions."""
        return f"Lines: mean over heads. Bands: the middle 80% of them, {tokens(self.lengths[-1])} tokens after RoPE."


def curves(panel: Axes, found: LayerTable, model: str, quantity: Quantity) -> None:
    """Mean over heads for every length and side, with the deciles of the longest length after RoPE."""
    colors = length_colors(found.lengths)
    for length in found.lengths:
        for rope in quantity.sides:
            values = found.over_heads(quantity.statistic, model, length, rope)
            panel.plot(
                values.index,
                values["mean"],
                color=colors[length],
                linestyle=DASHES[rope],
                marker=".",
                ms=3,
                linewidth=1.4,
            )
    longest = found.over_heads(quantity.statistic, model, found.lengths[-1], "after")
    panel.fill_between(
        longest.index, longest["low"], longest["high"], color=colors[found.lengths[-1]], alpha=0.13, linewidth=0
    )


def layer_sheet(found: LayerTable, quantities: Sequence[Quantity]) -> Sheet:
    """Rows of quantities, a column for each checkpoint."""
    sheet = Sheet(len(quantities), len(found.models))
    for row, quantity in enumerate(quantities):
        for column, model in enumerate(found.models):
            curves(sheet.panels[row, column], found, model, quantity)
        sheet.panels[row, 0].set_ylabel(quantity.label)
    name_axes(sheet, found.models)
    return sheet


def name_axes(sheet: Sheet, titles: Sequence[str]) -> None:
    """Column titles above, whole layer numbers below."""
    for column, title in enumerate(titles):
        sheet.panels[0, column].set_title(label(title), fontweight="bold")
        sheet.panels[-1, column].set_xlabel("layer")
        for panel in sheet.panels[:, column]:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def cosine(found: LayerTable) -> Sheet:
    """Mean cosine within and between the clusters."""
    rows = [
        Quantity("intra_cosine_queries", "query-query cosine"),
        Quantity("intra_cosine_keys", "key-key cosine"),
        Quantity("inter_cosine", "query-key cosine"),
    ]
    title = f"The mean cosine between a head's keys {found.reading('intra_cosine_keys')}"
    caption = "Mean cosine over all pairs of different tokens, of the same head, causal or not."
    return layer_sheet(found, rows).words(title, f"{caption} {found.band}", rope_legend(found.lengths))


def dot_products(found: LayerTable) -> Sheet:
    """The same as plain dot products."""
    rows = [
        Quantity("intra_dot_queries", "query-query\ndot product"),
        Quantity("intra_dot_keys", "key-key\ndot product"),
        Quantity("inter_dot", "query-key\ndot product"),
    ]
    title = f"The mean dot product of queries and keys {found.reading('inter_dot', '.1f')}"
    caption = "Mean dot product over all pairs of different tokens, causal or not, before any scaling of the logits."
    return layer_sheet(found, rows).words(title, f"{caption} {found.band}", rope_legend(found.lengths))


def clusters(found: LayerTable) -> Sheet:
    """Silhouette and Davies-Bouldin index."""
    rows = [
        Quantity("silhouette", "silhouette\n(1 apart, 0 overlapping)"),
        Quantity("davies_bouldin", "Davies-Bouldin index\n(0 apart, >1 overlapping)"),
    ]
    title = f"The silhouette of queries against keys {found.reading('silhouette')}"
    caption = "Two clusters a head, its queries and its keys, by Euclidean distance over a seeded sample of positions."
    return layer_sheet(found, rows).words(title, f"{caption} {found.band}", rope_legend(found.lengths))


def singular_values(found: LayerTable, head_dim: int) -> Sheet:
    """First singular value share, its ratio under RoPE, stable rank; queries and keys of every checkpoint."""
    rows: list[Callable[[str], Quantity]] = [
        lambda side: Quantity(f"fsv_share_{side}", "first singular value share\n$\\sigma_1/\\|X\\|_F$"),
        lambda side: Quantity(f"fsv_ratio_{side}", "$\\sigma_1$ after / before RoPE", ("after",)),
        lambda side: Quantity(f"stable_rank_{side}", "stable rank\n$\\|X\\|_F^2/\\sigma_1^2$"),
    ]
    columns = [(model, side) for model in found.models for side in ("queries", "keys")]
    sheet = Sheet(len(rows), len(columns), width=2.7)
    for row, quantity in enumerate(rows):
        for column, (model, side) in enumerate(columns):
            curves(sheet.panels[row, column], found, model, quantity(side))
        sheet.panels[row, 0].set_ylabel(quantity("keys").label)
    for panel in sheet.panels[1]:
        reference(panel, 2**-0.5, r"$1/\sqrt{2}$")
        reference(panel, head_dim**-0.5, r"$1/\sqrt{d}$")
        panel.set_ylim(0, 1.04)
    name_axes(sheet, [f"{model}: {side}" for model, side in columns])
    title = f"The first singular value share of a head's keys {found.reading('fsv_share_keys')}"
    caption = (
        "X: one row a token, not centred. Dotted: the bounds of the ratio for a cloud along one line whose pairs all "
        f"turn many times, with d={head_dim}; pairs that have hardly turned keep it above them."
    )
    return sheet.words(title, f"{caption} {found.band}", rope_legend(found.lengths))


def sink(found: LayerTable) -> Sheet:
    """Attention on position 0, the norm of its key against the others', and the largest q.k."""
    rows = [
        Quantity("sink_weight", "attention weight\non position 0"),
        Quantity("max_dot", "largest q.k"),
    ]
    sheet = Sheet(3, len(found.models))
    norms = (("sink_key_norm", PALETTE[3], "o"), ("other_key_norm", GREY, "s"))
    for column, model in enumerate(found.models):
        for row, quantity in enumerate(rows):
            curves(sheet.panels[row, column], found, model, quantity)
        for statistic, color, marker in norms:
            values = found.over_heads(statistic, model, found.lengths[-1], "after")
            sheet.panels[2, column].plot(values.index, values["mean"], color=color, marker=marker, ms=3)
        sheet.panels[2, column].set_ylim(bottom=0)
    for row, name in enumerate([*(quantity.label for quantity in rows), "key norm"]):
        sheet.panels[row, 0].set_ylabel(name)
    name_axes(sheet, found.models)
    legend = [line("key at position 0", norms[0][1], marker="o"), line("mean of other keys", norms[1][1], marker="s")]
    title = f"The mean attention weight on position 0 {found.reading('sink_weight')}"
    caption = (
        "Weight: softmax, mean over all later queries. Largest q.k: of a query and a key that it sees, before any "
        "scaling of the logits. Before RoPE, attention is what the same vectors would give without rotation."
    )
    return sheet.words(title, f"{caption} {found.band}", [*rope_legend(found.lengths), *legend])
