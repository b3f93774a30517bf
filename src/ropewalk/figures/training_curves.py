"""Training curves: loss against tokens seen, whole, by domain and by position; tokens a second and where time goes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import ALONE, PANEL, Figure, Panel, file_name, rows_of
from ropewalk.figures.style import (
    PALETTE,
    Style,
    amount,
    draw_curve,
    draw_line,
    label,
    number,
    reserve_headroom,
    tokens,
    tokens_axis,
    tokens_seen_axis,
    with_tips,
)

TITLE = "Training curves"
DOMAIN, POSITION = "loss/domain/", "loss/position/"
FINAL_SHARE = 0.1  # of the logged steps, whose mean stands for the end of a curve
END = "Numbers: mean of the last tenth of the logged steps, nats per token."


def training_figures(metrics: pd.DataFrame, styles: Mapping[str, Style]) -> list[Figure]:
    """Loss against tokens seen with a panel for each trained length, then by domain and by position in the context.

    Args:
        metrics: rows of logged steps, ascending in each run: run, trained_length (tokens; NA: not recorded), tokens
            (seen so far), loss and, where logged, ``loss/domain/NAME`` and ``loss/position/END``, nats per token.
        styles: run -> style.
    """
    if metrics.empty:
        return []
    lengths = metrics["trained_length"].astype("Int64")
    keys = sorted(lengths.drop_duplicates(), key=lambda length: 0 if pd.isna(length) else int(length))
    groups = [
        (_title(key), metrics[lengths.isna() if pd.isna(key) else (lengths == key).fillna(False)]) for key in keys
    ]
    panels = [Panel(partial(_draw_smoothed, rows=rows, styles=styles), title) for title, rows in groups]
    caption = "Bold: mean of the last fiftieth of the steps; faint: each step." if _is_smoothed(metrics) else ""
    whole = Figure(
        file_name(TITLE), TITLE, rows_of(panels), f"{caption} {END}".lstrip(), _of_runs(metrics, styles),
        _numbers(metrics, ["loss"]), size=ALONE if len(panels) == 1 else PANEL,
    )  # fmt: skip
    parts = [
        figure
        for title, rows in groups
        for figure in (*_by_domain(title, rows, styles), *_by_position(title, rows, styles))
    ]
    return [whole, *parts]


def _of_runs(metrics: pd.DataFrame, styles: Mapping[str, Style]) -> dict[str, Style]:
    return {name: styles[name] for name in dict.fromkeys(metrics["run"])}


def _title(length: object) -> str:
    return "Trained length not recorded" if pd.isna(length) else f"Trained at {int(length):,} tokens"  # type: ignore[call-overload]


def each_run(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each run's name and rows, in order of appearance."""
    for name, part in rows.groupby("run", sort=False):
        yield str(name), part


def final_mean(rows: pd.DataFrame, column: str) -> float:
    """Mean of a column over the last tenth of the rows that logged it; nan where none has, or a loss there is none."""
    if column not in rows:
        return math.nan
    logged = rows[column].notna() | rows["loss"].isna()  # a domain that no sequence was of logs nothing
    values = rows.loc[logged, column].to_numpy(dtype=float)
    return float(values[-max(1, round(FINAL_SHARE * len(values))) :].mean()) if len(values) else math.nan


def _numbers(rows: pd.DataFrame, columns: list[str], heads: list[str] | None = None) -> pd.DataFrame:
    """Tokens seen, and the end of every column, for each run."""
    cells = {
        name: [amount(part["tokens"].iloc[-1]), *(number(final_mean(part, column), ".3f") for column in columns)]
        for name, part in each_run(rows)
    }
    return pd.DataFrame.from_dict(cells, orient="index", columns=["tokens seen", *(heads or columns)])


def _smoothed(losses: pd.Series) -> pd.Series | None:
    window = len(losses) // 50
    return losses.rolling(window, min_periods=1).mean().where(losses.notna()) if window > 1 else None


def _is_smoothed(metrics: pd.DataFrame) -> bool:
    return any(_smoothed(part["loss"]) is not None for _, part in each_run(metrics))


def _draw_smoothed(axes: Axes, rows: pd.DataFrame, styles: Mapping[str, Style]) -> None:
    for name, part in each_run(rows):
        smooth = _smoothed(part["loss"])
        if smooth is not None:
            draw_line(axes, name, styles[name], part["tokens"], part["loss"], faint=True)
        draw_line(axes, name, styles[name], part["tokens"], part["loss"] if smooth is None else smooth)
    tokens_seen_axis(axes)
    axes.set_ylabel("loss (nats/token)")


def _draw_column(
    axes: Axes, rows: pd.DataFrame, column: str, styles: Mapping[str, Style], unit: str = "loss (nats/token)"
) -> None:
    for name, part in each_run(rows.dropna(subset=[column])):
        draw_line(axes, name, styles[name], part["tokens"], part[column])
    tokens_seen_axis(axes)
    if not unit.startswith("loss"):
        axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)


def _logged(rows: pd.DataFrame, prefix: str) -> list[str]:
    """Ends of the names that begin with ``prefix`` among the columns that any of the runs logged."""
    return [
        str(name).removeprefix(prefix) for name in rows if str(name).startswith(prefix) and rows[name].notna().any()
    ]


