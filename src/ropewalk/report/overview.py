"""All runs at one glance, the limits of their numbers, and every configuration key in which they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from ropewalk.evaluation.bootstrap import FEW_DOCUMENTS
from ropewalk.figures.needle_grid import EXACT_MATCH
from ropewalk.figures.style import amount
from ropewalk.figures.training_curves import final_mean
from ropewalk.report.results_section import (
    accuracy_cell,
    difference_cell,
    loss_cell,
    order_by_loss,
    shared_lengths,
    trained_cell,
)
from ropewalk.report.runs import Run, of_text, once
from ropewalk.report.section import EMPTY, UNKNOWN_NOISE, Cell, Section, block_of
from ropewalk.report.seeds import GROUPS_WITHOUT_EFFECT, WITHOUT_EFFECT, Arm, arm_of, arms, why_apart
from ropewalk.runs.record import in_notation

ALWAYS_DIFFERENT = ("run_name", "run_dir")
UNKNOWN = "not recorded"
BOS = {True: "yes", False: "no", None: UNKNOWN}
HASH_DIGITS = 12
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the logged steps, at which a summary gives the loss
ONCE = ("seeds", "steps", "trained at", "documents")  # columns of the opening that stand once where all are alike


def runs_section(runs: list[Run], baseline: Run) -> Section:
    """Chain, lengths, provenance, throughput and export check of each run, and the keys in which they differ."""
    runs = once(runs)
    rows = [(name, _once_if_shared([Cell(describe(run)) for run in runs])) for name, describe in FACTS.items()]
    blocks = [
        *block_of("", rows),
        *block_of("Configuration differences; ≠, bold: not the baseline's value", config_differences(runs, baseline)),
    ]
    missing = [f"{run.name}: no config.yaml, so its configuration is not compared." for run in runs if not run.config]
    legend = (
        f"Baseline: {baseline.label}. Of the configuration, keys that differ are listed, save run_name and run_dir."
    )
    columns = [f"{run.name} (base)" if run.is_base else run.name for run in runs]
    return Section("Runs", legend, columns, blocks, "run", missing=missing)


def config_differences(runs: list[Run], baseline: Run) -> list[tuple[str, list[Cell]]]:
    """The configuration keys whose values are not the same in all runs that have a config.yaml, a cell for each run.

    A value is marked if it is not the baseline's and may change what is trained. run_name and run_dir name the run and
    are left out.
    """
    with_config = [run for run in runs if run.config]
    reference = baseline if baseline.config else with_config[0] if with_config else baseline
    rows = []
    for key in sorted({key for run in with_config for key in run.config} - set(ALWAYS_DIFFERENT)):
        matters = not key.startswith(GROUPS_WITHOUT_EFFECT)
        if len({_value(run, key) for run in with_config}) > 1:
            marked = [matters and bool(run.config) and _value(run, key) != _value(reference, key) for run in runs]
            cells = [Cell("≠ " * mark + _value(run, key), marked=mark) for run, mark in zip(runs, marked, strict=True)]
            rows.append((key, cells))
    return rows


def _once_if_shared(cells: list[Cell]) -> list[Cell]:
    """One cell for a whole row of equal ones."""
    return [replace(cells[0], detail="(all runs)")] if len(cells) > 1 and len(set(cells)) == 1 else cells


def _value(run: Run, key: str) -> str:
    if not run.config:
        return UNKNOWN
    return _text(in_notation(key, run.config[key])) if key in run.config else "no such key"


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


FACTS: dict[str, Callable[[Run], str]] = {  # name of a row -> its value for a run
    "chain": lambda run: _text(run.record.get("chain") or _first_chain(run)),
    "chain sha256": lambda run: _hash(run.record.get("chain_sha256")),
    "theta of the base model": lambda run: _text(run.record.get("theta")),
    "theta in force": lambda run: _text(run.record.get("rope_theta")),
    "pretrained length": lambda run: _count(run.pretrained_length),
    "trained length": lambda run: _count(run.trained_length),
    "parameters": lambda run: amount(run.record["parameters"]) if "parameters" in run.record else UNKNOWN,
    "tokens trained": lambda run: amount(run.metrics["tokens"].iloc[-1]) if len(run.metrics) else UNKNOWN,
    "throughput": _throughput,
    "processes": lambda run: _text(run.record.get("world_size")),
    "documents begin with BOS": lambda run: BOS[run.begins_with_bos],
    "store fingerprint": lambda run: _hash(run.record.get("store_fingerprint")),
    "git commit": lambda run: _commit(run.record.get("git_commit")),
    "versions": lambda run: ", ".join(f"{k} {v}" for k, v in run.record.get("versions", {}).items()) or UNKNOWN,
    "export": _export,
}
LEGEND = (
    "Loss over the second half of the context, nats per token, 95% interval over documents; differences paired by "
    "document, exploratory. Shaded: past the trained length."
)
NEEDLE = "Needle, in text or in videos: exact match over the grid, in brackets against shuffled answers."
DOCUMENTS = (
    "Intervals come from resampling the held-out documents: they hold for these very checkpoints and this choice of "
    f"text. They are not training noise. With fewer than {FEW_DOCUMENTS} documents the intervals themselves are rough."
)
ONE_SEED = (
    f"{UNKNOWN_NOISE.capitalize()} for an arm of one seed: a second seed of it could differ by as much as two arms "
    "differ here, however narrow the intervals."
)
SEEDS = "Differences between arms that are not clearly larger than those between seeds of an arm are training noise."
SCALE = "Nothing here says that the order of methods is the same at another model size, length or amount of training."
CONFOUNDED = "A run that also differs in other settings shows the method and those settings together."
NOT_TRAINED = "None of these runs was trained here, so nothing is known of training noise."


def opening_section(runs: list[Run], baseline: Run) -> Section:
    """A row for each run: arm, steps, training loss, losses and differences at two lengths, needle, other settings.

    The lengths are the baseline's trained one, where all runs were evaluated there, and the longest they share. What is
    the same for all runs stands once, under the table.
    """
    all_arms, shared, others = arms(runs), shared_lengths(runs), other_settings(runs, baseline)
    lengths = list(dict.fromkeys([*(n for n in shared if n == baseline.trained_length), *shared[-1:]]))
    described: dict[str, Callable[[Run], Cell]] = {
        "arm": lambda run: Cell(arm_of(run, all_arms).name.removesuffix(f", {run.test_time}")),
        "seeds": lambda run: _seeds(arm_of(run, all_arms)),
        "steps": _steps,
        "training loss": _training_loss,
    }
    for length in lengths:
        described[f"loss at {length:,}"] = partial(loss_cell, length=length)
        described[f"difference to {baseline.label} at {length:,}"] = partial(_difference, baseline, all_arms, length)
    described |= {
        "needle": lambda run: accuracy_cell(run, EXACT_MATCH),
        "needle in videos": lambda run: accuracy_cell(run, EXACT_MATCH, task="vniah_content"),
        "trained at": trained_cell,
        "documents": _documents,
        "other settings than the baseline's": lambda run: Cell(", ".join(others[run.name]) or EMPTY),
    }
    ordered = order_by_loss(runs)
    columns = {head: [describe(run) for run in ordered] for head, describe in described.items()}
    alike = {head: _shared(cells) for head, cells in columns.items() if head in ONCE}
    shown = {
        head: cells
        for head, cells in columns.items()
        if not alike.get(head) and any(cell.main != EMPTY for cell in cells)
    }
    if all(len(arm.runs) == 1 for arm in all_arms):
        del shown["arm"]
    rows = [
        (f"{run.name} (base)" if run.is_base else run.name, [cells[i] for cells in shown.values()])
        for i, run in enumerate(ordered)
    ]
    words = "; ".join(f"{head} {value}" for head, value in alike.items() if value)
    missing = [] if shared or not of_text(runs) else ["The runs share no context length, so no loss stands here."]
    missing += [*why_apart(arms(once(runs))), *_bos_apart(once(runs))]
    sentences = {
        LEGEND: bool(shared),
        NEEDLE: any(head.startswith("needle") for head in shown),
        f"The same for all runs that have it: {words}.": bool(words),
        f"Names are without {baseline.folder} at their front.": bool(baseline.folder),
    }
    legend = " ".join(sentence for sentence, is_meant in sentences.items() if is_meant)
    return Section("At a glance", legend, list(shown), block_of("", rows), "run", missing=missing)


def _bos_apart(runs: list[Run]) -> list[str]:
    """A sentence where documents begin with BOS in some runs alone."""
    names = {begins: ", ".join(run.name for run in runs if run.begins_with_bos is begins) for begins in (True, False)}
    if not all(names.values()):
        return []
    return [f"Documents and prompts begin with BOS in {names[True]}, and not in {names[False]}: the tokens are others."]


def _shared(cells: list[Cell]) -> str:
    """The number that all cells with any have in common; "": they differ, or there is one."""
    known = {cell.main for cell in cells} - {EMPTY}
    return known.pop() if len(known) == 1 and len(cells) > 1 else ""


def _difference(baseline: Run, all_arms: list[Arm], length: int, run: Run) -> Cell:
    if run.is_same(baseline):
        return Cell("baseline", beyond=run.is_beyond(length))
    return difference_cell(run, baseline, all_arms, length)


def _steps(run: Run) -> Cell:
    """Steps done of those planned."""
    if not len(run.metrics):
        return Cell()
    planned = run.config.get("trainer.max_steps")
    return Cell(f"{int(run.metrics['step'].max()):,}" + (f" of {int(planned):,}" if planned else ""))


def _training_loss(run: Run) -> Cell:
    if not len(run.metrics):
        return Cell()
    return Cell(f"{final_mean(run.metrics, 'loss'):.3f}", hint="mean of the last tenth of the logged steps")


def _seeds(arm: Arm) -> Cell:
    return Cell(str(arm.seeds)) if arm.is_trained else Cell()


def _documents(run: Run) -> Cell:
    counts = sorted({int(n) for n in run.task("loss_at_length", "nll")["n"]})
    return Cell(" to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))) if counts else Cell()


def training_summary(runs: list[Run]) -> Section | None:
    """How far each run is and how its loss went, for a terminal; None where no run has a metrics.jsonl.

    It reads a run that is still training as well.
    """
    trained = [run for run in once(runs) if len(run.metrics)]
    if not trained:
        return None
    rows = [(run.name, [_steps(run), *_progress(run.metrics)]) for run in trained]
    columns = ["steps", "tokens", *(f"loss at {share:.0%}" for share in SHARES[:-1]), "loss now"]
    columns += ["gradient norm", "tokens/s", "refused"]
    legend = "Loss: mean of the last tenth of the steps logged until then, nats per token; shares are of these steps."
    return Section("Training", legend, columns, block_of("Training so far", rows), "run")


def _progress(metrics: pd.DataFrame) -> list[Cell]:
    last = metrics.iloc[-1]
    cells = [Cell(amount(last["tokens"]))]
    for share in SHARES:
        until = metrics.iloc[: max(1, round(share * len(metrics)))]
        cells.append(Cell(f"{final_mean(until, 'loss'):.3f}"))
    norm, refused = last.get("grad_norm", float("nan")), last.get("refused_steps", 0)
    return [*cells, Cell(f"{norm:.3g}"), Cell(amount(metrics["tokens_per_second"].median())), Cell(f"{refused:.0f}")]


def other_settings(runs: list[Run], baseline: Run) -> dict[str, list[str]]:
    """Run -> configuration keys besides method and seed in which it differs from the baseline.

    The base, which differs by nature, has none.
    """
    free, trained = ("rope.", *GROUPS_WITHOUT_EFFECT), once(runs)
    rows = config_differences(trained, baseline)
    rows = [(key, cells) for key, cells in rows if not key.startswith(free) and key not in WITHOUT_EFFECT]
    keys = {run.label: [key for key, cells in rows if cells[i].marked] for i, run in enumerate(trained)}
    return {run.name: [] if run.is_base else keys[run.label] for run in runs}


def limits(runs: list[Run], baseline: Run) -> list[str]:
    """Limits of the numbers, one paragraph each."""
    trained = [arm for arm in arms(runs) if arm.is_trained]
    words = [DOCUMENTS] if any(len(run.task("loss_at_length", "nll")) for run in runs) else []
    words += [] if trained else [NOT_TRAINED]
    words += [SEEDS] if any(arm.seeds > 1 for arm in trained) else []
    words += [ONE_SEED] if any(arm.seeds == 1 for arm in trained) else []
    words += [CONFOUNDED] if any(other_settings(runs, baseline).values()) else []
    return [*words, SCALE]
