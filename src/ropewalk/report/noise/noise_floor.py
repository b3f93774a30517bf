"""The noise floor: how far replicates lie apart in each number, and the difference that so many of them detect."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.evaluation.results import OWN_HARNESS, is_loss
from ropewalk.files import replace_atomically, write_atomically
from ropewalk.report.noise.replicates import Replicates, item_values, numbers_of, replicates_among
from ropewalk.report.noise.seed_statistics import (
    POWER,
    correlation,
    detectable_difference,
    mean_over_seeds,
    seeds_to_decide,
    spread,
    variance_components,
)
from ropewalk.report.runs import Run
from ropewalk.report.section import Block, Cell, Section

SEEDS = (3, 5, 8, 10)  # an arm, whose detectable differences a report shows
NUMBER = ["harness", "task", "metric", "context_length", "test_time_scaling"]
COLUMNS = [
    "replicated", "arm", "against", *NUMBER, "runs", "value", "ci_low", "ci_high", "spread", "spread_low",
    "spread_high", "unpaired_spread", "correlation", "items", "seed_sd", "item_sd", "rest_sd",
]  # fmt: skip
LEGEND = (
    "Spread: standard deviation between replicates, with its 95% chi-square interval; apart from items: what would be "
    "left with infinitely many documents or prompts. Detectable: the smallest true difference that so many runs an "
    f"arm show with probability {POWER:.0%} (two-sided t test at 5%), unpaired for an arm, paired for two. Losses in "
    "nats, scores in points."
)


def noise_table(groups: Sequence[Replicates], seeds: Sequence[int], difference: float | None = None) -> pd.DataFrame:
    """A row for each arm and each pair of arms, number and kind of replicate; ``against`` is empty for an arm.

    Args:
        groups: of :func:`ropewalk.report.noise.replicates.find_replicates`.
        seeds: runs an arm for which ``detectable_<n>`` is given.
        difference: fills the column ``seeds_to_decide`` of pairs.

    Returns:
        The columns ``COLUMNS``, then those. value: the mean over runs, or of the differences, with its 95% t interval.
        spread: of the runs, or of the differences run by run; unpaired_spread: of a difference of runs that share
        nothing; correlation: of the arms over replicates. items, seed_sd, item_sd, rest_sd: the variance components.
    """
    rows = [row for group in groups for row in _arm_rows(group, seeds)]
    for first, second in combinations(groups, 2):
        if (first.kind, first.context) == (second.kind, second.context):
            rows += _pair_rows(first, second, seeds, difference)
    # Lengths that two test-time settings have in common are in the groups of both.
    of_number = ["replicated", "arm", "against", *NUMBER]
    more = [f"detectable_{count}" for count in seeds] + ["seeds_to_decide"] * (difference is not None)
    return pd.DataFrame(rows, columns=[*COLUMNS, *more]).drop_duplicates(of_number, ignore_index=True)


def _arm_rows(group: Replicates, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    about = {"replicated": group.kind, "arm": group.arm, "against": ""}
    for number, values in _numbers(group).items():
        row, of_run = dict(zip(NUMBER, number, strict=True)), [value for value, _ in values.values()]
        items = pd.DataFrame([by_item for _, by_item in values.values() if by_item is not None])
        yield about | row | _columns(of_run, items if len(items) == len(values) else None, seeds, paired=False)


def _pair_rows(
    first: Replicates, second: Replicates, seeds: Sequence[int], difference: float | None
) -> Iterator[dict[str, Any]]:
    about = {"replicated": first.kind, "arm": second.arm, "against": first.arm}
    reference = _numbers(first)
    for number, values in _numbers(second).items():
        shared = [key for key in values if key in reference.get(number, {})]
        if len(shared) < 2:
            continue
        own, other = ([side[key][0] for key in shared] for side in (values, reference[number]))
        by_item = [(values[key][1], reference[number][key][1]) for key in shared]
        items = [a - b for a, b in by_item if a is not None and b is not None]
        row = _columns(
            [a - b for a, b in zip(own, other, strict=True)],
            pd.DataFrame(items) if len(items) == len(shared) else None,
            seeds,
            paired=True,
        )
        row |= {
            "unpaired_spread": math.hypot(spread(own).value, spread(other).value),
            "correlation": correlation(own, other),
        }
        if difference is not None:
            row["seeds_to_decide"] = seeds_to_decide(row["spread"], difference)
        yield about | dict(zip(NUMBER, number, strict=True)) | row


def _numbers(group: Replicates) -> dict[tuple[Any, ...], dict[str, tuple[float, pd.Series | None]]]:
    """Number -> value of what differs -> the number of that run and its items; those of two runs or more."""
    by_number: dict[tuple[Any, ...], dict[str, tuple[float, pd.Series | None]]] = {}
    for key, run in group.runs.items():
        for row in numbers_of(run).to_dict("records"):
            number = tuple(None if pd.isna(row[name]) else row[name] for name in NUMBER)
            by_number.setdefault(number, {})[key] = (float(row["value"]), item_values(run, row))
    return {number: values for number, values in by_number.items() if len(values) > 1}


def _columns(
    values: Sequence[float], items: pd.DataFrame | None, seeds: Sequence[int], *, paired: bool
) -> dict[str, Any]:
    mean, apart = mean_over_seeds(values), spread(values)
    # Items that some run lacks are in no run's mean here.
    table = None if items is None else items.dropna(axis="columns")
    parts = None if table is None else variance_components(table)
    return {
        "runs": mean.n, "value": mean.value, "ci_low": mean.low, "ci_high": mean.high,
        "spread": apart.value, "spread_low": apart.low, "spread_high": apart.high,
        "unpaired_spread": math.nan, "correlation": math.nan,
        "items": 0 if table is None else table.shape[1],
        "seed_sd": parts.seeds if parts else math.nan,
        "item_sd": parts.items if parts else math.nan,
        "rest_sd": parts.rest if parts else math.nan,
        **{f"detectable_{count}": detectable_difference(apart.value, count, paired=paired) for count in seeds},
    }  # fmt: skip


def noise_section(table: pd.DataFrame) -> Section:
    """The table as a section of the report, and on a terminal: a block for each kind, arm and pair."""
    detectable = [name for name in table.columns if name.startswith("detectable_")]
    columns = ["mean, 95% interval", "spread, 95% interval", "apart from items", "unpaired spread", "correlation"]
    columns += [f"detectable by {name.partition('_')[2]}" for name in detectable]
    columns += ["seeds to decide"] if "seeds_to_decide" in table else []
    blocks = []
    for (kind, arm, against), rows in table.groupby(["replicated", "arm", "against"], sort=False):
        runs = " to ".join(map(str, dict.fromkeys((rows["runs"].min(), rows["runs"].max()))))
        name = f"{arm} less {against}, paired" if against else arm
        blocks.append(
            Block(
                f"{name}: {runs} runs that differ in their {kind.replace('_', ' ')}",
                [(_name(row), _cells(row, detectable)) for row in rows.to_dict("records")],
            )
        )
    return Section("Noise between runs", LEGEND, columns, blocks, "number", on_terminal=True)


def noise_among(runs: Sequence[Run]) -> Section | None:
    """The noise floor of a report's runs: losses and needles, the other harnesses folded; None without replicates."""
    groups = replicates_among(runs)
    if not groups:
        return None
    table = noise_table(groups, SEEDS)
    own, others = (
        noise_section(table[is_own]) for is_own in (table["harness"] == OWN_HARNESS, table["harness"] != OWN_HARNESS)
    )
    return replace(own, folded=others.blocks, on_terminal=False)


