"""Benchmarks: RULER, HELMET and others by context length, and short context against the base, task by task."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ropewalk.evaluation.bootstrap import weighted_mean
from ropewalk.evaluation.harness.ruler_tasks import BESIDE_RULER
from ropewalk.evaluation.results import NEEDS_JUDGE, UNPUBLISHED, is_whole_score, measured, stratum_words
from ropewalk.report.runs import Run
from ropewalk.report.section import Block, Cell, Section, block_of
from ropewalk.report.seeds import Arm, arms, noise_words


@dataclass(frozen=True)
class Suite:
    """A benchmark by context length.

    Attributes:
        harness: as the results' table calls it.
        title: heading.
        whole: number of tasks of the whole benchmark; None: no fixed number.
        by_category: whether averages are taken within categories first.
        beside: tasks that the harness runs and that are none of the benchmark's.
    """

    harness: str
    title: str
    whole: int | None = None
    by_category: bool = False
    beside: tuple[str, ...] = ()


RULER = Suite("ruler", "RULER", whole=13, beside=tuple(BESIDE_RULER))
HELMET = Suite("helmet", "HELMET", by_category=True)
LONG = Suite("lm-eval", "Other long-context tasks")
SUITES = (RULER, HELMET, LONG)
# Metric of a row without a value -> why it has none.
REASONS = {NEEDS_JUDGE: "only a judge model scores it", UNPUBLISHED: "its inputs were never published"}
SHORT_HARNESS = "lm-eval"
SHORT_LEGEND = (
    "Percent ± standard error over samples; in brackets, the difference to the base with its own. Exploratory: "
    "of twenty tasks one lies two standard errors apart by chance. No average, as the tasks measure different things."
)
SCALE = "Percent; shaded: longer than the run was trained at; ± is the standard error over samples, not training noise."


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one run in a suite under one test-time setting.

    Attributes:
        run: the run.
        scaling: printed test-time part of the chain, or "none".
        rows: of the results' table, with a context length each, that are whole scores of the suite's tasks.
        name: the run's, with the setting where the run has several.
        others: rows that no average takes: scores by length stratum, shares of unparsed answers, tasks beside the
            suite's.
    """

    run: Run
    scaling: str
    rows: pd.DataFrame
    name: str
    others: pd.DataFrame

    @property
    def known(self) -> pd.DataFrame:
        """Rows that were measured; the metric of the others is the reason why they were not."""
        return measured(self.rows)

    def at(self, length: int) -> pd.DataFrame:
        """Rows with a number at a length."""
        return self.known[self.known["context_length"] == length]

    def only(self, column: str, value: str) -> Scores:
        """The scores whose ``column`` is ``value``."""
        rows, others = (table[table[column] == value] for table in (self.rows, self.others))
        return replace(self, rows=rows, others=others)

    def average(self, tasks: list[str], length: int) -> tuple[float, float] | None:
        """Mean and standard error over ``tasks``, which are independent; None unless all of them have one number."""
        rows = self.at(length)
        rows = rows[rows["task"].isin(tasks)]
        if not tasks or sorted(rows["task"]) != sorted(tasks):
            return None
        error = math.sqrt(float((rows["stderr"].astype(float) ** 2).sum(skipna=False))) / len(rows)
        return weighted_mean(rows["value"]), error


def scores(runs: list[Run], suite: Suite) -> list[Scores]:
    """Scores of the runs in a suite; a setting that changes with the length is one, as each length has its own."""
    all_scores = []
    for run in runs:
        rows = run.harness(suite.harness)
        settings = _by_setting(rows[rows["context_length"].notna()])
        for scaling, part in settings:
            setting = "" if len(settings) == 1 else f", {'no scaling' if scaling == 'none' else scaling}"
            is_own = is_whole_score(part) & ~part["task"].isin(suite.beside)
            all_scores.append(Scores(run, scaling, part[is_own], run.name + setting, part[~is_own]))
    return all_scores


