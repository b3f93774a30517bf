"""Throughput: tokens a second, where a step's time goes, and work against the devices' peak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import Figure, Panel, rows_of
from ropewalk.figures.style import (
    PALETTE,
    Style,
    amount,
    draw_line,
    label,
    reserve_headroom,
    tokens_seen_axis,
    with_tips,
)
from ropewalk.figures.training_curves import each_run

TITLE = "Throughput"
SECONDS, TFLOPS, MFU = "seconds/", "tflops_per_device/", "mfu/"
MEMORY = "peak_memory_bytes"
CONVENTION = "documents"  # counts the attention that the packed documents need
CAPTION = "Numbers: the median step; memory: of the largest process."
WORK = "Work by the attention that the packed documents need; matrix products, backward twice the forward."


def throughput_figure(metrics: pd.DataFrame, styles: Mapping[str, Style]) -> Figure | None:
    """Tokens a second over training, and the median step's time by phase; None without any logged step.

    Args:
        metrics: as for :func:`ropewalk.figures.training_curves.training_figures`, with tokens_per_second and, where
            logged, ``seconds/PHASE``, ``tflops_per_device/documents``, ``mfu/documents`` and ``peak_memory_bytes``.
        styles: run -> style.
    """
    if metrics.empty:
        return None
    panels = [
        Panel(
            partial(_draw_column, rows=metrics, column="tokens_per_second", unit="tokens/s", styles=styles),
            "Tokens a second, all devices together",
        )
    ]
    if phases := phases_of(metrics):
        timed = metrics[metrics[[SECONDS + phase for phase in phases]].notna().any(axis=1)]
        panels.append(Panel(partial(_draw_phases, rows=timed, phases=phases), "Seconds a step by phase, median"))
    work = f"{TFLOPS}{CONVENTION}"
    if work in metrics and metrics[work].notna().any():
        draw = partial(_draw_column, rows=metrics, column=work, unit="TFLOP/s", styles=styles)
        panels.append(Panel(draw, "TFLOP/s a device", WORK))
    of_runs = {name: styles[name] for name, _ in each_run(metrics)}
    return Figure("throughput", TITLE, rows_of(panels), CAPTION, of_runs, _numbers(metrics, phases))


def phases_of(metrics: pd.DataFrame) -> list[str]:
    """Phases whose seconds any run logged, in the order logged."""
    return [str(name).removeprefix(SECONDS) for name in metrics if str(name).startswith(SECONDS)]


def _median(rows: pd.DataFrame, column: str) -> float:
    return float(rows[column].median()) if column in rows else math.nan


def _numbers(metrics: pd.DataFrame, phases: list[str]) -> pd.DataFrame:
    """The median step of each run; a column that no run logged is left out."""
    columns: dict[str, tuple[str, str]] = {
        "share of peak": (f"{MFU}{CONVENTION}", ".0%"),
        "TFLOP/s a device": (f"{TFLOPS}{CONVENTION}", ".3g"),
        **{f"{phase} (s)": (SECONDS + phase, ".3g") for phase in phases},
    }
    table = pd.DataFrame(index=[name for name, _ in each_run(metrics)])
    table["tokens/s"] = [amount(_median(rows, "tokens_per_second")) for _, rows in each_run(metrics)]
    for head, (column, form) in columns.items():
        values = [_median(rows, column) for _, rows in each_run(metrics)]
        if not all(map(math.isnan, values)):
            table[head] = ["-" if math.isnan(value) else f"{value:{form}}" for value in values]
    if MEMORY in metrics:
        peaks = [float(rows[MEMORY].max()) / 2**30 for _, rows in each_run(metrics)]
        table["GiB"] = ["-" if math.isnan(peak) else f"{peak:.2f}" for peak in peaks]
    return table


def _draw_column(axes: Axes, rows: pd.DataFrame, column: str, unit: str, styles: Mapping[str, Style]) -> None:
    for name, part in each_run(rows.dropna(subset=[column])):
        draw_line(axes, name, styles[name], part["tokens"], part[column])
    tokens_seen_axis(axes)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)


def _draw_phases(axes: Axes, rows: pd.DataFrame, phases: list[str]) -> None:
    """Stacked horizontal bars with a legend of their own."""
    names = [name for name, _ in each_run(rows)]
    left = np.zeros(len(names))
    for place, phase in enumerate(phases):
        widths = np.nan_to_num([_median(part, SECONDS + phase) for _, part in each_run(rows)])
        color = PALETTE[place % len(PALETTE)]
        bars = axes.barh(range(len(names)), widths, left=left, color=color, label=phase)
        for bar, name, width in zip(bars, names, widths, strict=True):
            with_tips(bar, [f"{name}, {phase}: {width:.3g} s"])
        left += widths
    axes.set_yticks(range(len(names)), [label(name, 24) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("seconds")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0, handlelength=1.2)
    reserve_headroom(axes, 6 + 14 * -(-len(phases) // 4))
