"""Benchmarks by context length: RULER, HELMET and others, every average with the tasks that it is over."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd

from ropewalk.report.runs import Run
from ropewalk.report.table import EMPTY, Block, Cell, Table, block_of
from ropewalk.report.text import counted, listed, ranked, tokens


@dataclass(frozen=True)
class Suite:
    """A benchmark by context length.

    Attributes:
        harness: as the results' table calls it.
        title: heading.
        whole: number of tasks of the whole benchmark; None: no fixed number.
        by_category: whether averages are taken within categories first.
    """

    harness: str
    title: str
    whole: int | None = None
    by_category: bool = False


RULER = Suite("ruler", "RULER", whole=13)
HELMET = Suite("helmet", "HELMET", by_category=True)
LONG = Suite("lm-eval", "Other long-context tasks")
SUITES = (RULER, HELMET, LONG)
# Metric of a row without a value -> why it has none.
REASONS = {"needs_judge": "only a judge model scores it", "inputs_unpublished": "its inputs were never published"}
SCALE = "Percent; shaded: longer than the run was trained at; ± is the standard error over samples, not training noise."


@dataclass(frozen=True, eq=False)
class Scores:
    """What one run has of a suite under one test-time setting.

    Attributes:
        run: the run.
        scaling: printed test-time part of the chain, or "none".
        rows: of the results' table, with a context length each.
    """

    run: Run
    scaling: str
    rows: pd.DataFrame

    @property
    def known(self) -> pd.DataFrame:
        """Rows with a number; the others say in their metric why they have none."""
        return self.rows[self.rows["value"].notna()]

    def at(self, length: int) -> pd.DataFrame:
        """Rows with a number at a length."""
        return self.known[self.known["context_length"] == length]

    def only(self, column: str, value: str) -> Scores:
        """The scores whose ``column`` is ``value``."""
        return replace(self, rows=self.rows[self.rows[column] == value])

    def average(self, tasks: list[str], length: int) -> tuple[float, float] | None:
        """Mean and standard error over ``tasks``, which are independent; None unless all of them have one number."""
        rows = self.at(length)
        rows = rows[rows["task"].isin(tasks)]
        if not tasks or sorted(rows["task"]) != sorted(tasks):
            return None
        error = math.sqrt(float((rows["stderr"].astype(float) ** 2).sum(skipna=False))) / len(rows)
        return float(rows["value"].mean()), error


def scores(runs: list[Run], suite: Suite) -> list[Scores]:
    """What the runs have of a suite; a setting that changes with the length is one, as each length has its own."""
    found = []
    for run in runs:
        rows = run.harness(suite.harness)
        rows = rows[rows["context_length"].notna()]
        for scalings, part in _by_setting(rows):
            found.append(Scores(run, scalings, part))
    return found


def _by_setting(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Rows of one setting each: by what they say, but nothing and something in one where no length has both."""
    if rows.empty:
        return []
    if rows.groupby("context_length")["test_time_scaling"].nunique().max() <= 1:
        return [(" / ".join(dict.fromkeys(rows["test_time_scaling"].astype(str))), rows)]
    return [(str(name), part) for name, part in rows.groupby("test_time_scaling", sort=True)]


def named(one: Scores, found: list[Scores]) -> str:
    """The run's name, with its setting where the run has several."""
    several = sum(other.run is one.run for other in found) > 1
    return f"{one.run.name}, {'no scaling' if one.scaling == 'none' else one.scaling}" if several else one.run.name


def lengths_of(found: list[Scores]) -> list[int]:
    """Context lengths of any score, ascending."""
    return sorted({int(length) for one in found for length in one.rows["context_length"]})


def common_tasks(found: list[Scores]) -> list[str]:
    """Tasks that all of ``found`` have, with one number each, at every length at which they have any."""
    sets = []
    for one in found:
        for length in lengths_of([one]):
            counts = one.at(length)["task"].value_counts()
            sets += [set(counts[counts == 1].index)] if len(counts) else []
    shared = set.intersection(*sets) if sets else set()
    return [task for task in all_tasks(found) if task in shared]


def all_tasks(found: list[Scores]) -> list[str]:
    """Every task with a number, in order of appearance."""
    return list(dict.fromkeys(str(task) for one in found for task in one.known["task"]))


def benchmark_table(runs: list[Run], suite: Suite) -> Table | None:
    """The table of a suite; None where no run has any of it."""
    found = scores(runs, suite)
    if not found:
        return None
    lengths = lengths_of(found)
    blocks = _categories(found, lengths) if suite.by_category else _whole(found, suite, lengths)
    folded = [block for task in all_tasks(found) for block in _task_blocks(found, task, lengths)]
    missing = [f"{run.name}: no {suite.title} in its results." for run in runs if run not in [s.run for s in found]]
    missing += _without_number(found)
    reading = f"{ranking(found, lengths, blocks)} {_how_to_read(found)}"
    title, columns = f"{suite.title} by context length", [tokens(length) for length in lengths]
    return Table(title, reading, columns, blocks, missing=missing, folded=folded)


