"""Needle heat maps: depth by length, one panel a run, one colour scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.colors

from ropewalk.report.figures.style import Figure, Panel, Row, ScaleBar, canvas, short_length
from ropewalk.report.needle import (
    ANSWER_NLL,
    EXACT_MATCH,
    TOKEN_ACCURACY,
    by_length,
    is_at_chance,
    needle_lengths,
    pooled,
)
from ropewalk.report.runs import Run
from ropewalk.report.text import counted, listed, tokens

COLORS = tuple(plotly.colors.sequential.Cividis)  # made for colour-blind readers
NAMES = {EXACT_MATCH: "exact match", TOKEN_ACCURACY: "answer-token accuracy", ANSWER_NLL: "answer NLL"}
MAX_LABELLED_CELLS = 60  # more have no room for a number each


def needle_figure(runs: list[Run]) -> Figure:
    """Accuracy on 0..1 for every run; where exact match is at chance, the graded scores instead."""
    drawn = [run for run in runs if len(run.task("needle", EXACT_MATCH))]
    missing = [f"{run.name}: no needle grid in its results." for run in runs if run not in drawn]
    if not drawn:
        return Figure("Needle in a haystack", "", missing=missing)
    chance = [run.name for run in drawn if is_at_chance(run)]
    accuracy = TOKEN_ACCURACY if len(chance) == len(drawn) else EXACT_MATCH
    rows = [_row(drawn, accuracy, COLORS, 1.0)]
    if chance:
        highest = max((run.task("needle", ANSWER_NLL)["value"].max() for run in drawn), default=math.nan)
        if not math.isnan(highest):
            rows.append(_row(drawn, ANSWER_NLL, COLORS[::-1], float(highest)))  # bright is good in both
    return Figure("Needle in a haystack", _reading(drawn, chance), rows, missing=missing)


def _row(runs: list[Run], metric: str, colors: Sequence[str], highest: float) -> Row:
    panels = [_panel(run, metric, colors, highest) for run in runs if len(run.task("needle", metric))]
    is_nll = metric == ANSWER_NLL
    title = "Answer NLL (nats per answer token, lower is better)" if is_nll else NAMES[metric].capitalize()
    return Row(panels, title, scale=ScaleBar("0", f"{highest:.1f}" if is_nll else "1", colors))


def _panel(run: Run, metric: str, colors: Sequence[str], highest: float) -> Panel:
    grid = run.task("needle", metric).pivot_table(index="depth", columns="context_length", values="value")
    counts = run.task("needle", metric).pivot_table(index="depth", columns="context_length", values="n")
    lengths = [int(length) for length in grid.columns]
    plot = canvas("context length (tokens)", "depth", height=230)
    plot.update_layout(margin={"t": 6})
    plot.add_heatmap(
        z=[list(row) for row in grid.to_numpy()],
        x=list(range(len(lengths))),
        y=[f"{depth:.0%}" for depth in grid.index],
        customdata=[
            [f"{length:,} tokens, n={n:.0f}" for length, n in zip(lengths, row, strict=True)]
            for row in counts.to_numpy()
        ],
        colorscale=[[i / (len(colors) - 1), color] for i, color in enumerate(colors)],
        zmin=0,
        zmax=highest,
        showscale=False,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.2f}" if grid.size <= MAX_LABELLED_CELLS else None,
        hovertemplate="%{customdata}, depth %{y}: %{z:.3f}<extra></extra>",
    )
    plot.update_xaxes(
        tickvals=list(range(len(lengths))),
        ticktext=[short_length(length) for length in lengths],
        range=[-0.5, len(lengths) - 0.5],
        showgrid=False,
    )
    plot.update_yaxes(autorange="reversed", type="category", showgrid=False)
    within = sum(not run.is_beyond(length) for length in lengths)
    if 0 < within < len(lengths):
        plot.add_vline(x=within - 0.5, line={"width": 3, "dash": "dash", "color": "#D55E00"})
    return Panel(run.name, plot, _note(run, metric))


def _note(run: Run, metric: str) -> str:
    trained = _trained_words(run)
    whole = pooled(run, metric)
    if whole is None:
        return trained
    control = "" if math.isnan(whole.control) else f", shuffled answers {whole.control:.2f}"
    words = ", at chance" if metric != ANSWER_NLL and whole.at_chance else ""
    return f"{trained} Mean {whole.value:.2f}{control}{words}.".lstrip()


def _trained_words(run: Run) -> str:
    beyond = [run.is_beyond(length) for length in needle_lengths(run)]
    if run.trained_length is None:
        return "Trained length not recorded."
    if all(beyond) or not any(beyond):
        return f"All {'past' if all(beyond) else 'within'} the trained {run.trained_length:,} tokens."
    return f"Dashed line: trained at {run.trained_length:,}."


def _reading(runs: list[Run], chance: list[str]) -> str:
    sentences = []
    held: dict[int | None, list[str]] = {}
    for run in runs:
        if run.name not in chance:
            held.setdefault(_longest_held(run), []).append(run.name)
    for length, names in held.items():
        sentences.append(
            f"Exact in at least half of the prompts up to {tokens(length)} tokens: {listed(names)}."
            if length
            else f"Above chance, but exact in under half of the prompts everywhere: {listed(names)}."
        )
    if chance:
        sentences.append(
            f"{listed(chance)}: at chance. Exact match is within two standard errors of the same outputs "
            "scored against shuffled answers, so it orders nothing; the graded scores tell more."
        )
        sentences += [sentence for run in runs if run.name in chance if (sentence := _graded(run))]
    n = runs[0].task("needle", EXACT_MATCH)["n"]
    if n.nunique() == 1:
        sentences.append(f"Each cell is {counted(int(n.iloc[0]), 'prompt')}.")
    return " ".join(sentences)


def _longest_held(run: Run) -> int | None:
    """The longest length up to which every length keeps a mean exact match of at least one half."""
    held = None
    for length in needle_lengths(run):
        whole = pooled(run, EXACT_MATCH, length)
        if whole is None or whole.value < 0.5:
            break
        held = length
    return held


def _graded(run: Run) -> str:
    nll = pooled(run, ANSWER_NLL)
    if nll is None or math.isnan(nll.control):
        return ""
    gain, error = nll.control - nll.value, _standard_error(run)
    if math.isnan(error):
        return f"{run.name}: the right answer is {gain:.2f} nats per token likelier than a shuffled one."
    words = "clear of" if gain > 2 * error else "within"
    return (
        f"{run.name}: the right answer is {gain:.2f} nats per token likelier than a shuffled one, "
        f"{words} two standard errors ({2 * error:.2f})."
    )


def _standard_error(run: Run) -> float:
    """Of the pooled answer NLL less its control, as if lengths, answer and control were independent; nan if unknown."""
    variance = 0.0
    for metric in (ANSWER_NLL, f"{ANSWER_NLL}_shuffled"):
        rows: pd.DataFrame = by_length(run, metric)
        variance += float(((rows["n"] * rows["stderr"]) ** 2).sum(skipna=False)) / float(rows["n"].sum()) ** 2
    return math.sqrt(variance)
