"""Decisions of the primary family, as it was declared before the runs; everything else in a report is exploratory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from omegaconf import OmegaConf

from ropewalk.config.train import PrimaryConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.results import is_whole_score
from ropewalk.figures.style import interval
from ropewalk.report.noise.seed_statistics import (
    ALPHA,
    EQUIVALENCE_CONFIDENCE,
    Interval,
    holm,
    is_equivalent,
    mean_over_seeds,
    seeds_to_decide,
    sign_flip_p,
    smallest_p,
    spread,
)
from ropewalk.report.runs import Run, once
from ropewalk.report.section import Cell, Section, block_of
from ropewalk.report.seeds import PRIMARY, SEED, Arm, arms

DECIDED, NO_DIFFERENCE, UNDECIDED = "decided", "no difference", "undecided"
NOT_FINITE = "not a number"
DECISION_COLUMNS = [
    "mean difference, 90% interval", "paired seeds", "p", "p by Holm", "answer", "seeds it would take"
]  # fmt: skip
LEGEND = (
    f"Decided: exact sign-flip test over paired seeds, Holm over the family, adjusted p below {ALPHA:g}, and the mean "
    "at least the declared difference. No difference: the 90% interval lies inside plus and minus it. The family was "
    "declared before the runs; whatever else this page compares is exploratory."
)


@dataclass(frozen=True)
class Decision:
    """The answer for one pair.

    Attributes:
        verdict: one of the words above.
        mean: difference of the arms, with the 90% interval over seeds.
        p_value: of the exact sign-flip test; 1 without a common seed.
        adjusted: by Holm, over all pairs of the family.
        seeds_needed: paired seeds for either answer at a power of 80%; None: unknown, or too many to name.
    """

    verdict: str
    mean: Interval
    p_value: float
    adjusted: float
    seeds_needed: int | None


def decide(differences: Sequence[ArrayLike], difference: float) -> list[Decision]:
    """The answer for each pair of a family.

    Args:
        differences: for each pair, (seeds,) the arm less the one it is compared with, seed by seed; empty: not run.
        difference: the smallest of interest.
    """
    samples = [np.asarray(sample, np.float64) for sample in differences]
    p_values = [sign_flip_p(sample) if sample.size and np.isfinite(sample).all() else 1.0 for sample in samples]
    return [
        _decision(sample, difference, p_value, adjusted, len(samples))
        for sample, p_value, adjusted in zip(samples, p_values, holm(p_values), strict=True)
    ]


def _decision(sample: np.ndarray, difference: float, p_value: float, adjusted: float, family: int) -> Decision:
    if not sample.size:
        return Decision(UNDECIDED, Interval(math.nan, math.nan, math.nan, 0), p_value, adjusted, fewest_seeds(family))
    mean = mean_over_seeds(sample, EQUIVALENCE_CONFIDENCE)
    if not np.isfinite(sample).all():
        return Decision(NOT_FINITE, mean, p_value, adjusted, None)
    if adjusted < ALPHA and abs(mean.value) >= difference:
        return Decision(DECIDED, mean, p_value, adjusted, None)
    if is_equivalent(sample, difference):
        return Decision(NO_DIFFERENCE, mean, p_value, adjusted, None)
    needed = fewest_seeds(family) if mean.n < 2 else seeds_to_decide(spread(sample).value, difference, family)
    return Decision(UNDECIDED, mean, p_value, adjusted, needed)


def fewest_seeds(family: int) -> int:
    """The fewest paired seeds with which the exact test can pass in a family of so many pairs."""
    return next(seeds for seeds in count(1) if smallest_p(seeds) * family < ALPHA)


def declared_families(runs: Sequence[Run]) -> list[tuple[PrimaryConfig, list[Run]]]:
    """Each family that trained runs declared, with the runs that did before their first step."""
    families: dict[str, tuple[PrimaryConfig, list[Run]]] = {}
    for run in runs:
        keys = {key.removeprefix(PRIMARY): value for key, value in run.config.items() if key.startswith(PRIMARY)}
        family = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PrimaryConfig), keys))
        assert isinstance(family, PrimaryConfig)
        if family.pairs and not run.is_base:
            of_family = families.setdefault(str(family), (family, []))[1]
            of_family += [] if _later_declarations(run) else [run]
    return list(families.values())


def decision_section(runs: list[Run]) -> Section | None:
    """Every family that the runs declared, a row for each pair; None if they declared none.

    Raises:
        UserError: from :func:`family_numbers`, or for two arms of one name.
    """
    blocks, missing = [], []
    for family, of_family in declared_families(runs):
        assert family.difference is not None
        trained = arms([run.whole for run in once(of_family)])
        samples = [paired_numbers(_arm(trained, pair[0]), _arm(trained, pair[1]), family) for pair in family.pairs]
        answers = decide(samples, family.difference)
        rows = [
            (" less ".join(pair), decision_cells(answer)) for pair, answer in zip(family.pairs, answers, strict=True)
        ]
        blocks += block_of(f"{_words(family)}, smallest difference of interest {family.difference:g}", rows)
        missing += _too_few(answers) + _undeclared(family, [run for run in runs if run not in of_family])
    return (
        Section("Decisions", LEGEND, DECISION_COLUMNS, blocks, "pair", missing=missing, on_terminal=True)
        if blocks
        else None
    )


def _undeclared(family: PrimaryConfig, others: Sequence[Run]) -> list[str]:
    names = {name for pair in family.pairs for name in pair}
    out = {
        run.label: f"{run.label}{_later_declarations(run)}"
        for run in others
        if run.config.get("rope.name") in names and not run.is_base
    }
    return [f"Started without this declaration, so not in it: {', '.join(out.values())}."] if out else []


def _later_declarations(run: Run) -> str:
    """Changes of a run's declaration after its first step, in brackets; "": it kept what it began with."""
    changes = [
        f"from step {accepted['step']} on {'; '.join(accepted['changes'])}"
        for accepted in run.record.get("accepted", [])
        if accepted["entry"] == PRIMARY.rstrip(".")
    ]
    return f" ({'; '.join(changes)})" if changes else ""


