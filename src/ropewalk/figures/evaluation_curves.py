"""Curves of evaluations: loss by position, paired differences, needles and benchmark averages by context length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from ropewalk.figures.figure import ALONE, PANEL, Figure, Panel, file_name, rows_of
from ropewalk.figures.style import Style, draw_curve, interval, label, mark_lengths, method_styles, tokens_axis
from ropewalk.figures.training_curves import each_run

TITLE = "Loss by position"
OWN, NONE = "", "none"  # the kind of what a run was trained with; the setting that adds nothing
UNKNOWN = "unknown"  # noise of an arm of one seed
PAIRED = "Differences are paired by document; below 0: lower loss than the baseline."


def position_figures(
    curves: pd.DataFrame,
    differences: pd.DataFrame,
    trained_lengths: Mapping[str, int | None],
    styles: Mapping[str, Style],
    baseline: str,
    reference: str | None = None,
) -> list[Figure]:
    """Loss curves for each kind of test-time setting and, beside them, the differences to the baseline.

    Args:
        curves: a row for each run, pass and bucket of positions, ascending: run, kind (what test time adds without its
            arguments, "" for nothing), setting (in full, or "none"), length (tokens of the pass), position_start,
            position_end (tokens), value, ci_low, ci_high (nats per token), n (documents).
        differences: run less baseline over the buckets that both have: run, kind, position_start, position_end, value,
            ci_low, ci_high, n, and noise (what is known of training noise, or "unknown").
        trained_lengths: run -> tokens.
        styles: run -> style.
        baseline: a run.
        reference: what differences are to, for people; None: ``baseline``.
    """
    against = reference or baseline
    kinds = sorted(dict.fromkeys(curves["kind"]), key=lambda kind: kind != OWN)
    parts = ((kind, curves[curves["kind"] == kind], differences[differences["kind"] == kind]) for kind in kinds)
    return [_figure(kind, losses, paired, trained_lengths, styles, baseline, against) for kind, losses, paired in parts]


def kind_title(kind: str) -> str:
    """The heading of a kind of test-time setting."""
    return f"With {'the spectrum used up to the trained length' if kind == OWN else f'{kind} at test time'}"


def _figure(
    kind: str,
    losses: pd.DataFrame,
    differences: pd.DataFrame,
    trained_lengths: Mapping[str, int | None],
    styles: Mapping[str, Style],
    baseline: str,
    against: str,
) -> Figure:
    trained = [length for name, length in trained_lengths.items() if length and name in set(losses["run"])]
    losses, differences = _placed(losses), _placed(differences)
    draw = partial(_draw, rows=losses, y_label="loss (nats/token)", trained=trained, styles=styles, baseline=baseline)
    panels = [Panel(draw, f"Loss; band: 95% interval of {baseline} over documents", _settings(losses))]
    if len(differences):
        draw = partial(
            _draw_differences, rows=differences, trained=trained, styles=styles, zero=styles[baseline]
        )  # fmt: skip
        panels.append(Panel(draw, f"Difference to {against}"))
    of_runs = {name: styles[name] for name, _ in each_run(losses)}
    name = file_name(f"{TITLE} {kind_title(kind)}")
    numbers, caption = _numbers(losses, differences, against), PAIRED if len(differences) else ""
    return Figure(name, kind_title(kind), rows_of(panels), caption, of_runs, numbers)


def _placed(rows: pd.DataFrame) -> pd.DataFrame:
    """With x, the mean position of a bucket's tokens, which gives [0, 64) a place on a logarithmic axis."""
    return rows.assign(x=(rows["position_start"].astype(float) + rows["position_end"].astype(float)) / 2)


def _settings(losses: pd.DataFrame) -> str:
    """Runs by the test-time setting that they read under."""
    by_setting = losses.groupby("setting", sort=False)["run"].unique()
    return "; ".join(f"{', '.join(names)}: {setting}" for setting, names in by_setting.items() if setting != NONE)


def _draw(
    axes: Axes,
    rows: pd.DataFrame,
    y_label: str,
    trained: Iterable[int],
    styles: Mapping[str, Style],
    baseline: str | None = None,
) -> None:
    """Curves with the interval of the baseline alone, as bands of many runs hide one another; None: of all."""
    signed = y_label.startswith("difference")
    for name, of_run in each_run(rows):
        for _, part in of_run.groupby("length" if "length" in of_run else "run"):
            tips, band = _tips(part, signed=signed), baseline in (None, name)
            draw_curve(axes, name, styles[name], part, tips, band=band)
    low, high = float(rows["x"].min()), float(rows["position_end"].max())
    tokens_axis(axes, low / 1.2, high * 1.4, "position (tokens)")
    mark_lengths(axes, trained, low, high)
    axes.set_ylabel(label(y_label))


