"""Training loss on a token axis."""

from __future__ import annotations

import pandas as pd

from ropewalk.report.figures.style import Figure, Panel, Row, RunStyle, canvas, plain
from ropewalk.report.runs import Run
from ropewalk.report.text import amount, listed

FINAL_SHARE = 0.1  # of the logged steps, whose mean stands for the end of a curve


def training_figure(runs: list[Run], styles: dict[str, RunStyle]) -> Figure:
    """Loss against tokens seen, a panel for each trained length: arms share one, the base has its own."""
    drawn = [run for run in runs if len(run.metrics)]
    missing = [f"{run.name}: no metrics.jsonl, so no training curve." for run in runs if not len(run.metrics)]
    by_length: dict[int | None, list[Run]] = {}
    for run in drawn:
        by_length.setdefault(run.trained_length, []).append(run)
    groups = sorted(by_length.items(), key=lambda item: item[0] or 0)
    return Figure(
        title="Training curves",
        reading=" ".join(_reading(length, group) for length, group in groups),
        rows=[Row([_panel(length, group, styles) for length, group in groups])] if groups else [],
        runs=[run.name for run in drawn],
        missing=missing,
    )


def final_loss(run: Run) -> float:
    """Mean training loss over the last tenth of the logged steps, nats per token."""
    losses = run.metrics["loss"].to_numpy(dtype=float)
    return float(losses[-max(1, round(FINAL_SHARE * len(losses))) :].mean())


def _title(length: int | None) -> str:
    return "Trained length not recorded" if length is None else f"Trained at {length:,} tokens"


def _panel(length: int | None, runs: list[Run], styles: dict[str, RunStyle]) -> Panel:
    plot = canvas("tokens seen", "loss (nats/token)")
    plot.update_xaxes(rangemode="tozero", nticks=6)
    for run in runs:
        style, seen = styles[run.name], run.metrics["tokens"]
        common = {"name": plain(run.name), "legendgroup": plain(run.name), "mode": "lines"}
        smooth = _smoothed(run.metrics["loss"])
        if smooth is not None:
            plot.add_scatter(
                x=list(seen),
                y=list(run.metrics["loss"]),
                line={"color": style.color, "width": 1},
                opacity=0.35,
                hoverinfo="skip",
                **common,
            )
        plot.add_scatter(
            x=list(seen),
            y=list(run.metrics["loss"] if smooth is None else smooth),
            line={"color": style.color, "width": 2, "dash": style.dash},
            hovertemplate=f"{plain(run.name)}<br>%{{x:.3s}} tokens: %{{y:.3f}}<extra></extra>",
            **common,
        )
    smoothed = any(_smoothed(run.metrics["loss"]) is not None for run in runs)
    note = "Bold: mean of the last fiftieth of the steps; faint: each step." if smoothed else ""
    return Panel(_title(length), plot, note)


def _smoothed(losses: pd.Series) -> pd.Series | None:
    window = len(losses) // 50
    return losses.rolling(window, min_periods=1).mean() if window > 1 else None


def _reading(length: int | None, runs: list[Run]) -> str:
    ends = sorted((final_loss(run), run.name) for run in runs)
    counts = sorted({int(run.metrics["tokens"].iloc[-1]) for run in runs})
    seen = f"after {listed(amount(count) for count in counts)} tokens"
    unequal = " The amounts of training differ, so the ends do not compare." if len(counts) > 1 else ""
    losses = listed(f"{name} {loss:.3f}" for loss, name in ends)
    return f"{_title(length)}, {seen}: {losses} (training loss, mean of the last tenth of the steps).{unequal}"
