"""Replicates: runs that differ in their seed, in their data order or in their schedule's horizon, and in nothing else.

Each of the three is measured by itself. What one of them leaves alone is the same in all runs of a group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ropewalk.errors import UserError
from ropewalk.evaluation.results import (
    RECORD,
    evaluation_directories,
    is_loss,
    is_whole_score,
    read_document_losses,
    read_record,
    read_results,
)
from ropewalk.evaluation.results_store import SAMPLES
from ropewalk.files import read_object
from ropewalk.report.differences import second_half
from ropewalk.report.runs import Run
from ropewalk.report.seeds import SEED, settings_of
from ropewalk.runs.directory import RunDirectory

# What is replicated -> the one key that may differ. trainer.seed is the data order's seed, too, unless
# data.order_seed is set.
KINDS = {"seed": SEED, "data_order": "data.order_seed", "horizon": "trainer.max_steps"}
ARM = ("rope.", "chain_sha256")  # keys that make another arm
# Metric of prompts and answers -> its sum in a sample, and what that is divided by.
SAMPLE_COLUMNS = {
    "exact_match": ("exact", None),
    "answer_token_accuracy": ("correct", "tokens"),
    "answer_nll": ("nll", "tokens"),
    "answer_nll_oracle": ("nll_oracle", "tokens"),
    "answer_nll_none": ("nll_none", "tokens"),
}


@dataclass(frozen=True)
class Replicates:
    """Runs of one arm that differ in one thing.

    Attributes:
        kind: seed, data_order or horizon.
        arm: rope.name of the runs.
        context: all other settings; arms that share them are compared.
        runs: value of what differs -> run, in the order given.
    """

    kind: str
    arm: str
    context: str
    runs: Mapping[str, Run]


def find_replicates(runs: Sequence[Run]) -> list[Replicates]:
    """Every group of two or more replicates; a run may be in one of each kind.

    Raises:
        UserError: for a run without a configuration or a number, or one that differs from every other in more than is
            replicated, or in nothing.
    """
    measured = [with_numbers(run) for run in runs]
    settings = {run.name: _settings(run) for run in measured}
    for run in measured:
        if not settings[run.name]:
            raise UserError(f"{run.directory} holds no config.yaml, so it is unknown in what it differs; leave it out")
        if not len(run.table):
            raise UserError(
                f"{run.directory} holds no evaluation; run scripts/evaluate.py on it, or train with evaluation.every "
                "and evaluation.documents"
            )
    _check_different(measured, settings)
    groups = replicates_among(runs)
    replicated = {run.label for group in groups for run in group.runs.values()}  # under one test-time setting at least
    for run in measured:
        if run.label not in replicated:
            raise UserError(_why_alone(run, measured, settings))
    return groups


def replicates_among(runs: Sequence[Run]) -> list[Replicates]:
    """The groups of two or more replicates among runs, whatever else is among them."""
    measured = [run for run in map(with_numbers, runs) if run.config and len(run.table)]
    settings = {run.name: _settings(run) for run in measured}
    groups = []
    for kind, key in KINDS.items():
        for (_, context), members in _grouped(measured, settings, key).items():
            by_value: dict[str, Run] = {}
            for run in members:
                by_value.setdefault(_text(settings[run.name].get(key)), run)
            if len(by_value) > 1:
                groups.append(Replicates(kind, _arm(members[0]), context, by_value))
    return groups


def with_numbers(run: Run) -> Run:
    """The run, with the tables of its last evaluation inside training if it has no other."""
    directories = sorted(RunDirectory(run.directory).evaluations.glob(f"*/{RECORD}"))
    if len(run.table) or not directories:
        return run
    last = directories[-1].parent
    return replace(run, table=read_results(last), documents=read_document_losses(last), evaluation=read_record(last))


def numbers_of(run: Run) -> pd.DataFrame:
    """The run's numbers, one for each task, metric, length and test-time scaling; those never measured left out."""
    table = run.table
    is_number = is_whole_score(table) & (table["n"] > 0) & (table["task"] != "loss_by_position")
    return table[is_number & ~table["metric"].str.endswith("_shuffled")]


