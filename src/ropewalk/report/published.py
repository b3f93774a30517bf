"""Published numbers (a recipe's expected.csv) beside those of the runs: scores, losses, speed and memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ropewalk.evaluation.paper import measured_beside, published_of
from ropewalk.report.runs import Run
from ropewalk.report.table import Cell, Table, block_of
from ropewalk.report.text import counted, listed, tokens

DECIMALS = {"nll": 3, "tokens/s a GPU": 0, "GPU-hours": 0, "GiB a GPU": 1}  # of scores: 1
LOWER_IS_BETTER = ("nll", "GPU-hours", "GiB a GPU")
# What counts as apart where no error is known: nats per token, points of a score, and of training a share.
NATS, POINTS, SHARE = 0.05, 2.0, 0.1
STRETCH = re.compile(r"loss over positions (\d+)-(\d+)")
SECOND_HALF = "loss over the second half"


@dataclass(frozen=True)
class Found:
    """A published number that stands beside a run.

    Attributes:
        row: of the published table.
        run: of which method it is.
        measured: nan where the run has none.
        stderr: of ``measured`` over samples; nan where unknown.
        scaling: test-time part of the chain it was measured under, or "none".
    """

    row: pd.Series
    run: Run
    measured: float
    stderr: float = math.nan
    scaling: str = "none"

    @property
    def difference(self) -> float:
        """Measured less published."""
        return self.measured - float(self.row["value"])

    @property
    def has_error(self) -> bool:
        """Whether the standard error of what was measured is known."""
        return not math.isnan(self.stderr)

    @property
    def is_apart(self) -> bool:
        """Whether the difference exceeds two standard errors, or where none is known a share or number that is told."""
        if self.has_error:
            return abs(self.difference) > 2 * self.stderr
        if self.row["benchmark"] == "training":
            return abs(self.difference) > SHARE * abs(float(self.row["value"]))
        return abs(self.difference) > (NATS if self.row["task"] == "nll" else POINTS)

    @property
    def is_worse(self) -> bool:
        """Whether it is apart, and on the side that nobody wants."""
        return self.is_apart and (self.difference > 0) == (self.row["task"] in LOWER_IS_BETTER)

    @property
    def title(self) -> str:
        """Of its block in the report."""
        table = self.row["table"]
        where = f"table {table}" if str(table).isdigit() else str(table)
        return f"{self.row['benchmark']}: {self.row['source']}" + ("" if pd.isna(table) else f", {where}")

    @property
    def name(self) -> str:
        """Of its row in the report."""
        scaling = "" if self.scaling == "none" else f", {self.scaling}"
        return f"{self.row['task']}: {self.run.name}{scaling}"

    @property
    def length(self) -> int | None:
        """Context length in tokens; None for short-context tasks."""
        length = self.row["context_length"]
        return None if pd.isna(length) else int(length)


def published_table(runs: list[Run], published: pd.DataFrame) -> Table:
    """One block for each published table and benchmark, each cell a measured number with the published one.

    Args:
        runs: of the report.
        published: as :func:`ropewalk.evaluation.paper.read_published` gives it.
    """
    found = [one for run in runs for one in _beside(run, published)]
    known = [one for one in found if not math.isnan(one.measured)]
    lengths = list(dict.fromkeys(sorted((one.length for one in known), key=lambda n: (n is None, n or 0))))
    blocks = []
    for title in dict.fromkeys(one.title for one in known):
        of_block = [one for one in known if one.title == title]
        cells = {(one.name, one.length): _cell(one) for one in of_block}
        names = dict.fromkeys(one.name for one in of_block)
        blocks += block_of(title, [(name, [cells.get((name, n), Cell()) for n in lengths]) for name in names])
    columns = ["no length" if n is None else tokens(n) for n in lengths]
    return Table(
        "Beside published numbers",
        _reading(published, known),
        columns,
        blocks,
        missing=_missing(found, published),
        on_terminal=True,
    )


def _beside(run: Run, published: pd.DataFrame) -> Iterator[Found]:
    """Every published number of the run's method, measured or not."""
    method = run.record.get("method", run.evaluation.get("method"))
    rows = published_of(published, run.name, method)
    for _, row in rows.iterrows():
        scores = [one for one in measured_beside(row, run.table) if not math.isnan(one["measured"])]
        for one in scores:
            yield Found(row, run, one["measured"], one["stderr"], one["test_time_scaling"])
        if not scores:
            yield Found(row, run, _of_run(run, row))


