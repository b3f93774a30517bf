"""Throughput: tokens a second, where a step's time goes, and work against the devices' peak."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from ropewalk.report.figures.style import PALETTE, Figure, Panel, Row, RunStyle, add_line, canvas, plain
from ropewalk.report.runs import Run
from ropewalk.report.text import amount, listed

SECONDS, TFLOPS, MFU = "seconds/", "tflops_per_device/", "mfu/"
MEMORY = "peak_memory_bytes"
CONVENTION = "documents"  # counts the attention that the packed documents need
HEIGHT = 300  # pixels
MOST_WORDS = 4  # runs that are described one by one
BAR = 34  # pixels a run


def throughput_figure(runs: list[Run], styles: dict[str, RunStyle]) -> Figure:
    """Tokens a second over training, and the median step's time by phase."""
    drawn = [run for run in runs if len(run.metrics)]
    missing = [f"{run.name}: no metrics.jsonl, so no throughput." for run in runs if not len(run.metrics)]
    if not drawn:
        return Figure("Throughput", "", missing=missing)
    panels = [Panel("Tokens a second, all devices together", _speed(drawn, styles))]
    timed = [run for run in drawn if phases_of(run)]
    if timed:
        panels.append(Panel("Seconds a step by phase, median", _phases(timed)))
    worked = [run for run in drawn if f"{TFLOPS}{CONVENTION}" in run.metrics]
    if worked:
        note = "By the attention that the packed documents need; matrix products, backward twice the forward."
        panels.append(Panel("TFLOP/s a device", _work(worked, styles), note))
    return Figure("Throughput", _reading(drawn), [Row(panels)], [run.name for run in drawn], missing)


def phases_of(run: Run) -> list[str]:
    """Phases whose seconds the run logged, in the order logged."""
    return [column.removeprefix(SECONDS) for column in run.metrics.columns if column.startswith(SECONDS)]


def median(run: Run, column: str) -> float:
    """Median of a column over the logged steps; nan where it was not logged."""
    return float(run.metrics[column].median()) if column in run.metrics else math.nan


def _speed(runs: list[Run], styles: dict[str, RunStyle]) -> go.Figure:
    plot = canvas("tokens seen", "tokens/s", height=HEIGHT)
    plot.update_xaxes(rangemode="tozero", nticks=6)
    plot.update_yaxes(rangemode="tozero")
    for run in runs:
        add_line(plot, run.name, styles[run.name], run.metrics["tokens"], run.metrics["tokens_per_second"], ":,.0f")
    return plot


def _work(runs: list[Run], styles: dict[str, RunStyle]) -> go.Figure:
    plot = canvas("tokens seen", "TFLOP/s", height=HEIGHT)
    plot.update_xaxes(rangemode="tozero", nticks=6)
    plot.update_yaxes(rangemode="tozero")
    for run in runs:
        add_line(plot, run.name, styles[run.name], run.metrics["tokens"], run.metrics[f"{TFLOPS}{CONVENTION}"], ":.3g")
    return plot


def _phases(runs: list[Run]) -> go.Figure:
    plot = canvas("seconds", "", height=max(HEIGHT, 90 + BAR * len(runs)))
    phases = list(dict.fromkeys(phase for run in runs for phase in phases_of(run)))
    for phase, color in zip(phases, PALETTE * (1 + len(phases) // len(PALETTE)), strict=False):
        plot.add_bar(
            y=[plain(run.name) for run in runs],
            x=[median(run, SECONDS + phase) for run in runs],
            orientation="h",
            marker={"color": color},
            name=phase,
            hovertemplate=f"%{{y}}<br>{phase}: %{{x:.3g}} s<extra></extra>",
        )
    plot.update_layout(barmode="stack", showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    plot.update_layout(margin={"t": 50})
    plot.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return plot


def _reading(runs: list[Run]) -> str:
    if len(runs) <= MOST_WORDS:
        return f"Median step: {'; '.join(_words(run) for run in runs)}."
    slowest, *_, fastest = sorted(runs, key=lambda run: median(run, "tokens_per_second"))
    return f"Median step: slowest {_words(slowest)}; fastest {_words(fastest)}; {len(runs) - 2} between."


def _words(run: Run) -> str:
    parts = [f"{amount(median(run, 'tokens_per_second'))} tokens/s"]
    if not math.isnan(share := median(run, f"{MFU}{CONVENTION}")):
        parts.append(f"{share:.0%} of the devices' peak")
    elif not math.isnan(rate := median(run, f"{TFLOPS}{CONVENTION}")):
        parts.append(f"{rate:.3g} TFLOP/s a device")
    seconds = {phase: median(run, SECONDS + phase) for phase in phases_of(run)}
    if total := sum(value for value in seconds.values() if not math.isnan(value)):
        longest = sorted(seconds, key=lambda phase: -seconds[phase])[:2]
        parts.append(listed(f"{seconds[phase] / total:.0%} {phase}" for phase in longest))
    if MEMORY in run.metrics:
        parts.append(f"{float(run.metrics[MEMORY].max()) / 2**30:.2f} GiB in the largest process")
    return f"{run.name} {', '.join(parts)}"
