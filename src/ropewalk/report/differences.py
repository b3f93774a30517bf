"""Paired differences of loss between a run and the baseline, on the same documents and positions."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from ropewalk.evaluation import paired_difference
from ropewalk.report.passes import Pass, passes
from ropewalk.report.runs import Run

BOOTSTRAP_SEED = 0
BUCKET = ["position_start", "position_end"]


@dataclass(frozen=True)
class Difference:
    """Run minus baseline, nats per token, with its 95% interval over the ``n`` documents that both scored."""

    value: float
    low: float
    high: float
    n: int

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves out zero; an unknown interval decides nothing."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Unpaired:
    """Why two runs have no difference."""

    reason: str


def at_length(run: Run, baseline: Run, length: int) -> Difference | Unpaired:
    """Difference over the second half of ``length`` tokens, each run under its own setting there."""
    rows = _paired(run, _second_half(run, length), baseline, _second_half(baseline, length))
    if isinstance(rows, Unpaired):
        return rows
    row = rows.iloc[0]
    return Difference(float(row["value"]), float(row["ci_low"]), float(row["ci_high"]), int(row["n"]))


def by_position(run: Run, ours: Pass, baseline: Run, theirs: Pass) -> pd.DataFrame | Unpaired:
    """Differences in every position bucket that two passes share.

    Returns:
        Columns position_start, position_end, value, ci_low, ci_high, n, ascending.
    """
    return _paired(run, _documents(run, ours), baseline, _documents(baseline, theirs))


def _paired(run: Run, ours: pd.DataFrame, baseline: Run, theirs: pd.DataFrame) -> pd.DataFrame | Unpaired:
    for side, sums in ((run, ours), (baseline, theirs)):
        if sums.empty:
            return Unpaired(f"{side.name} has no per-document losses at those positions")
    shared = run.document_prefixes.keys() & baseline.document_prefixes.keys()
    if any(run.document_prefixes[name] != baseline.document_prefixes[name] for name in shared):
        return Unpaired(f"{run.name} and {baseline.name} read other text, or other tokens, under the same names")
    rows = paired_difference(ours, theirs, BOOTSTRAP_SEED)
    return Unpaired("no document was scored by both") if rows.empty else rows.sort_values("position_start")


def _documents(run: Run, one: Pass) -> pd.DataFrame:
    documents = run.documents
    return documents[(documents["context_length"] == one.length) & (documents["setting"] == one.setting)]


def _second_half(run: Run, length: int) -> pd.DataFrame:
    """NLL sums per document over the one bucket that the run's loss at ``length`` is taken over.

    No rows where the documents' buckets do not make up that bucket.
    """
    rows = run.task("loss_at_length", "nll")
    rows = rows[rows["context_length"] == length]
    reaching = [one for one in passes(run) if one.length >= length and one.chain in set(rows["chain"])]
    if not reaching:
        return run.documents.iloc[:0]
    start, end = int(rows["position_start"].iloc[0]), int(rows["position_end"].iloc[0])
    documents = _documents(run, reaching[0])
    inside = documents[(documents["position_start"] >= start) & (documents["position_end"] <= end)]
    buckets = inside[BUCKET].drop_duplicates()
    if int((buckets["position_end"] - buckets["position_start"]).sum()) != end - start:
        return run.documents.iloc[:0]
    sums = inside.groupby("document", as_index=False)[["nll_sum", "tokens"]].sum()
    return sums.assign(position_start=start, position_end=end)