def _draw_differences(
    axes: Axes, rows: pd.DataFrame, trained: Iterable[int], styles: Mapping[str, Style], zero: Style
) -> None:
    axes.axhline(0, color=zero.color, linestyle=zero.dash, linewidth=1.5, gid="baseline")
    _draw(axes, rows, "difference (nats/token)", trained, styles)


def _tips(rows: pd.DataFrame, *, signed: bool) -> list[str]:
    sign = "+" if signed else ""
    return [
        f"positions {int(row.position_start):,} to {int(row.position_end):,}, "
        f"{row.value:{sign}.3f} {interval(row.ci_low, row.ci_high, signed=signed)}, n={int(row.n)}"
        for row in rows.itertuples()
    ]


def _numbers(losses: pd.DataFrame, differences: pd.DataFrame, baseline: str) -> pd.DataFrame | None:
    """Loss and difference of each run over the last bucket of positions that all runs share; None: they share none."""
    buckets = [set(zip(part["position_start"], part["position_end"], strict=True)) for _, part in each_run(losses)]
    shared = set.intersection(*buckets)
    if not shared:
        return None
    start, end = max(shared)
    loss, difference = f"loss, positions {int(start):,} to {int(end):,}", f"difference to {baseline}"
    table = pd.DataFrame("", index=[name for name, _ in each_run(losses)], columns=[loss])
    for name, rows in each_run(_at(losses, start, end)):
        row = rows.iloc[-1]
        table.loc[name, loss] = f"{row['value']:.3f} {interval(row['ci_low'], row['ci_high'])}".rstrip()
    if len(differences):
        table[[difference, "training noise"]] = ""
        for name, rows in each_run(_at(differences, start, end)):
            row = rows.iloc[-1]
            text = f"{row['value']:+.4f} {interval(row['ci_low'], row['ci_high'], signed=True)}".rstrip()
            table.loc[name, [difference, "training noise"]] = text, row["noise"]
        if set(table["training noise"]) <= {"", UNKNOWN}:
            del table["training noise"]
    return table


def _at(rows: pd.DataFrame, start: int, end: int) -> pd.DataFrame:
    return rows[(rows["position_start"] == start) & (rows["position_end"] == end)]


def study_figure(means: pd.DataFrame, trained: Mapping[str, int], metric: str, of: str = "") -> Figure:
    """A study's metric by context length: a panel for each regime, a line for each arm.

    Args:
        means: over seeds: regime, arm, x (tokens), value, ci_low, ci_high (percent or nats), n (seeds).
        trained: regime -> tokens.
        metric: its name.
        of: words for the title: whose metric.
    """
    names = list(dict.fromkeys(means["arm"]))
    styles = method_styles(names)

    def panel(regime: str) -> Panel:
        rows = means[means["regime"] == regime]

        def draw(axes: Axes) -> None:
            for name, of_arm in rows.groupby("arm", sort=False):
                tips = [
                    f"{int(r.x):,} tokens, {r.value:.1f} {interval(r.ci_low, r.ci_high)}" for r in of_arm.itertuples()
                ]
                draw_curve(axes, str(name), styles[str(name)], of_arm.sort_values("x"), tips)
            low, high = float(rows["x"].min()), float(rows["x"].max())
            tokens_axis(axes, low / 1.2, high * 1.2, "context length (tokens)")
            mark_lengths(axes, [trained[regime]], low, high)
            axes.set_ylabel(label(metric))

        return Panel(draw, regime)

    title = f"{metric}{of} against context length"
    caption = "Mean over seeds; band: its 95% interval (Student's t)."
    regimes = list(dict.fromkeys(means["regime"]))
    return Figure(file_name(title), title, rows_of([panel(r) for r in regimes]), caption, styles, share="all")


Z = 1.96  # of the 95% interval


