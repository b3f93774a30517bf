"""Losses of forward passes, and their paired differences to the baseline on the same documents and positions.

All context lengths that share a spectrum come from one pass over the documents, to the longest of them; a pass is
known by that length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ropewalk.evaluation import paired_difference
from ropewalk.evaluation.harness.loss_by_position import per_document
from ropewalk.figures.evaluation_curves import NONE
from ropewalk.report.runs import Run

BOOTSTRAP_SEED = 0
BUCKET = ["position_start", "position_end"]


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        length: tokens of the pass.
        chain: printed chain, test-time part included.
        setting: the part that evaluation appended, printed, or "none".
        kind: OWN for the spectrum used up to the trained length; else the methods that the setting adds to it
            without arguments: yarn from 512 tokens and yarn from 2,048, each right for its run, are alike.
        curve: rows of loss by position, ascending.
    """

    length: int
    chain: str
    setting: str
    kind: str
    curve: pd.DataFrame


def passes(run: Run) -> list[Pass]:
    """The passes of a run, shortest first."""
    rows = run.task("loss_by_position", "nll")
    names = {(max(entry["lengths"]), entry["chain"]): entry["setting"] for entry in run.evaluation.get("settings", [])}
    pairs = run.documents[["context_length", "setting"]].drop_duplicates()  # of evaluations without a record
    by_length = {int(length): str(setting) for length, setting in pairs.itertuples(index=False)}
    made = [
        (int(length), chain, str(names.get((int(length), chain), by_length.get(int(length), chain))), curve)
        for (length, chain), curve in rows.groupby(["context_length", "chain"])
    ]
    lengths = run.task("loss_at_length", "nll")["context_length"]
    starts_beyond = not lengths.empty and run.is_beyond(int(lengths.min()))
    own = NONE if starts_beyond or not made else made[0][2]
    return [
        Pass(length, chain, setting, _kind(setting, own), curve.sort_values("position_start"))
        for length, chain, setting, curve in made
    ]


def _kind(setting: str, own: str) -> str:
    steps, own_steps = setting.split(" > "), own.split(" > ")
    if steps[: len(own_steps)] == own_steps:
        steps = steps[len(own_steps) :]
    return re.sub(r"\([^)]*\)", "", " > ".join(steps))


@dataclass(frozen=True)
class Unpaired:
    """The reason why two runs have no difference."""

    reason: str


def at_length(run: Run, baseline: Run, length: int) -> pd.Series | Unpaired:
    """Difference over the second half of ``length`` tokens to the baseline under the run's test-time setting.

    Returns:
        value, ci_low, ci_high (nats per token) and n (documents that both scored).
    """
    baseline = baseline.beside(run)
    rows = _paired(run, second_half(run, length), baseline, second_half(baseline, length))
    return rows if isinstance(rows, Unpaired) else rows.iloc[0]


def by_position(run: Run, run_pass: Pass, baseline: Run, baseline_pass: Pass) -> pd.DataFrame | Unpaired:
    """Differences in every position bucket that two passes share.

    Returns:
        Columns position_start, position_end, value, ci_low, ci_high, n, ascending.
    """
    return _paired(run, _documents(run, run_pass), baseline, _documents(baseline, baseline_pass))


def _paired(run: Run, sums: pd.DataFrame, baseline: Run, baseline_sums: pd.DataFrame) -> pd.DataFrame | Unpaired:
    for side, part in ((run, sums), (baseline, baseline_sums)):
        if part.empty:
            return Unpaired(f"{side.name} has no per-document losses at those positions")
    if {run.begins_with_bos, baseline.begins_with_bos} == {True, False}:
        return Unpaired(
            f"the documents of one of {run.name} and {baseline.name} begin with BOS, those of the other not"
        )
    shared = run.document_prefixes.keys() & baseline.document_prefixes.keys()
    if any(run.document_prefixes[name] != baseline.document_prefixes[name] for name in shared):
        return Unpaired(f"{run.name} and {baseline.name} read other text, or other tokens, under the same names")
    rows = paired_difference(sums, baseline_sums, BOOTSTRAP_SEED)
    return Unpaired("no document was scored by both") if rows.empty else rows.sort_values("position_start")


def not_finite_documents(run: Run, length: int) -> tuple[int, int]:
    """Documents whose loss over the second half of ``length`` tokens is not a finite number, and all of them."""
    sums = second_half(run, length)["nll_sum"]
    return int((~np.isfinite(sums)).sum()), len(sums)


def _documents(run: Run, made: Pass) -> pd.DataFrame:
    documents = run.documents
    return documents[(documents["context_length"] == made.length) & (documents["setting"] == made.setting)]


def second_half(run: Run, length: int) -> pd.DataFrame:
    """NLL sums per document over the one bucket that the run's loss at ``length`` is taken over.

    No rows where the documents' buckets do not make up that bucket.
    """
    row = run.number("loss_at_length", "nll", length)
    if row is None:
        return run.documents.iloc[:0]
    reaching = [made for made in passes(run) if made.length >= length and made.chain == row["chain"]]
    if not reaching:
        return run.documents.iloc[:0]
    start, end = int(row["position_start"]), int(row["position_end"])
    documents = _documents(run, reaching[0])
    inside = documents[(documents["position_start"] >= start) & (documents["position_end"] <= end)]
    buckets = inside[BUCKET].drop_duplicates()
    if int((buckets["position_end"] - buckets["position_start"]).sum()) != end - start:
        return run.documents.iloc[:0]
    sums = per_document(inside, start, end).reset_index()
    return sums.assign(position_start=start, position_end=end)
