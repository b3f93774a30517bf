"""The results of a validation: its table with the verdicts, and the tables of the terminal.

Everything here works on tables, so it is checked on tables made by hand; the models are run by
:mod:`ropewalk.evaluation.validate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ropewalk.evaluation.bootstrap import BUCKET, FEW_DOCUMENTS, paired_difference, ratio
from ropewalk.evaluation.harness.loss_by_position import per_document
from ropewalk.evaluation.results import RESULT_COLUMNS, typed_table

# Those of the results table, and the arm's. Metrics: nll, nll_difference (arm minus before), answer_nll, and
# exact_match as a share of 1.
COLUMNS = {
    "arm": "str",  # before, after or clip<n>
    "chain": RESULT_COLUMNS["chain"],
    "evaluation": "str",  # directory below the output that holds the evaluation
    **{name: RESULT_COLUMNS[name] for name in ("metric", "context_length", *BUCKET, "value", "ci_low", "ci_high", "n")},
    "verdict": "str",  # of nll_difference; else empty
}
BEFORE, AFTER = "before", "after"
NO_REGRESSION, REGRESSION = "no regression", "regression"
GAIN, WORSE = "gain", "worse"
UNDECIDED, NOT_FINITE = "undecided", "not finite"


@dataclass(frozen=True)
class Measured:
    """A finished arm.

    Attributes:
        name: of the arm.
        chain: printed chain.
        evaluation: name of the directory that holds its evaluation.
        documents: context length -> per-document NLL sums of the pass that serves it.
        results: its results table, accuracies as shares of 1; the needle's part is read.
    """

    name: str
    chain: str
    evaluation: str
    documents: Mapping[int, pd.DataFrame]
    results: pd.DataFrame


def validation_table(arms: Sequence[Measured], lengths: Sequence[int], tolerance: float, seed: int) -> pd.DataFrame:
    """Loss, paired difference to the first arm, and needle of every arm, columns and dtypes as in ``COLUMNS``.

    The positions are cut at ``lengths``: the first range is the short context, [0, trained length).

    Args:
        arms: ``before`` first, all over the same documents.
        lengths: tokens, ascending from the trained length.
        tolerance: nats per token that short context may lose.
        seed: of the bootstrap.
    """
    rows = [
        {"arm": arm.name, "chain": arm.chain, "evaluation": arm.evaluation, "verdict": "", **row}
        for arm in arms
        for row in [*_loss_rows(arm, arms[0], lengths, tolerance, seed), *_needle_rows(arm)]
    ]
    return typed_table(rows, COLUMNS)


def _loss_rows(
    arm: Measured, before: Measured, lengths: Sequence[int], tolerance: float, seed: int
) -> Iterator[dict[str, Any]]:
    for start, end in zip([0, *lengths], lengths, strict=False):
        span = {"context_length": end, "position_start": start, "position_end": end}
        losses, reference = (_of_range(side.documents[end], start, end) for side in (arm, before))
        loss = ratio(losses["nll_sum"], losses["tokens"], seed)
        interval = {"ci_low": loss.ci_low, "ci_high": loss.ci_high}
        yield {**span, "metric": "nll", "value": loss.value, **interval, "n": loss.n}
        if arm is before:
            continue
        change = paired_difference(losses, reference, seed).iloc[0][["value", "ci_low", "ci_high", "n"]].to_dict()
        bounds = (change["value"], change["ci_low"], change["ci_high"])
        verdict = beyond_verdict(*bounds) if start else short_context_verdict(*bounds, tolerance)
        yield {**span, "metric": "nll_difference", **change, "verdict": verdict}


def _of_range(documents: pd.DataFrame, start: int, end: int) -> pd.DataFrame:
    sums = per_document(documents, start, end).reset_index()
    return sums.assign(**dict(zip(BUCKET, (start, end), strict=True)))


def _needle_rows(arm: Measured) -> Iterator[dict[str, Any]]:
    rows = arm.results[arm.results["task"] == "needle_at_length"]
    rows = rows[rows["metric"].isin(["exact_match", "answer_nll"])]
    yield from rows[["metric", "context_length", "value", "ci_low", "ci_high", "n"]].to_dict("records")


def short_context_verdict(value: float, low: float, high: float, tolerance: float) -> str:
    """Verdict: a loss difference with its 95% interval keeps within ``tolerance``, nats per token.

    An unknown interval, as of one document, decides nothing. A loss that is not finite is its own verdict: no number
    of documents would change it.
    """
    if not math.isfinite(value):
        return NOT_FINITE
    return NO_REGRESSION if high <= tolerance else REGRESSION if low > tolerance else UNDECIDED


def beyond_verdict(value: float, low: float, high: float) -> str:
    """Verdict: the interval of a loss difference leaves out zero, and on which side."""
    if not math.isfinite(value):
        return NOT_FINITE
    return GAIN if high < 0 else WORSE if low > 0 else UNDECIDED


def tables(table: pd.DataFrame, tolerance: float, too_short: int = 0) -> str:
    """Loss and needle of each arm, and below them its differences to before with their verdicts, for the terminal.

    Args:
        table: of :func:`validation_table`.
        tolerance: nats per token that short context may lose.
        too_short: documents left out because the longest context does not fit them.
    """
    losses, differences, needle = (
        {(row["arm"], _range(row)): text(row) for row in table[table["metric"] == metric].to_dict("records")}
        for metric, text in (("nll", _value), ("nll_difference", _difference), ("exact_match", _share))
    )
    losses |= {(arm, f"needle {length}"): text for (arm, length), text in needle.items()}
    arms = dict.fromkeys(table["arm"])
    blocks = [f"loss, nats/token, and needle, exact matches/prompts\n{_block(arms, losses)}"]
    if differences:
        documents = table.loc[table["metric"] == "nll_difference", "n"].max()
        legend = (
            f"{documents} documents ({too_short} more are too short for the longest multiple; the interval of fewer "
            f"than {FEW_DOCUMENTS} is rough, one has none). Below the trained length: {NO_REGRESSION} if the interval "
            f"ends by +{tolerance:g}, {REGRESSION} if it begins past it. Beyond: {GAIN} or {WORSE} if it leaves out "
            f"zero. {UNDECIDED}: more documents needed. A clip chosen here needs other documents to confirm it."
        )
        title = "loss difference to before, nats/token, paired by document, 95% interval, verdict"
        blocks.append(f"{title}\n{_block(arms, differences)}\n{legend}")
    return "\n\n".join(blocks)


def _block(arms: Mapping[str, Any], cells: Mapping[tuple[str, str], str]) -> str:
    columns = dict.fromkeys(column for _, column in cells)
    rows = {arm: [cells.get((arm, column), "") for column in columns] for arm in arms}
    # Cells hold spaces of their own, so the columns stand two apart.
    shown = {arm: [f" {cell}" for cell in row] for arm, row in rows.items() if any(row)}
    return pd.DataFrame.from_dict(shown, orient="index", columns=[f" {column}" for column in columns]).to_string()


def _value(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.4f}"


def _difference(row: Mapping[str, Any]) -> str:
    interval = "" if math.isnan(row["ci_low"]) else f" [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    return f"{row['value']:+.4f}{interval} {row['verdict']}"


def _share(row: Mapping[str, Any]) -> str:
    return f"{round(row['value'] * row['n'])}/{row['n']}"


def _range(row: Mapping[str, Any]) -> str:
    """``256-512``, a needle's context length, which has no positions."""
    if pd.isna(row["position_start"]):
        return f"{row['context_length']:,}"
    return f"{row['position_start']:,}-{row['position_end']:,}"