def benchmark_figure(
    suite: str,
    averages: pd.DataFrame,
    tasks: Mapping[str, Sequence[str]],
    trained_lengths: Mapping[str, int | None],
    styles: Mapping[str, Style],
) -> Figure | None:
    """A line for each run and test-time setting, a panel for each category; None without two lengths.

    Args:
        suite: name of the benchmark.
        averages: over the tasks that all rows have: run, scaling (test-time setting), category ("" for a suite without
            any), context_length (tokens), value, stderr (percent).
        tasks: category -> the tasks of its averages.
        trained_lengths: run -> tokens.
        styles: run -> style; each further setting of a run gets another dash.
    """
    if averages["context_length"].nunique() < 2:
        return None
    turns = {
        (name, scaling): turn
        for name, rows in each_run(averages)
        for turn, scaling in enumerate(dict.fromkeys(rows["scaling"]))
    }
    panels = [
        Panel(
            partial(_draw_averages, rows=averages[averages["category"] == category], turns=turns, styles=styles,
                    trained=[n for run in dict.fromkeys(averages["run"]) if (n := trained_lengths.get(str(run)))]),
            category,
            f"Mean of {len(names)}: {', '.join(names)}.",
        )
        for category, names in tasks.items()
    ]  # fmt: skip
    title = f"{suite} against context length"
    of_runs = {name: styles[name] for name, _ in each_run(averages)}
    size = ALONE if len(panels) == 1 else PANEL
    caption = "Band: 95% over samples, not training noise."
    return Figure(file_name(title), title, rows_of(panels), caption, of_runs, size=size) if panels else None


def _draw_averages(
    axes: Axes,
    rows: pd.DataFrame,
    turns: Mapping[tuple[str, str], int],
    styles: Mapping[str, Style],
    trained: Iterable[int],
) -> None:
    for name, of_run in each_run(rows):
        for scaling, part in of_run.groupby("scaling", sort=False):
            curve = part.rename(columns={"context_length": "x"}).sort_values("x")
            error = Z * curve["stderr"]
            curve = curve.assign(ci_low=curve["value"] - error, ci_high=curve["value"] + error)
            tips = [
                f"{int(row.x):,} tokens, {row.value:.1f} ± {Z * row.stderr:.1f}, {scaling}"
                for row in curve.itertuples()
            ]
            draw_curve(axes, name, styles[name].dashed(turns[name, str(scaling)]), curve, tips)
    _against_length(axes, rows, trained, "percent")


def _against_length(axes: Axes, rows: pd.DataFrame, trained: Iterable[int], y_label: str) -> None:
    low, high = int(rows["context_length"].min()), int(rows["context_length"].max())
    tokens_axis(axes, low / 1.3, high * 1.3, "context length (tokens)")
    mark_lengths(axes, trained, low, high)
    axes.set_ylabel(y_label)


def retrieval_figure(
    rows: pd.DataFrame, trained_lengths: Mapping[str, int | None], styles: Mapping[str, Style]
) -> Figure | None:
    """Needles found against context length, a line for each run and a panel for each test-time setting.

    Args:
        rows: run, test_time, context_length (tokens), value, ci_low, ci_high (shares of exact matches), n (prompts).
        trained_lengths: run -> tokens.
        styles: run -> style.

    Returns:
        None without two lengths.
    """
    if rows["context_length"].nunique() < 2:
        return None
    settings = sorted(dict.fromkeys(rows["test_time"]), key=lambda setting: setting != NONE)
    parts = ((setting, rows[rows["test_time"] == setting]) for setting in settings)
    panels = [
        Panel(partial(_draw_retrieval, rows=of_setting, styles=styles,
                      trained=[n for name, _ in each_run(of_setting) if (n := trained_lengths.get(name))]),
              f"test_time={setting}" if setting else "")
        for setting, of_setting in parts
    ]  # fmt: skip
    title = "Needles found against context length"
    of_runs = {name: styles[name] for name, _ in each_run(rows)}
    size = ALONE if len(panels) == 1 else PANEL
    caption = "Share of exact matches over all depths; band: 95% over prompts, not training noise."
    return Figure(file_name(title), title, rows_of(panels), caption, of_runs, size=size, share="all")


def _draw_retrieval(axes: Axes, rows: pd.DataFrame, styles: Mapping[str, Style], trained: Iterable[int]) -> None:
    for name, of_run in each_run(rows):
        curve = of_run.assign(x=of_run["context_length"]).sort_values("x")
        tips = [f"{int(row.x):,} tokens, {row.value:.2f} {interval(row.ci_low, row.ci_high)}, n={int(row.n)}"
                for row in curve.itertuples()]  # fmt: skip
        draw_curve(axes, name, styles[name], curve, tips)
    _against_length(axes, rows, trained, "exact match")
    axes.set_ylim(-0.03, 1.03)