def _by_setting(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows by test-time scaling; all in one where no length has two, as with scaling past the trained length alone."""
    if rows.empty:
        return []
    if rows.groupby("context_length")["test_time_scaling"].nunique().max() <= 1:
        return [(" / ".join(dict.fromkeys(rows["test_time_scaling"].astype(str))), rows)]
    return [(str(name), part) for name, part in rows.groupby("test_time_scaling", sort=True)]


def lengths_of(all_scores: list[Scores]) -> list[int]:
    """Context lengths of any score, ascending."""
    tables = [table for score in all_scores for table in (score.rows, score.others)]
    return sorted({int(length) for table in tables for length in table["context_length"]})


def common_tasks(all_scores: list[Scores]) -> list[str]:
    """Tasks that all of ``all_scores`` have, with one number each, at every length at which they have any."""
    sets = []
    for score in all_scores:
        for length in lengths_of([score]):
            counts = score.at(length)["task"].value_counts()
            sets += [set(counts[counts == 1].index)] if len(counts) else []
    shared = set.intersection(*sets) if sets else set()
    return [task for task in all_tasks(all_scores) if task in shared]


def all_tasks(all_scores: list[Scores]) -> list[str]:
    """Every task with a number, in order of appearance."""
    return list(dict.fromkeys(str(task) for score in all_scores for task in score.known["task"]))


def benchmark_section(runs: list[Run], suite: Suite) -> Section | None:
    """The table of a suite; None where no run has any of it."""
    all_scores = scores(runs, suite)
    if not all_scores:
        return None
    lengths = lengths_of(all_scores)
    blocks = _categories(all_scores, suite, lengths) if suite.by_category else _whole(all_scores, suite, lengths)
    others = [str(task) for score in all_scores for task in measured(score.others)["task"]]
    tasks = dict.fromkeys([*all_tasks(all_scores), *others])
    folded = [block for task in tasks for block in _task_blocks(all_scores, task, lengths)]
    scored = [score.run for score in all_scores]
    missing = [f"{run.name}: no {suite.title} in its results." for run in runs if run not in scored]
    missing += [*_without_number(all_scores), *_left_out(all_scores)]
    title, columns = f"{suite.title} by context length", [f"{length:,}" for length in lengths]
    return Section(title, SCALE, columns, blocks, missing=missing, folded=folded)


def categories(all_scores: list[Scores], suite: Suite) -> dict[str, list[Scores]]:
    """Category -> the scores of it; of a suite without categories all in one called ""."""
    if not suite.by_category:
        return {"": all_scores}
    names = dict.fromkeys(str(name) for score in all_scores for name in score.known["category"])
    return {name: [part for score in all_scores if len((part := score.only("category", name)).known)] for name in names}


def _whole(all_scores: list[Scores], suite: Suite, lengths: list[int]) -> list[Block]:
    tasks = common_tasks(all_scores)
    number = f"all {suite.whole} tasks" if len(tasks) == suite.whole else _counted(len(tasks))
    rows = _rows(all_scores, tasks, lengths)
    return block_of(f"Average over {number}: {', '.join(tasks)}", rows) if tasks else []


def _counted(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"


def _categories(all_scores: list[Scores], suite: Suite, lengths: list[int]) -> list[Block]:
    """A block for each category over its common tasks, then the mean of those categories."""
    blocks: list[Block] = []
    used: dict[str, list[str]] = {}
    for category, parts in categories(all_scores, suite).items():
        if tasks := common_tasks(parts):
            used[category] = tasks
            rows = _rows(parts, tasks, lengths)
            blocks += block_of(f"{category}: average over {', '.join(tasks)}", rows)
    if len(used) > 1:
        rows = [(score.name, [_over_categories(score, used, n) for n in lengths]) for score in all_scores]
        blocks += block_of(f"Average over the {len(used)} categories above: {', '.join(used)}", rows)
    return blocks


def _over_categories(score: Scores, used: dict[str, list[str]], length: int) -> Cell:
    values = [score.average(tasks, length) for tasks in used.values()]
    known = [value[0] for value in values if value is not None]
    if len(known) < len(values):
        return Cell(hint="not every category was scored at this length")
    return Cell(f"{sum(known) / len(known):.1f}", beyond=score.run.is_beyond(length))


def _rows(all_scores: list[Scores], tasks: list[str], lengths: list[int]) -> list[tuple[str, list[Cell]]]:
    return [(score.name, [_cell(score, tasks, n) for n in lengths]) for score in all_scores]


def _cell(score: Scores, tasks: list[str], length: int) -> Cell:
    value = score.average(tasks, length)
    if value is None:
        return Cell()
    rows = score.at(length)
    rows = rows[rows["task"].isin(tasks)]
    hint = f"{'; '.join(dict.fromkeys(rows['chain'].astype(str)))}; {int(rows['n'].sum()):,} samples; ± standard error"
    detail = "" if math.isnan(value[1]) else f"± {value[1]:.1f}"
    return Cell(f"{value[0]:.1f}", detail, score.run.is_beyond(length), hint=hint)


def _task_blocks(all_scores: list[Scores], task: str, lengths: list[int]) -> list[Block]:
    """A block for each metric of a task, then for each length stratum of its prompts."""
    parts = []
    for score in all_scores:
        part = score.only("task", task)
        rows = measured(pd.concat([part.rows, part.others]))
        titles = [f"{task} ({row['metric']}){stratum_words(row)}" for row in rows.to_dict("records")]
        rows = rows.assign(title=titles)
        parts.append(replace(part, rows=rows, others=rows.iloc[:0]))
    whole_first = pd.concat([part.rows for part in parts]).sort_values(
        "position_start", kind="stable", na_position="first"
    )
    return [
        block
        for title in dict.fromkeys(whole_first["title"])
        for block in block_of(title, _rows([part.only("title", title) for part in parts], [task], lengths))
    ]


def _without_number(all_scores: list[Scores]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for score in all_scores:
        for row in score.rows[score.rows["metric"].isin(REASONS)].itertuples():
            reason = REASONS[str(row.metric)]
            reasons.setdefault(reason, []).append(str(row.task))
    return [f"No number, as {reason}: {', '.join(dict.fromkeys(tasks))}." for reason, tasks in reasons.items()]


def _left_out(all_scores: list[Scores]) -> list[str]:
    tasks = common_tasks(all_scores)
    others = [task for task in all_tasks(all_scores) if task not in tasks]
    words = "In no average, as not every row and length has one number of them"
    return [f"{words}: {', '.join(others)}."] if others else []


Key = tuple[str, str, str]  # task, metric, test-time scaling


def short_scores(run: Run) -> dict[Key, Any]:
    """Rows of the tasks that have no context length of their own: value and stderr in percent (nan: unknown), n."""
    rows = run.harness(SHORT_HARNESS)
    rows = measured(rows[rows["context_length"].isna()])
    return {(str(row.task), str(row.metric), str(row.test_time_scaling)): row for row in rows.itertuples()}


def short_context_section(runs: list[Run], baseline: Run) -> Section | None:
    """Scores by task and run, each with its difference to the base; None where no run has any.

    The base is the model before continued pretraining where it is known, else the baseline.
    """
    all_scores = {run.name: short_scores(run) for run in runs}
    keys = list(dict.fromkeys(key for known in all_scores.values() for key in known))
    if not keys:
        return None
    base = next((run for run in runs if run.is_base), baseline)
    columns = [base, *(run for run in runs if run is not base)]
    all_arms = arms(runs)
    rows = [(_label(key, keys), [_short_cell(key, run, base, all_scores, all_arms) for run in columns]) for key in keys]
    names = [f"{run.name} (base)" if run.is_base else run.name for run in columns]
    missing = [f"{name}: no short-context tasks in its results." for name, known in all_scores.items() if not known]
    return Section(
        "Short context", SHORT_LEGEND, names, block_of(f"Difference to {base.name}", rows), "task", missing=missing
    )


def _short_cell(key: Key, run: Run, base: Run, all_scores: dict[str, dict[Key, Any]], all_arms: list[Arm]) -> Cell:
    score, reference = all_scores[run.name].get(key), all_scores[base.name].get(key)
    if score is None:
        return Cell()
    main = f"{score.value:.1f}"
    detail = "" if math.isnan(score.stderr) else f"± {score.stderr:.1f}"
    hint = f"{score.n:,} samples"
    if run is base or reference is None:
        return Cell(main, detail, hint=hint)
    difference = score.value - reference.value
    error = math.hypot(score.stderr, reference.stderr)
    apart = f"({difference:+.1f})" if math.isnan(error) else f"({difference:+.1f} ± {error:.1f})"
    noise = noise_words(run, base, all_arms, lambda member: _value(all_scores, member, key), digits=1)
    return Cell(main, f"{detail} {apart}".lstrip(), hint=hint, noise=noise)


def _value(all_scores: dict[str, dict[Key, Any]], run: Run, key: Key) -> float | None:
    score = all_scores[run.name].get(key)
    return None if score is None else float(score.value)


def _label(key: Key, keys: list[Key]) -> str:
    task, metric, scaling = key
    several = len({other[2] for other in keys if other[:2] == key[:2]}) > 1 or scaling != "none"
    return f"{task} ({metric})" + (f", {scaling}" if several else "")
