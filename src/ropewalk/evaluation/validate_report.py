"""The findings of a validation: its table, the verdicts, and the sentences and tables of the terminal.

Everything here works on tables, so it is checked on tables made by hand; the models are run by
:mod:`ropewalk.evaluation.validate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ropewalk.evaluation.bootstrap import FEW_DOCUMENTS, ratio
from ropewalk.evaluation.harness.loss_by_position import per_document
from ropewalk.evaluation.results import BUCKET, RESULT_COLUMNS, paired_difference, typed_table

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


def needle_verdict(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Verdict: two exact-match rows have intervals apart; stricter than a paired test, which needs each prompt."""
    return GAIN if after["ci_low"] > before["ci_high"] else WORSE if after["ci_high"] < before["ci_low"] else UNDECIDED


def sentences(table: pd.DataFrame, tolerance: float, too_short: int = 0) -> list[str]:
    """The findings in words: of ``after`` in full, of the sweep its verdicts and the lowest loss of each range.

    Args:
        table: of :func:`validation_table`.
        tolerance: nats per token that short context may lose.
        too_short: documents left out because the longest context does not fit them.
    """
    findings = []
    after = table[(table["arm"] == AFTER) & (table["metric"] == "nll_difference")]
    for row in after.to_dict("records"):
        findings.append(_beyond(row) if row["position_start"] else _short_context(row, tolerance, too_short))
    findings += _needle(table)
    sweep = table[table["arm"].str.startswith("clip") & (table["metric"] == "nll_difference")]
    for start, of_range in sweep.groupby("position_start"):
        findings.append(_sweep(of_range.to_dict("records"), is_short_context=start == 0))
    return findings


def _short_context(row: Mapping[str, Any], tolerance: float, too_short: int) -> str:
    verdict = row["verdict"]
    if verdict == UNDECIDED:
        others = f" (another {too_short} are too short for the longest multiple)" if too_short else ""
        verdict = f"{UNDECIDED}: more documents needed than {row['n']}{others}"
    return (
        f"Short context, positions below {row['position_end']:,}: {verdict}. The loss changes by {_against(row)}; "
        f"tolerance {tolerance:g}."
    )


def _beyond(row: Mapping[str, Any]) -> str:
    verdict = f"{UNDECIDED}: more documents needed" if row["verdict"] == UNDECIDED else row["verdict"]
    return f"Positions {_range(row)}: {verdict}. The loss changes by {_against(row)}."


def _against(row: Mapping[str, Any]) -> str:
    few = ", few enough that the interval itself is rough" if 1 < row["n"] < FEW_DOCUMENTS else ""
    documents = f"{row['n']} documents" if row["n"] > 1 else "1 document, which gives no interval"
    return f"{difference(row)} nats/token over {documents}{few}"


def _needle(table: pd.DataFrame) -> Iterator[str]:
    rows = {(r["arm"], r["metric"], r["context_length"]): r for r in table.to_dict("records")}
    for arm, metric, length in rows:
        if (arm, metric) != (AFTER, "exact_match"):
            continue
        (exact_before, exact), (nll_before, nll) = (
            [rows[side, metric, length] for side in (BEFORE, AFTER)] for metric in ("exact_match", "answer_nll")
        )
        verdict = needle_verdict(exact_before, exact)
        why = "the 95% intervals overlap" if verdict == UNDECIDED else "the 95% intervals lie apart"
        yield (
            f"Needle at {length:,}: exact match {share(exact_before)} -> {share(exact)}, answer NLL "
            f"{nll_before['value']:.3f} -> {nll['value']:.3f} nats/token; {verdict}, {why}."
        )


def _sweep(rows: Sequence[dict[str, Any]], is_short_context: bool) -> str:
    if is_short_context:
        words = [f"{row['arm'].removeprefix('clip')} {row['verdict']} ({row['value']:+.4f})" for row in rows]
        return f"Sweep, short context by clip: {'; '.join(words)}."
    finite = [row for row in rows if row["verdict"] != NOT_FINITE]
    if not finite:
        return f"Sweep, positions {_range(rows[0])}: no clip gives a finite loss."
    best = min(finite, key=lambda row: row["value"])
    return (
        f"Sweep, positions {_range(best)}: clip {best['arm'].removeprefix('clip')} has the lowest loss, "
        f"{difference(best)} against before ({best['verdict']}); chosen on these documents, so confirm it on others."
    )


def tables(table: pd.DataFrame) -> str:
    """Loss and needle of each arm, and below them its differences to before, for the terminal."""
    losses, differences, needle = (
        {(row["arm"], _range(row)): text(row) for row in table[table["metric"] == metric].to_dict("records")}
        for metric, text in (("nll", _value), ("nll_difference", difference), ("exact_match", share))
    )
    arms = dict.fromkeys(table["arm"])
    blocks = {
        "loss, nats/token, and needle, exact matches/prompts": losses
        | {(a, f"needle {at}"): t for (a, at), t in needle.items()},
        "loss difference to before, paired by document, 95% interval": differences,
    }
    return "\n\n".join(f"{title}\n{_block(arms, cells)}" for title, cells in blocks.items() if cells)


def _block(arms: Mapping[str, Any], cells: Mapping[tuple[str, str], str]) -> str:
    columns = dict.fromkeys(column for _, column in cells)
    rows = {arm: [cells.get((arm, column), "") for column in columns] for arm in arms}
    # Cells hold spaces of their own, so the columns stand two apart.
    shown = {arm: [f" {cell}" for cell in row] for arm, row in rows.items() if any(row)}
    return pd.DataFrame.from_dict(shown, orient="index", columns=[f" {column}" for column in columns]).to_string()


def _value(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.4f}"


def difference(row: Mapping[str, Any]) -> str:
    """``+0.0012 [-0.0003, +0.0027]``; the value alone if there is no interval."""
    interval = "" if math.isnan(row["ci_low"]) else f" [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]"
    return f"{row['value']:+.4f}{interval}"


def share(row: Mapping[str, Any]) -> str:
    """``3/20``."""
    return f"{round(row['value'] * row['n'])}/{row['n']}"


def _range(row: Mapping[str, Any]) -> str:
    """``256-512``, a needle's context length, which has no positions."""
    if pd.isna(row["position_start"]):
        return f"{row['context_length']:,}"
    return f"{row['position_start']:,}-{row['position_end']:,}"