def _by_domain(length: str, rows: pd.DataFrame, styles: Mapping[str, Style]) -> list[Figure]:
    """A panel for each domain; no figure where no run logged any."""
    domains = sorted(_logged(rows, DOMAIN))
    if not domains:
        return []
    columns = [DOMAIN + domain for domain in domains]
    panels = [
        Panel(partial(_draw_column, rows=rows, column=column, styles=styles), domain)
        for domain, column in zip(domains, columns, strict=True)
    ]
    return [_part(f"{length}, by domain", panels, rows, styles, _numbers(rows, columns, domains), END)]


def _by_position(length: str, rows: pd.DataFrame, styles: Mapping[str, Style]) -> list[Figure]:
    """Loss by context at the end of training, and over training in the first, a middle and the last bucket."""
    edges = sorted(map(int, _logged(rows, POSITION)))
    if not edges:
        return []
    ends = Panel(partial(_draw_ends, rows=rows, edges=edges, styles=styles), "At the end of training")
    panels = [ends] + [
        Panel(
            partial(_draw_column, rows=rows, column=f"{POSITION}{edge}", styles=styles),
            f"Contexts of up to {tokens(edge)}",
        )
        for edge in dict.fromkeys([edges[0], edges[len(edges) // 2], edges[-1]])
    ]
    numbers = _numbers(rows, [f"{POSITION}{edge}" for edge in edges], [f"to {edge:,}" for edge in edges])
    if len(edges) > 1:
        numbers[f"to {edges[-1]:,} less to {edges[-2]:,}"] = [
            number(final_mean(part, f"{POSITION}{edges[-1]}") - final_mean(part, f"{POSITION}{edges[-2]}"), "+.3f")
            for _, part in each_run(rows)
        ]
    caption = f"A bucket holds contexts of up to so many tokens, from the bucket before on. {END}"
    return [_part(f"{length}, by position in the context", panels, rows, styles, numbers, caption)]


def _part(
    title: str, panels: list[Panel], rows: pd.DataFrame, styles: Mapping[str, Style], numbers: pd.DataFrame, words: str
) -> Figure:
    name = file_name(f"{TITLE} {title}")
    return Figure(name, title, rows_of(panels), words, _of_runs(rows, styles), numbers)


def _draw_ends(axes: Axes, rows: pd.DataFrame, edges: list[int], styles: Mapping[str, Style]) -> None:
    for name, part in each_run(rows):
        ends = [(edge, final_mean(part, f"{POSITION}{edge}")) for edge in edges]
        curve = pd.DataFrame(ends, columns=["x", "value"]).dropna().assign(ci_low=math.nan, ci_high=math.nan)
        tips = [f"up to {edge:,} tokens, {value:.3f}" for edge, value in ends if not math.isnan(value)]
        draw_curve(axes, name, styles[name], curve, tips)
    tokens_axis(axes, edges[0] / 1.3, edges[-1] * 1.3, "context so far (tokens)")
    axes.set_ylabel("loss (nats/token)")


SECONDS, TFLOPS, MFU = "seconds/", "tflops_per_device/", "mfu/"
MEMORY = "peak_memory_bytes"
CONVENTION = "documents"  # counts the attention that the packed documents need
SPEED_CAPTION = "Numbers: the median step; memory: of the largest process."
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
            partial(_draw_column, rows=metrics, column="tokens_per_second", styles=styles, unit="tokens/s"),
            "Tokens a second, all devices together",
        )
    ]
    if phases := phases_of(metrics):
        timed = metrics[metrics[[SECONDS + phase for phase in phases]].notna().any(axis=1)]
        panels.append(Panel(partial(_draw_phases, rows=timed, phases=phases), "Seconds a step by phase, median"))
    work = f"{TFLOPS}{CONVENTION}"
    if work in metrics and metrics[work].notna().any():
        draw = partial(_draw_column, rows=metrics, column=work, styles=styles, unit="TFLOP/s")
        panels.append(Panel(draw, "TFLOP/s a device", WORK))
    of_runs, speeds = _of_runs(metrics, styles), _speeds(metrics, phases)
    return Figure("throughput", "Throughput", rows_of(panels), SPEED_CAPTION, of_runs, speeds)


def phases_of(metrics: pd.DataFrame) -> list[str]:
    """Phases whose seconds any run logged, in the order logged."""
    return [str(name).removeprefix(SECONDS) for name in metrics if str(name).startswith(SECONDS)]


def _median(rows: pd.DataFrame, column: str) -> float:
    return float(rows[column].median()) if column in rows else math.nan


def _speeds(metrics: pd.DataFrame, phases: list[str]) -> pd.DataFrame:
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
            table[head] = [number(value, form) for value in values]
    if MEMORY in metrics:
        peaks = [float(rows[MEMORY].max()) / 2**30 for _, rows in each_run(metrics)]
        table["GiB"] = [number(peak, ".2f") for peak in peaks]
    return table


def _draw_phases(axes: Axes, rows: pd.DataFrame, phases: list[str]) -> None:
    """Stacked horizontal bars with a legend of their own."""
    names = [name for name, _ in each_run(rows)]
    left = np.zeros(len(names))
    for i, phase in enumerate(phases):
        widths = np.nan_to_num([_median(part, SECONDS + phase) for _, part in each_run(rows)])
        color = PALETTE[i % len(PALETTE)]
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