def _whole(found: list[Scores], suite: Suite, lengths: list[int]) -> list[Block]:
    tasks = common_tasks(found)
    number = f"all {suite.whole} tasks" if len(tasks) == suite.whole else counted(len(tasks), "task")
    return block_of(f"Average over {number}: {listed(tasks)}", _rows(found, tasks, lengths)) if tasks else []


def _categories(found: list[Scores], lengths: list[int]) -> list[Block]:
    """A block for each category over its common tasks, then the mean of those categories."""
    blocks: list[Block] = []
    used: dict[str, list[str]] = {}
    for category in dict.fromkeys(str(name) for one in found for name in one.known["category"]):
        parts = [part for one in found if len((part := one.only("category", category)).known)]
        if tasks := common_tasks(parts):
            used[category] = tasks
            blocks += block_of(f"{category}: average over {listed(tasks)}", _rows(parts, tasks, lengths, found))
    if len(used) > 1:
        rows = [(named(one, found), [_over_categories(one, used, length) for length in lengths]) for one in found]
        blocks += block_of(f"Average over the {len(used)} categories above: {listed(used)}", rows)
    return blocks


def _over_categories(one: Scores, used: dict[str, list[str]], length: int) -> Cell:
    values = [one.average(tasks, length) for tasks in used.values()]
    known = [value[0] for value in values if value is not None]
    if len(known) < len(values):
        return Cell(hint="not every category was scored at this length")
    return Cell(f"{sum(known) / len(known):.1f}", beyond=one.run.is_beyond(length))


def _rows(
    found: list[Scores], tasks: list[str], lengths: list[int], among: list[Scores] | None = None
) -> list[tuple[str, list[Cell]]]:
    names = [next(named(other, among or found) for other in (among or found) if _same(one, other)) for one in found]
    return [(name, [_cell(one, tasks, n) for n in lengths]) for name, one in zip(names, found, strict=True)]


def _same(one: Scores, other: Scores) -> bool:
    return one.run is other.run and one.scaling == other.scaling


def _cell(one: Scores, tasks: list[str], length: int) -> Cell:
    value = one.average(tasks, length)
    if value is None:
        return Cell()
    rows = one.at(length)
    rows = rows[rows["task"].isin(tasks)]
    hint = f"{'; '.join(dict.fromkeys(rows['chain'].astype(str)))}; {int(rows['n'].sum()):,} samples; ± standard error"
    detail = "" if math.isnan(value[1]) else f"± {value[1]:.1f}"
    return Cell(f"{value[0]:.1f}", detail, one.run.is_beyond(length), hint=hint)


def _task_blocks(found: list[Scores], task: str, lengths: list[int]) -> list[Block]:
    """A block for each metric of a task."""
    parts = [one.only("task", task) for one in found]
    metrics = list(dict.fromkeys(str(name) for one in parts for name in one.known["metric"]))
    blocks = []
    for metric in metrics:
        rows = _rows([one.only("metric", metric) for one in parts], [task], lengths, found)
        blocks += block_of(f"{task} ({metric})", rows)
    return blocks


def _without_number(found: list[Scores]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for one in found:
        for row in one.rows[one.rows["value"].isna()].itertuples():
            reason = REASONS.get(str(row.metric), str(row.metric))
            reasons.setdefault(reason, []).append(str(row.task))
    return [f"No number, as {reason}: {listed(dict.fromkeys(tasks))}." for reason, tasks in reasons.items()]


def ranking(found: list[Scores], lengths: list[int], blocks: list[Block]) -> str:
    """The last block, an average, at the longest length that all rows have."""
    last = blocks[-1] if blocks and len(blocks[-1].rows) == len(found) else None
    full = [i for i in range(len(lengths)) if last and all(cells[i].main != EMPTY for _, cells in last.rows)]
    if last is None or not full:
        return "The rows share no length with the same tasks, so there is no average to rank."
    at = full[-1]
    words = ranked(((float(cells[at].main), name) for name, cells in last.rows), ".1f")
    return f"{last.title.partition(':')[0]} at {lengths[at]:,} tokens, from the lowest: {words}."


def _how_to_read(found: list[Scores]) -> str:
    tasks = common_tasks(found)
    left_out = [task for task in all_tasks(found) if task not in tasks]
    if not left_out:
        return SCALE
    return f"{SCALE} In no average, as not every row and length has one number of them: {listed(left_out)}."
