"""Needle grids: depth by context length, a panel for each run, on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import ColorScale, Figure, Panel, file_name, rows_of
from ropewalk.figures.style import LEVEL_DASH, PAGE, PALETTE, number, tokens, with_tips

TITLE = "Needle in a haystack"
EXACT_MATCH, TOKEN_ACCURACY, ANSWER_NLL = "exact_match", "answer_token_accuracy", "answer_nll"
NAMES = {
    EXACT_MATCH: "Exact match",
    TOKEN_ACCURACY: "Answer-token accuracy",
    ANSWER_NLL: "Answer NLL (nats per answer token, lower is better)",
}
MOST_LABELLED_CELLS = 60  # more have no space for a number each
DARK = 0.45  # brightness above which a cell gets black figures
SIZE = (4.2, 2.3)  # inches
CAPTION = (
    "Dashed: the trained length. At chance: within two standard errors of the same outputs scored against shuffled "
    "answers, where exact match orders nothing and the graded scores show more."
)


def needle_figures(
    cells: pd.DataFrame, pooled: pd.DataFrame, trained_lengths: Mapping[str, int | None], title: str = TITLE
) -> list[Figure]:
    """Accuracy on 0..1 for every run; where exact match is at chance, the graded scores too.

    Args:
        cells: run, metric (exact_match, answer_token_accuracy or answer_nll), context_length (tokens), depth (0..1),
            value, n (prompts); frames, if the context is a video's.
        pooled: each metric over the whole grid, a row for each run and metric: run, metric, value, control (the same
            outputs against shuffled answers; nan: not measured), error (standard error of value less control; nan:
            unknown), at_chance.
        trained_lengths: run -> tokens; None: not recorded. Not drawn over frames.
        title: of the test, which the figures' file names begin with.
    """
    exact = cells[cells["metric"] == EXACT_MATCH]
    if exact.empty:
        return []
    rows = pooled[pooled["metric"] == EXACT_MATCH]
    accuracy = TOKEN_ACCURACY if rows["at_chance"].all() else EXACT_MATCH
    scale = ColorScale("cividis", 0, 1, NAMES[accuracy])
    figures = [_figure(title, cells, accuracy, scale, pooled, trained_lengths)]
    nll = cells.loc[(cells["metric"] == ANSWER_NLL) & cells["run"].isin(exact["run"]), "value"]
    if rows["at_chance"].any() and len(nll):
        finite = nll[np.isfinite(nll)]
        high = float(finite.max()) if len(finite) else 1.0
        scale = ColorScale("cividis_r", 0, high, "nats per answer token")  # bright is good in both
        figures.append(_figure(title, cells, ANSWER_NLL, scale, pooled, trained_lengths))
    return figures


def _figure(
    test: str,
    cells: pd.DataFrame,
    metric: str,
    scale: ColorScale,
    pooled: pd.DataFrame,
    trained_lengths: Mapping[str, int | None],
) -> Figure:
    rows = cells[cells["metric"] == metric]
    panels = [
        Panel(partial(_draw, rows=part, scale=scale, trained=trained_lengths.get(str(name))), str(name))
        for name, part in rows.groupby("run", sort=False)
    ]
    title, columns = NAMES[metric], min(len(panels), 2 if len(panels) == 4 else 3)
    name = file_name(f"{test} {title}")
    title = title if test == TITLE else f"{test}: {title.lower()}"
    numbers = _numbers(rows, metric, pooled, trained_lengths)
    return Figure(name, title, rows_of(panels, columns), CAPTION, {}, numbers, scale=scale, size=SIZE)


def _numbers(
    rows: pd.DataFrame, metric: str, pooled: pd.DataFrame, trained_lengths: Mapping[str, int | None]
) -> pd.DataFrame:
    """The whole grid of each run beside its control."""
    table = pd.DataFrame(index=list(dict.fromkeys(map(str, rows["run"]))))
    of_metric = pooled[pooled["metric"] == metric].set_index("run").reindex(table.index)
    lengths = [trained_lengths.get(name) for name in table.index]
    table["trained at"] = ["not recorded" if length is None else f"{length:,}" for length in lengths]
    table["mean over the grid"] = [number(value, ".2f") for value in of_metric["value"]]
    table["shuffled answers"] = [number(value, ".2f") for value in of_metric["control"]]
    if metric == ANSWER_NLL:
        gains, errors = of_metric["control"] - of_metric["value"], 2 * of_metric["error"]
        table["right answer likelier by (± 2 standard errors)"] = [
            f"{number(gain, '.2f')}{'' if math.isnan(error) else f' ± {error:.2f}'}"
            for gain, error in zip(gains, errors, strict=True)
        ]
    else:
        exact = pooled[pooled["metric"] == EXACT_MATCH].set_index("run")["at_chance"].reindex(table.index)
        table["exact match"] = ["at chance" if value else "above chance" for value in exact]
    table["prompts a cell"] = [_counts(part["n"]) for _, part in rows.groupby("run", sort=False)]
    return table


def _counts(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _draw(axes: Axes, rows: pd.DataFrame, scale: ColorScale, trained: int | None) -> None:
    unit = "frames" if "frames" in rows else "tokens"
    across = "frames" if unit == "frames" else "context_length"
    grid, counts = (rows.pivot(index="depth", columns=across, values=name) for name in ("value", "n"))
    lengths = [int(length) for length in grid.columns]
    x, y = np.arange(len(lengths) + 1) - 0.5, np.arange(len(grid) + 1) - 0.5
    mesh = axes.pcolormesh(
        x, y, grid.to_numpy(), cmap=scale.colors, norm=scale.norm, edgecolors=PAGE, linewidth=1.5
    )  # fmt: skip
    with_tips(
        mesh,
        [
            f"{length:,} {unit}, depth {depth:.0%}: {grid.loc[depth, length]:.3f}, n={counts.loc[depth, length]:.0f}"
            for depth in grid.index
            for length in grid.columns
        ],
    )
    if grid.size <= MOST_LABELLED_CELLS:
        _label_cells(axes, grid.to_numpy(), scale)
    labels = [tokens(length) if unit == "tokens" else f"{length:,}" for length in lengths]
    axes.set_xticks(range(len(lengths)), labels)
    axes.set_yticks(range(len(grid)), [f"{depth:.0%}" for depth in grid.index])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("context length (tokens)" if unit == "tokens" else "frames of the video")
    axes.set_ylabel("depth")
    is_within = unit == "frames" or trained is None  # frames of training are not recorded
    within = sum(is_within or length <= int(trained or 0) for length in lengths)
    if 0 < within < len(lengths):
        axes.axvline(within - 0.5, color=PALETTE[1], linewidth=2, linestyle=LEVEL_DASH, gid="trained")


def _label_cells(axes: Axes, grid: np.ndarray, scale: ColorScale) -> None:
    colors, norm = matplotlib.colormaps[scale.colors], scale.norm
    for (row, column), value in np.ndenumerate(grid):
        is_light = math.isnan(value) or sum(colors(float(norm(value)))[:3]) / 3 > DARK
        color = "#101010" if is_light else "#fafafa"
        text = "NaN" if math.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
