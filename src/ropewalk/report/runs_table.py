"""The runs table: chains, lengths, provenance, and every configuration key in which the runs differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ropewalk.figures.style import amount
from ropewalk.report.runs import Run
from ropewalk.report.seeds import GROUPS_WITHOUT_EFFECT

ALWAYS_DIFFERENT = ("run_name", "run_dir")
UNKNOWN = "not recorded"
HASH_DIGITS = 12


@dataclass(frozen=True)
class PropertyRow:
    """One property of every run: (value, whether it is marked) in the order of the runs."""

    name: str
    cells: list[tuple[str, bool]]


def facts(runs: list[Run]) -> list[PropertyRow]:
    """Chain, lengths, provenance, throughput and export verification."""
    described: dict[str, Callable[[Run], str]] = {
        "chain": lambda run: _text(run.record.get("chain") or _first_chain(run)),
        "chain sha256": lambda run: _hash(run.record.get("chain_sha256")),
        "base theta": lambda run: _text(run.record.get("theta")),
        "pretrained length": lambda run: _count(run.pretrained_length),
        "trained length": lambda run: _count(run.trained_length),
        "parameters": lambda run: amount(run.record["parameters"]) if "parameters" in run.record else UNKNOWN,
        "tokens trained": lambda run: amount(run.metrics["tokens"].iloc[-1]) if len(run.metrics) else UNKNOWN,
        "throughput": _throughput,
        "processes": lambda run: _text(run.record.get("world_size")),
        "store fingerprint": lambda run: _hash(run.record.get("store_fingerprint")),
        "git commit": lambda run: _commit(run.record.get("git_commit")),
        "versions": lambda run: ", ".join(f"{k} {v}" for k, v in run.record.get("versions", {}).items()) or UNKNOWN,
        "export": _export,
    }
    return [PropertyRow(name, [(describe(run), False) for run in runs]) for name, describe in described.items()]


def differences(runs: list[Run], baseline: Run) -> list[PropertyRow]:
    """The configuration keys whose values are not the same in all runs that have a config.yaml.

    A value is marked if it is not the baseline's and may change what is trained. run_name and run_dir name the run and
    are left out.
    """
    with_config = [run for run in runs if run.config]
    reference = baseline if baseline.config else with_config[0] if with_config else baseline
    rows = []
    for key in sorted({key for run in with_config for key in run.config} - set(ALWAYS_DIFFERENT)):
        matters = not key.startswith(GROUPS_WITHOUT_EFFECT)
        values = [_value(run, key) for run in with_config]
        if any(value != values[0] for value in values):
            cells = [
                (_value(run, key), matters and bool(run.config) and _value(run, key) != _value(reference, key))
                for run in runs
            ]
            rows.append(PropertyRow(key, cells))
    return rows


def _value(run: Run, key: str) -> str:
    if not run.config:
        return UNKNOWN
    return _text(run.config[key]) if key in run.config else "no such key"


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, list):
        return " > ".join(_text(item) for item in value) or "(empty)"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _hash(value: str | None) -> str:
    return value[:HASH_DIGITS] if value else UNKNOWN


def _commit(value: str | None) -> str:
    """A commit's first digits, with the mark that the working tree held changes beside it."""
    commit, mark, changes = (value or "").partition("+")
    return _hash(commit) + mark + changes


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,} tokens"


def _first_chain(run: Run) -> str | None:
    return None if run.results.empty else str(run.results["chain"].iloc[0])


def _throughput(run: Run) -> str:
    if not len(run.metrics):
        return UNKNOWN
    return f"{amount(run.metrics['tokens_per_second'].median())} tokens/s (median step)"


def _export(run: Run) -> str:
    check = run.verification
    if not check:
        return "not verified"
    verdict = "passed" if check.get("passed") else "FAILED"
    return (
        f"{verdict}: largest logit difference {check.get('max_abs_difference', float('nan')):.2g} "
        f"(logit std {check.get('logit_std', float('nan')):.2g}, {check.get('tokens', 0):,} tokens)"
    )