def paired_numbers(arm: Arm | None, other: Arm | None, family: PrimaryConfig) -> list[float]:
    """Differences of two arms in the family's number, seed by seed; none where an arm is not among the runs.

    Raises:
        UserError: from :func:`family_numbers`.
    """
    if arm is None or other is None:
        return []
    values, others = family_numbers(arm, family), family_numbers(other, family)
    return [values[seed] - others[seed] for seed in values if seed in others]


def family_numbers(arm: Arm, family: PrimaryConfig) -> dict[str, float]:
    """Seed -> the family's number of an arm, by :func:`seed_numbers`.

    Raises:
        UserError: it was measured under several test-time scalings, and the family names none.
    """
    rows = pd.concat([run.table.assign(seed=str(run.config.get(SEED))) for run in arm.runs], ignore_index=True)
    return seed_numbers(rows[is_whole_score(rows)], family, arm.name)


def seed_numbers(rows: pd.DataFrame, family: PrimaryConfig, arm: str) -> dict[str, float]:
    """Seed -> the family's number; NaN if it is not a number, no entry if it was not measured at every length.

    Args:
        rows: of the results table, with a column ``seed`` (text).
        family: as declared.
        arm: its name, for errors.

    Raises:
        UserError: it was measured under several test-time scalings, and the family names none.
    """
    lengths = lengths_of(family)
    rows = rows[
        (rows["task"] == family.task) & (rows["metric"] == family.metric) & rows["context_length"].isin(lengths)
    ]
    if family.test_time_scaling is not None:
        rows = rows[rows["test_time_scaling"] == family.test_time_scaling]
    if rows["test_time_scaling"].nunique() > 1:
        raise UserError(
            f"{arm} has {_words(family)} under {', '.join(rows['test_time_scaling'].unique())}; a family is one "
            "number a seed: leave evaluations out, or declare primary.test_time_scaling with the next runs"
        )
    by_seed = rows.drop_duplicates(["seed", "context_length"]).groupby("seed", sort=False)["value"]
    return {str(s): float(np.mean(part.to_numpy(float))) for s, part in by_seed if len(part) == len(lengths)}


def lengths_of(family: PrimaryConfig) -> list[int]:
    """The context lengths of the family's number, tokens, each once."""
    lengths = family.length if isinstance(family.length, Sequence) else [family.length]
    return list(dict.fromkeys(lengths))


def _arm(trained: Sequence[Arm], name: str) -> Arm | None:
    named = [arm for arm in trained if name in (arm.name, arm.runs[0].config.get("rope.name"))]
    if len(named) > 1:
        runs = ", ".join(run.name for arm in named for run in arm.runs)
        raise UserError(
            f"primary.pairs names {name}, and the runs {runs} are {len(named)} arms of that name, which differ in more "
            "than their seed; compare the runs of one"
        )
    return named[0] if named else None


def decision_cells(answer: Decision) -> list[Cell]:
    """A row of a table with ``DECISION_COLUMNS``."""
    if not answer.mean.n:
        blank = [Cell() for _ in range(3)]
        return [Cell(hint="no seed is common to both arms"), Cell("0"), *blank, Cell(f"{answer.seeds_needed} or more")]
    mean = Cell(f"{answer.mean.value:+.4f}", interval(answer.mean.low, answer.mean.high, signed=True))
    needed = "" if answer.verdict != UNDECIDED else "more than 10,000"
    if answer.seeds_needed is not None:
        needed = f"{answer.seeds_needed} or more" if answer.mean.n < 2 else str(answer.seeds_needed)
    is_answer = answer.verdict in (DECIDED, NO_DIFFERENCE)
    return [
        mean,
        Cell(str(answer.mean.n)),
        Cell(f"{answer.p_value:.4f}"),
        Cell(f"{answer.adjusted:.4f}"),
        Cell(answer.verdict, marked=is_answer),
        Cell(needed) if needed else Cell(),
    ]


def _too_few(answers: Sequence[Decision]) -> list[str]:
    """The reason why nothing could be decided, where the number of seeds itself forbids it."""
    most, family = max(answer.mean.n for answer in answers), len(answers)
    if smallest_p(most) * family < ALPHA:
        return []
    over = f", {min(1.0, smallest_p(most) * family):.4g} by Holm over {family} pairs" if family > 1 else ""
    return [
        f"With {most} paired seeds the smallest p of the exact test is {smallest_p(most):.4g}{over}: nothing can be "
        f"decided, whatever the numbers; {fewest_seeds(family)} are the fewest."
    ]


def _words(family: PrimaryConfig) -> str:
    *most, last = [f"{n:,}" for n in lengths_of(family)]
    lengths = f", mean of {', '.join(most)} and {last}" if most else f" at {last}"
    scaling = f", test-time scaling {family.test_time_scaling}" if family.test_time_scaling else ""
    return f"{family.task} {family.metric}{lengths} tokens{scaling}"
