"""The needle grid pooled: accuracies by length, and whether they are above chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from ropewalk.report.runs import Run

EXACT_MATCH, TOKEN_ACCURACY, ANSWER_NLL = "exact_match", "answer_token_accuracy", "answer_nll"


@dataclass(frozen=True)
class Pooled:
    """A needle metric over some cells of the grid, beside its control scored against shuffled answers."""

    value: float
    control: float  # nan where the control was not measured
    n: int  # prompts

    @property
    def at_chance(self) -> bool:
        """Whether an accuracy is within two standard errors of its control (0 where there is none).

        The standard error is the binomial one of ``n`` prompts, the largest that values in 0..1 can have.
        """
        control = 0.0 if math.isnan(self.control) else self.control
        variance = self.value * (1 - self.value) + control * (1 - control)
        return self.value - control <= 2 * math.sqrt(variance / max(self.n, 1))


def needle_lengths(run: Run) -> list[int]:
    """Context lengths of the run's needle grid, ascending."""
    return sorted({int(length) for length in run.results.loc[run.results["task"] == "needle", "context_length"]})


def pooled(run: Run, metric: str, length: int | None = None) -> Pooled | None:
    """``metric`` averaged over depths (and lengths, where ``length`` is None), weighted by prompts."""
    rows, control = by_length(run, metric), by_length(run, f"{metric}_shuffled")
    if length is not None:
        rows, control = rows[rows["context_length"] == length], control[control["context_length"] == length]
    if rows.empty:
        return None
    return Pooled(_mean(rows), _mean(control), int(rows["n"].sum()))


def is_at_chance(run: Run, metric: str = EXACT_MATCH) -> bool | None:
    """Whether the run's whole grid is at chance; None where there is no grid."""
    whole = pooled(run, metric)
    return None if whole is None else whole.at_chance


def by_length(run: Run, metric: str) -> pd.DataFrame:
    """The evaluator's own pooling over depths, which weights by answer tokens; else the cells."""
    rows = run.task("needle_at_length", metric)
    return run.task("needle", metric) if rows.empty else rows


def _mean(rows: pd.DataFrame) -> float:
    weight = rows["n"].sum()
    return float((rows["value"] * rows["n"]).sum() / weight) if weight else math.nan
