"""Tables of runs that the figures take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from ropewalk.figures.evaluation_curves import UNKNOWN, kind_title
from ropewalk.figures.needle_grid import ANSWER_NLL, EXACT_MATCH, NAMES
from ropewalk.report.benchmarks import Suite, categories, common_tasks, lengths_of, scores
from ropewalk.report.differences import Unpaired, by_position, passes
from ropewalk.report.results_section import loss_at, needle_scores, pooled
from ropewalk.report.runs import Run
from ropewalk.report.section import UNKNOWN_NOISE
from ropewalk.report.seeds import arms, noise_words
from ropewalk.rope import Spectrum
from ropewalk.rope.spectrum import base_of

CURVE = ["run", "kind", "setting", "length", "position_start", "position_end", "value", "ci_low", "ci_high", "n"]
DIFFERENCE = ["run", "kind", "position_start", "position_end", "value", "ci_low", "ci_high", "n", "noise"]
CELLS = ["run", "metric", "context_length", "depth", "value", "n"]
RETRIEVAL = ["run", "test_time", "context_length", "value", "ci_low", "ci_high", "n"]
POOLED = ["run", "metric", "value", "control", "error", "at_chance"]
AVERAGES = ["run", "scaling", "category", "context_length", "value", "stderr"]


def _stacked(parts: Sequence[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def trained_lengths(runs: Sequence[Run]) -> dict[str, int | None]:
    """Run -> tokens that it was trained at; None: not recorded."""
    return {run.name: run.trained_length for run in runs}


def metrics_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Logged steps of all runs, with the columns run and trained_length before those of metrics.jsonl."""
    parts = [run.metrics.assign(run=run.name, trained_length=run.trained_length) for run in runs if len(run.metrics)]
    return _stacked(parts, ["run", "trained_length"])


def curve_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Loss by position of every pass of every run."""
    parts = [
        made.curve.assign(run=run.name, kind=made.kind, setting=made.setting, length=made.length)[CURVE]
        for run in runs
        for made in passes(run)
    ]
    return _stacked(parts, CURVE)


def difference_table(runs: Sequence[Run], baseline: Run) -> tuple[pd.DataFrame, list[str]]:
    """Differences to the baseline between the longest passes of each kind; and, in words, those that cannot be had.

    The noise beside a difference is that of the loss at the length that both passes reach.
    """
    all_arms, parts, unpaired = arms(runs), [], []
    for run in runs:
        counterpart = baseline.beside(run)
        reference = {made.kind: made for made in passes(counterpart)}
        for kind, made in {made.kind: made for made in passes(run)}.items():
            if run.is_same(baseline):
                continue
            rows: pd.DataFrame | Unpaired = Unpaired(f"{baseline.name} has no such pass")
            if kind in reference:
                rows = by_position(run, made, counterpart, reference[kind])
            if isinstance(rows, Unpaired):
                words = f"{kind_title(kind)}, {run.name}: no difference to {baseline.name}, because {rows.reason}."
                unpaired.append(words)
            else:
                length = min(made.length, reference[kind].length)
                noise = noise_words(run, counterpart, all_arms, loss_at(length), digits=4)
                known = UNKNOWN if noise == UNKNOWN_NOISE else noise
                parts.append(rows.assign(run=run.name, kind=kind, noise=known)[DIFFERENCE])
    return _stacked(parts, DIFFERENCE), unpaired


def needle_tables(runs: Sequence[Run], task: str = "needle") -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of every needle grid, and each metric over the whole grid of each run; of videos with their frames."""
    drawn = [run for run in runs if len(run.task(task, EXACT_MATCH))]
    columns = CELLS if task == "needle" else [*CELLS, "frames"]
    cells = [run.task(task, metric).assign(run=run.name)[columns] for run in drawn for metric in NAMES]
    whole = pd.DataFrame([row for run in drawn for row in _pooled_rows(run, task)], columns=POOLED)
    return _stacked(cells, columns), whole


def retrieval_rows(runs: Sequence[Run]) -> pd.DataFrame:
    """Exact matches by context length over all depths of every run, by its label and test-time setting."""
    parts = [
        run.task("needle_at_length", EXACT_MATCH).assign(run=run.label, test_time=run.test_time)[RETRIEVAL]
        for run in runs
    ]
    return _stacked(parts, RETRIEVAL)


def _pooled_rows(run: Run, task: str) -> Iterator[tuple[object, ...]]:
    for metric in NAMES:
        share = pooled(run, metric, task=task)
        if share is not None:
            error = _standard_error(run, task) if metric == ANSWER_NLL else math.nan
            at_chance = metric != ANSWER_NLL and share.at_chance
            yield run.name, metric, share.value, share.control, error, at_chance


def _standard_error(run: Run, task: str) -> float:
    """Of the pooled answer NLL less its control, as if lengths, answer and control were independent; nan if unknown."""
    variance = 0.0
    for metric in (ANSWER_NLL, f"{ANSWER_NLL}_shuffled"):
        rows = needle_scores(run, metric, task)
        if rows.empty:
            return math.nan
        variance += float(((rows["n"] * rows["stderr"]) ** 2).sum(skipna=False)) / float(rows["n"].sum()) ** 2
    return math.sqrt(variance)


def average_table(runs: list[Run], suite: Suite) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """Averages of a suite by run, setting, category and length; and the tasks of each category's averages."""
    rows, tasks_of = [], {}
    for category, parts in categories(scores(runs, suite), suite).items():
        if tasks := common_tasks(parts):
            tasks_of[category] = tasks
            for score in parts:
                for length in lengths_of(parts):
                    if (average := score.average(tasks, length)) is not None:
                        rows.append((score.run.name, score.scaling, category, length, *average))
    return pd.DataFrame(rows, columns=AVERAGES), tasks_of


def run_spectra(runs: Sequence[Run]) -> dict[str, Spectrum]:
    """Run -> spectrum, of the runs that recorded theirs."""
    return {run.name: _spectrum(run) for run in runs if run.inv_freq is not None}


def _spectrum(run: Run) -> Spectrum:
    """The run's spectrum; its base is read off the ratio of the first two frequencies, as for any RoPE vector.

    Of learned frequencies it is the one that they began at.
    """
    inv_freq = run.inv_freq
    assert inv_freq is not None
    theta = run.record.get("learned_from") or base_of(inv_freq) or 1e4
    settings = run.evaluation.get("settings") or [{}]
    scaling = run.record.get("attention_scaling", settings[0].get("attention_scaling", 1.0))
    trained = run.trained_length or 1
    return Spectrum(inv_freq, theta, run.pretrained_length or trained, trained, attention_scaling=float(scaling))


def marked_lengths(runs: Sequence[Run]) -> dict[int, str]:
    """Length in tokens -> "pretrained" or "trained", for every such length of the runs with a spectrum."""
    roles: dict[int, set[str]] = {}
    for run in runs:
        for role, length in (("pretrained", run.pretrained_length), ("trained", run.trained_length)):
            if length and run.inv_freq is not None:
                roles.setdefault(length, set()).add(role)
    return {
        length: "pretrained" if "pretrained" in names and len(roles) > 1 else "trained"
        for length, names in sorted(roles.items())
    }