def write_noise(table: pd.DataFrame, output: Path) -> None:
    """Write noise.csv and noise.json, null where a number is not known."""
    output.mkdir(parents=True, exist_ok=True)
    replace_atomically(output / "noise.csv", lambda path: table.to_csv(path, index=False))
    records = json.loads(table.to_json(orient="records", double_precision=15))
    write_atomically(output / "noise.json", json.dumps(records, indent=2) + "\n")


def _name(row: dict[str, Any]) -> str:
    length = "" if pd.isna(row["context_length"]) else f" at {int(row['context_length']):,}"
    scaling = "" if row["test_time_scaling"] in ("none", None) else f", {row['test_time_scaling']}"
    return f"{row['task']} {row['metric']}{length}{scaling}"


def _cells(row: dict[str, Any], detectable: Sequence[str]) -> list[Cell]:
    digits, is_difference = (4 if is_loss(row["metric"]) else 2), bool(row["against"])

    def number(value: float, low: float = math.nan, high: float = math.nan, *, signed: bool = False) -> Cell:
        if math.isnan(value):
            return Cell()
        form = f"{'+' if signed else ''}.{digits}f"
        return Cell(f"{value:{form}}", "" if math.isnan(low) else f"[{low:{form}}, {high:{form}}]")

    parts = f"items {row['item_sd']:.{digits}f}, rest {row['rest_sd']:.{digits}f}, {row['items']} items"
    apart = Cell() if math.isnan(row["seed_sd"]) else Cell(f"{row['seed_sd']:.{digits}f}", hint=parts)
    cells = [
        number(row["value"], row["ci_low"], row["ci_high"], signed=is_difference),
        number(row["spread"], row["spread_low"], row["spread_high"]),
        apart,
        number(row["unpaired_spread"]),
        Cell() if math.isnan(row["correlation"]) else Cell(f"{row['correlation']:+.2f}"),
        *(number(row[name]) for name in detectable),
    ]
    if "seeds_to_decide" in row:
        needed = row["seeds_to_decide"]
        cells.append(Cell(f"{int(needed)}" if not pd.isna(needed) else "more" if is_difference else "-"))
    return cells
