"""Loss by position, and its paired difference to the baseline."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go

from ropewalk.report.differences import Unpaired, by_position
from ropewalk.report.figures.style import (
    Figure,
    Panel,
    Row,
    RunStyle,
    add_curve,
    canvas,
    log2_axis,
    mark_lengths,
)
from ropewalk.report.passes import NONE, OWN, Pass, passes
from ropewalk.report.runs import Run
from ropewalk.report.seeds import arms, noise_sentence
from ropewalk.report.text import interval, listed, ranked

HEIGHT = 380  # pixels


@dataclass
class Group:
    """The passes of one kind, by run name, and their differences to the baseline where they can be had."""

    kind: str
    runs: list[Run] = field(default_factory=list)
    passes: dict[str, list[Pass]] = field(default_factory=dict)
    differences: dict[str, pd.DataFrame] = field(default_factory=dict)
    unpaired: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The kind in words."""
        return (
            f"With {'the spectrum used up to the trained length' if self.kind == OWN else f'{self.kind} at test time'}"
        )


def position_figure(runs: list[Run], baseline: Run, styles: dict[str, RunStyle]) -> Figure:
    """Loss curves for each kind of test-time setting and, beside them, the differences to the baseline."""
    groups, noise = _groups(runs), noise_sentence(arms(runs))
    for group in groups:
        _pair(group, baseline)
    drawn = [run for run in runs if any(run.name in group.passes for group in groups)]
    missing = [f"{run.name}: no loss by position in its results." for run in runs if run not in drawn]
    missing += [
        f"{group.title}, {name}: no difference to {baseline.name}, because {reason}."
        for group in groups
        for name, reason in group.unpaired.items()
    ]
    return Figure(
        title="Loss by position",
        reading=noise,
        rows=[Row(_panels(group, baseline, styles, noise), group.title, _reading(group, baseline)) for group in groups],
        runs=[run.name for run in drawn],
        missing=missing,
    )


def _groups(runs: list[Run]) -> list[Group]:
    groups: dict[str, Group] = {OWN: Group(OWN)}
    for run in runs:
        for one in passes(run):
            group = groups.setdefault(one.kind, Group(one.kind))
            group.passes.setdefault(run.name, []).append(one)
            if run not in group.runs:
                group.runs.append(run)
    return [group for group in groups.values() if group.runs]


def _pair(group: Group, baseline: Run) -> None:
    """Fill in the differences between the longest passes of each run and of the baseline."""
    for run in group.runs:
        if run is baseline:
            continue
        if baseline.name not in group.passes:
            group.unpaired[run.name] = f"{baseline.name} has no such pass"
            continue
        found = by_position(run, group.passes[run.name][-1], baseline, group.passes[baseline.name][-1])
        if isinstance(found, Unpaired):
            group.unpaired[run.name] = found.reason
        else:
            group.differences[run.name] = found


def _panels(group: Group, baseline: Run, styles: dict[str, RunStyle], noise: str) -> list[Panel]:
    curves = {name: [one.curve for one in found] for name, found in group.passes.items()}
    settings: dict[str, list[str]] = {}
    for name, found in group.passes.items():
        for one in found:
            settings.setdefault(one.setting, []).append(name)
    note = "; ".join(
        f"{listed(dict.fromkeys(names))}: {setting}" for setting, names in settings.items() if setting != NONE
    )
    loss = _plot("loss (nats/token)", curves, group, styles)
    panels = [Panel("Loss, 95% interval over documents", loss, note)]
    if group.differences:
        differences = {name: [rows] for name, rows in group.differences.items()}
        plot = _plot("difference (nats/token)", differences, group, styles, signed=True)
        zero = styles[baseline.name]
        plot.add_hline(y=0, line={"color": zero.color, "width": 2, "dash": zero.dash})
        panels.append(Panel(f"Difference to {baseline.name}, paired by document (below 0: lower loss)", plot, noise))
    return panels


def _plot(
    y_title: str,
    curves: dict[str, list[pd.DataFrame]],
    group: Group,
    styles: dict[str, RunStyle],
    *,
    signed: bool = False,
) -> go.Figure:
    plot = canvas("position (tokens)", y_title, height=HEIGHT)
    placed = [(name, _placed(rows)) for name, found in curves.items() for rows in found]
    for name, rows in placed:
        add_curve(plot, name, styles[name], rows, _hover(rows, signed=signed))
    low, high = (
        min(rows["x"].min() for _, rows in placed),
        max(rows["position_end"].max() for _, rows in placed),
    )
    log2_axis(plot, float(low) / 1.2, float(high) * 1.4)
    trained = {run.trained_length for run in group.runs if run.trained_length and low < run.trained_length <= high}
    mark_lengths(plot, sorted(trained))
    return plot


def _placed(rows: pd.DataFrame) -> pd.DataFrame:
    """With x, the mean position of a bucket's tokens, which gives [0, 64) a place on a logarithmic axis."""
    return rows.assign(x=(rows["position_start"].astype(float) + rows["position_end"].astype(float)) / 2)


def _hover(rows: pd.DataFrame, *, signed: bool) -> list[str]:
    sign = "+" if signed else ""
    return [
        f"positions {int(row.position_start):,} to {int(row.position_end):,}: "
        f"{row.value:{sign}.3f} {interval(row.ci_low, row.ci_high, signed=signed)}, n={int(row.n)}"
        for row in rows.itertuples()
    ]


def _reading(group: Group, baseline: Run) -> str:
    buckets = [_values(found[-1].curve) for found in group.passes.values()]
    shared = set.intersection(*(set(values) for values in buckets))
    if not shared:
        return "The runs share no position bucket."
    start, end = last = max(shared)
    order = ranked((values[last], name) for name, values in zip(group.passes, buckets, strict=True))
    decided = [name for name, rows in group.differences.items() if _leaves_out_zero(rows, last)]
    leading = listed(decided) if decided else "no run"
    against = f" The interval of the difference to {baseline.name} leaves out zero for {leading}."
    return f"Over positions {start:,} to {end:,}, from the lowest loss: {order}.{against if group.differences else ''}"


def _values(curve: pd.DataFrame) -> dict[tuple[int, int], float]:
    return {(int(row.position_start), int(row.position_end)): float(row.value) for row in curve.itertuples()}


def _leaves_out_zero(rows: pd.DataFrame, bucket: tuple[int, int]) -> bool:
    row = rows[(rows["position_start"] == bucket[0]) & (rows["position_end"] == bucket[1])]
    return bool(((row["ci_low"] > 0) | (row["ci_high"] < 0)).any())
