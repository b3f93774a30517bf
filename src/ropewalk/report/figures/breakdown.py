"""Training loss told apart by domain and by position in the context."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from ropewalk.report.figures.style import Panel, Row, RunStyle, add_curve, add_line, canvas, log2_axis, short_length
from ropewalk.report.runs import Run
from ropewalk.report.text import ranked

DOMAIN, POSITION = "loss/domain/", "loss/position/"
FINAL_SHARE = 0.1  # of the logged steps, whose mean stands for the end of a curve
HEIGHT = 260  # pixels


def domains_of(run: Run) -> list[str]:
    """Domains whose loss the run logged, sorted."""
    return sorted(column.removeprefix(DOMAIN) for column in run.metrics.columns if column.startswith(DOMAIN))


def positions_of(run: Run) -> list[int]:
    """Upper ends, tokens of context, of the buckets whose loss the run logged, ascending."""
    return sorted(int(column.removeprefix(POSITION)) for column in run.metrics.columns if column.startswith(POSITION))


def final_mean(run: Run, column: str) -> float:
    """Mean of a column over the last tenth of the logged steps that have it; nan where none has."""
    if column not in run.metrics:
        return math.nan
    values = run.metrics[column].dropna().to_numpy(dtype=float)
    return float(values[-max(1, round(FINAL_SHARE * len(values))) :].mean()) if len(values) else math.nan


def domain_row(length: str, runs: list[Run], styles: dict[str, RunStyle]) -> list[Row]:
    """A panel for each domain, loss against tokens seen; no row where no run logged any."""
    domains = sorted({domain for run in runs for domain in domains_of(run)})
    if not domains:
        return []
    panels, words = [], []
    for domain in domains:
        column = DOMAIN + domain
        panels.append(Panel(domain, _over_tokens(runs, column, styles)))
        ends = [(final_mean(run, column), run.name) for run in runs if domain in domains_of(run)]
        words.append(f"{domain}: {ranked(ends)}")
    return [Row(panels, f"{length}, by domain", f"Mean of the last tenth of the steps. {'; '.join(words)}.")]


def position_row(length: str, runs: list[Run], styles: dict[str, RunStyle]) -> list[Row]:
    """Loss by context at the end of training, and over training in the first, a middle and the last bucket."""
    edges = sorted({edge for run in runs for edge in positions_of(run)})
    if not edges:
        return []
    plot = canvas("context so far (tokens)", "loss (nats/token)", height=HEIGHT)
    for run in runs:
        rows = _ends(run)
        hover = [f"up to {int(row.x):,} tokens: {row.value:.3f}" for row in rows.itertuples()]
        add_curve(plot, run.name, styles[run.name], rows, hover)
    log2_axis(plot, edges[0] / 1.3, edges[-1] * 1.3)
    note = "A point: contexts of up to so many tokens, from the point before on; mean of the last tenth of steps."
    panels = [Panel("At the end of training", plot, note)]
    for edge in dict.fromkeys([edges[0], edges[len(edges) // 2], edges[-1]]):
        panels.append(Panel(f"Contexts of up to {short_length(edge)}", _over_tokens(runs, f"{POSITION}{edge}", styles)))
    return [Row(panels, f"{length}, by position in the context", _gain(runs))]


def _ends(run: Run) -> pd.DataFrame:
    """x, the upper end of each bucket, and value, the loss at the end of training; no interval is known."""
    rows = [(edge, final_mean(run, f"{POSITION}{edge}")) for edge in positions_of(run)]
    return pd.DataFrame(rows, columns=["x", "value"]).dropna().assign(ci_low=math.nan, ci_high=math.nan)


def _over_tokens(runs: list[Run], column: str, styles: dict[str, RunStyle]) -> go.Figure:
    plot = canvas("tokens seen", "loss (nats/token)", height=HEIGHT)
    plot.update_xaxes(rangemode="tozero", nticks=5)
    for run in runs:
        if column in run.metrics:
            rows = run.metrics.dropna(subset=[column])
            add_line(plot, run.name, styles[run.name], rows["tokens"], rows[column])
    return plot


def _gain(runs: list[Run]) -> str:
    """How much lower the loss is in the bucket of the longest contexts than in the one before, at the end."""
    gains: dict[tuple[int, int], list[tuple[float, str]]] = {}
    for run in runs:
        if len(edges := positions_of(run)) > 1:
            shorter, longest = (final_mean(run, f"{POSITION}{edge}") for edge in edges[-2:])
            gains.setdefault((edges[-1], edges[-2]), []).append((longest - shorter, run.name))
    words = [f"to {end:,} against to {before:,}: {ranked(one, '+.3f')}" for (end, before), one in gains.items()]
    return f"Contexts {'; '.join(words)} nats per token, at the end of training." if words else ""
