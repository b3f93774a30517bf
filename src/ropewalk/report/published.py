"""Published numbers (a recipe's expected.csv) beside those of the runs: scores, losses, speed and memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ropewalk.evaluation.bootstrap import weighted_mean
from ropewalk.evaluation.paper import measured_beside, published_of
from ropewalk.report.runs import Run
from ropewalk.report.section import Cell, Section, block_of

DECIMALS = {"nll": 3, "tokens/s a GPU": 0, "GPU-hours": 0, "GiB a GPU": 1}  # of scores: 1
# Apart without a known error: nats per token, points of a score, and of training a share.
NATS, POINTS, SHARE = 0.05, 2.0, 0.1
LEGEND = (
    "In brackets, the published number and how far the run's is above it. Bold: more than two standard errors over "
    f"samples apart; where no error is known, more than {NATS} nats, {POINTS:.0f} points or, of training, {SHARE:.0%}."
)
STRETCH = re.compile(r"loss over positions (\d+)-(\d+)")
SECOND_HALF = "loss over the second half"


@dataclass(frozen=True)
class Measured:
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
        """True if the standard error of what was measured is known."""
        return not math.isnan(self.stderr)

    @property
    def is_apart(self) -> bool:
        """True if the difference exceeds two standard errors, or without a known one what the legend states."""
        if self.has_error:
            return abs(self.difference) > 2 * self.stderr
        if self.row["benchmark"] == "training":
            return abs(self.difference) > SHARE * abs(float(self.row["value"]))
        return abs(self.difference) > (NATS if self.row["task"] == "nll" else POINTS)

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


def published_section(runs: list[Run], published: pd.DataFrame) -> Section | None:
    """One block for each published table and benchmark, each cell a measured number with the published one.

    None where ``published`` has no row.

    Args:
        runs: of the report.
        published: as :func:`ropewalk.evaluation.paper.read_published` gives it.
    """
    if published.empty:
        return None
    pairs = [pair for run in runs for pair in _beside(run, published)]
    known = [pair for pair in pairs if not math.isnan(pair.measured)]
    lengths = list(dict.fromkeys(sorted((pair.length for pair in known), key=lambda n: (n is None, n or 0))))
    blocks = []
    for title in dict.fromkeys(pair.title for pair in known):
        of_block = [pair for pair in known if pair.title == title]
        cells = {(pair.name, pair.length): _cell(pair) for pair in of_block}
        names = dict.fromkeys(pair.name for pair in of_block)
        blocks += block_of(title, [(name, [cells.get((name, n), Cell()) for n in lengths]) for name in names])
    columns = ["no length" if n is None else f"{n:,}" for n in lengths]
    missing = _missing(pairs, published)
    return Section("Beside published numbers", LEGEND, columns, blocks, missing=missing, on_terminal=True)


def _beside(run: Run, published: pd.DataFrame) -> Iterator[Measured]:
    """Every published number of the run's method, measured or not."""
    method = run.record.get("method", run.evaluation.get("method"))
    rows = published_of(published, run.full_label, method)
    for _, row in rows.iterrows():
        scores = [score for score in measured_beside(row, run.table) if not math.isnan(score["measured"])]
        for score in scores:
            yield Measured(row, run, score["measured"], score["stderr"], score["test_time_scaling"])
        if not scores:
            yield Measured(row, run, _of_run(run, row))


def _of_run(run: Run, row: pd.Series) -> float:
    """A loss, or what training took; nan where the run has no such number."""
    if row["benchmark"] == "training":
        return _training(run, str(row["task"]), row["context_length"])
    if row["task"] != "nll":
        return math.nan
    length = row["context_length"]
    if row["benchmark"] == SECOND_HALF:
        loss = None if pd.isna(length) else run.number("loss_at_length", "nll", length)
        return math.nan if loss is None else float(loss["value"])
    stretch = STRETCH.fullmatch(str(row["benchmark"]))
    if stretch is None:
        return math.nan
    start, end = map(int, stretch.groups())
    rows = run.task("loss_by_position", "nll")
    rows = rows[rows["context_length"] == length]
    rows = rows[(rows["position_start"] >= start) & (rows["position_end"] <= end)]
    if (rows["position_start"].min(), rows["position_end"].max()) != (start, end):  # NaN without any
        return math.nan
    return weighted_mean(rows["value"], rows["position_end"] - rows["position_start"])


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


def _cell(pair: Measured) -> Cell:
    digits = DECIMALS.get(str(pair.row["task"]), 1)
    published = float(pair.row["value"])
    difference = round(pair.difference, digits) + 0.0  # no -0.000
    error = "" if math.isnan(pair.stderr) else f" ± {pair.stderr:.1f}"
    return Cell(
        f"{pair.measured:,.{digits}f}",
        f"{error} (published {published:,.{digits}f}, {difference:+,.{digits}f})".lstrip(),
        beyond=pair.length is not None and pair.run.is_beyond(pair.length),
        marked=pair.is_apart,
        hint=f"published for {pair.row['method']}",
    )


def _missing(pairs: list[Measured], published: pd.DataFrame) -> list[str]:
    """Published numbers that stand nowhere in the table, counted by benchmark and method."""
    measured = {pair.row.name for pair in pairs if not math.isnan(pair.measured)}
    of_runs = {pair.row.name for pair in pairs}
    words = []
    for text, rows in (
        ("not measured in these runs", published[published.index.isin(of_runs - measured)]),
        ("of no run of this report", published[~published.index.isin(of_runs)]),
    ):
        counts = Counter(zip(rows["benchmark"], rows["method"], strict=True))
        if counts:
            parts = [f"{count} of {benchmark} ({method})" for (benchmark, method), count in counts.items()]
            words.append(f"Published and {text}: {', '.join(parts)}.")
    return words