def item_values(run: Run, row: Mapping[str, Any]) -> pd.Series | None:
    """The number of ``row`` item by item (documents, prompts), in its unit; None if it was not kept by item."""
    if row["task"] == "loss_at_length":
        sums = second_half(run, int(row["context_length"])).set_index("document")
        return sums["nll_sum"] / sums["tokens"] if len(sums) else None
    columns, samples = SAMPLE_COLUMNS.get(row["metric"]), _samples(run, str(row["source_file"]))
    if columns is None or samples is None or columns[0] not in samples:
        return None
    value, over = columns
    scale = 1 if is_loss(row["metric"]) else 100
    return scale * (samples[value] / samples[over] if over else samples[value].astype(float))


def _samples(run: Run, source_file: str) -> pd.DataFrame | None:
    for directory in evaluation_directories(run.directory):
        path = (directory / source_file).with_suffix(SAMPLES)
        if path.is_file():
            return pd.read_json(path, lines=True)
    return None


def _settings(run: Run) -> dict[str, Any]:
    """Everything recorded that a number of a run depends on, by name; empty without a config.yaml."""
    settings = settings_of(run)
    if not settings:
        return {}
    start = RunDirectory(run.directory).start_record
    evaluation = run.evaluation
    config = evaluation.get("config", {})
    return {
        **settings,
        "test-time setting": run.test_time,
        "steps trained": int(run.metrics["step"].iloc[-1]) if len(run.metrics) else 0,
        "step of the evaluation": evaluation.get("step"),  # of one inside training
        "checkpoint it started from": read_object(start).get("manifest_sha256"),
        "items of the evaluation": [
            evaluation.get("document_prefixes") or [config.get("documents"), config.get("max_documents")],
            [config.get(name) for name in ("lengths", "seed", "needle", "answers")],
        ],
    }


def _grouped(
    runs: Sequence[Run], settings: Mapping[str, Mapping[str, Any]], key: str
) -> dict[tuple[str, str], list[Run]]:
    """Runs by arm and by all other settings but ``key``."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        others = {name: value for name, value in settings[run.name].items() if name != key}
        of_arm = {name: value for name, value in others.items() if name.startswith(ARM)}
        context = {name: value for name, value in others.items() if name not in of_arm}
        groups.setdefault((_text(of_arm), _text(context)), []).append(run)
    return groups


def _check_different(runs: Sequence[Run], settings: Mapping[str, Mapping[str, Any]]) -> None:
    by_settings: dict[str, Run] = {}
    for run in runs:
        same = by_settings.setdefault(_text(settings[run.name]), run)
        if same is not run:
            raise UserError(
                f"{same.name} and {run.name} differ in nothing that was recorded, and a run counted twice hides noise; "
                "leave one out"
            )


def _why_alone(run: Run, runs: Sequence[Run], settings: Mapping[str, Mapping[str, Any]]) -> str:
    def differing(other: Run) -> list[str]:
        names = settings[run.name].keys() | settings[other.name].keys()
        return sorted(n for n in names if settings[run.name].get(n) != settings[other.name].get(n))

    others = [other for other in runs if other is not run]
    if not others:
        return f"runs has {run.name} alone, and one run shows no noise; give two or more that differ in their seed"
    nearest = min(others, key=lambda other: len(differing(other)))
    return (
        f"{run.name} differs from {nearest.name} in {', '.join(differing(nearest))}, and noise is measured between runs"
        f" that differ in one of {', '.join(KINDS.values())} and nothing else; leave it out, or give it replicates"
    )


def _arm(run: Run) -> str:
    return str(run.config.get("rope.name", run.name))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