def _of_run(run: Run, row: pd.Series) -> float:
    """A loss, or what training took; nan where the run has no such number."""
    if row["benchmark"] == "training":
        return _training(run, str(row["task"]), row["context_length"])
    if row["task"] != "nll":
        return math.nan
    if row["benchmark"] == SECOND_HALF:
        rows = run.task("loss_at_length", "nll")
        rows = rows[rows["context_length"] == row["context_length"]]
    elif stretch := STRETCH.fullmatch(str(row["benchmark"])):
        rows = run.task("loss_by_position", "nll")
        rows = rows[rows["context_length"] == row["context_length"]]
        begins, ends = rows["position_start"] >= int(stretch[1]), rows["position_end"] <= int(stretch[2])
        rows = rows[begins & ends]
        if rows.empty or (rows["position_start"].min(), rows["position_end"].max()) != tuple(
            map(int, stretch.groups())
        ):
            return math.nan
        weights = rows["position_end"] - rows["position_start"]
        return float((rows["value"] * weights).sum() / weights.sum())
    else:
        return math.nan
    return float(rows["value"].iloc[0]) if len(rows) == 1 else math.nan


def _training(run: Run, task: str, length: Any) -> float:
    """From metrics.jsonl, at the median step's speed; nan for a run of another length, or that was not trained here."""
    ranks = run.record.get("world_size")
    if run.metrics.empty or not ranks or (not pd.isna(length) and run.trained_length != int(length)):
        return math.nan
    speed = float(run.metrics["tokens_per_second"].median())
    if task == "tokens/s a GPU":
        return speed / ranks
    if task == "GPU-hours":
        return float(run.metrics["tokens"].iloc[-1]) / speed * ranks / 3600
    if task == "GiB a GPU" and "peak_memory_bytes" in run.metrics:
        return float(run.metrics["peak_memory_bytes"].max()) / 2**30
    return math.nan


def _cell(one: Found) -> Cell:
    digits = DECIMALS.get(str(one.row["task"]), 1)
    published = float(one.row["value"])
    difference = round(one.difference, digits) + 0.0  # no -0.000
    error = "" if math.isnan(one.stderr) else f" ± {one.stderr:.1f}"
    return Cell(
        f"{one.measured:,.{digits}f}",
        f"{error} (published {published:,.{digits}f}, {difference:+,.{digits}f})".lstrip(),
        beyond=one.length is not None and one.run.is_beyond(one.length),
        decided=one.is_apart,
        worse=one.is_worse,
        hint=f"published for {one.row['method']}",
    )


def _reading(published: pd.DataFrame, known: list[Found]) -> str:
    numbers = len({one.row.name for one in known})
    words = f"Of {counted(len(published), 'published number')}, {numbers} were measured in these runs."
    told = f"{NATS} nats, {POINTS:.0f} points or of training {SHARE:.0%}"
    for which, past, has_error in (
        ("with a standard error over samples", "two of them", True),
        ("whose error is not known", told, False),
    ):
        ones = [one for one in known if one.has_error == has_error]
        apart = [
            f"{one.name}{'' if one.length is None else f' at {tokens(one.length)}'}" for one in ones if one.is_apart
        ]
        if ones:
            shown = [*apart[:4], *([f"{len(apart) - 4} more"] if len(apart) > 4 else [])]
            words += (
                f" Of {len(ones)} {which}, {len(apart)} {'is' if len(apart) == 1 else 'are'} more than {past} apart"
            )
            words += f": {listed(shown)}." if apart else "."
    return words + " In brackets, the published number and how far the run's is above it."


def _missing(found: list[Found], published: pd.DataFrame) -> list[str]:
    """What of the published numbers stands nowhere, by benchmark and method."""
    measured = {one.row.name for one in found if not math.isnan(one.measured)}
    of_runs = {one.row.name for one in found}
    words = []
    for text, rows in (
        ("not measured in these runs", published[published.index.isin(of_runs - measured)]),
        ("of no run of this report", published[~published.index.isin(of_runs)]),
    ):
        counts = Counter(zip(rows["benchmark"], rows["method"], strict=True))
        if counts:
            parts = [f"{count} of {benchmark} ({method})" for (benchmark, method), count in counts.items()]
            words.append(f"Published and {text}: {listed(parts)}.")
    return words
