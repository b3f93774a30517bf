"""How trained runs respond to the clip: a metric of their evaluations against the number of clipped pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ropewalk.analysis.figures.style import DASHES, label, method_styles, tokens
from ropewalk.errors import UserError
from ropewalk.rope import RopeChain
from ropewalk.runs.directory import RunDirectory

METRICS = {
    ("loss_at_length", "nll"): ("trained runs: loss", "nats per token"),
    ("needle_at_length", "exact_match"): ("trained runs: needle, exact match", "share of the prompts"),
}
COLUMNS = ["run", "family", "clip", "task", "metric", "context_length", "value", "ci_low", "ci_high"]
UNCLIPPED = ""
DEFAULTS = ("raised_cosine", "index")  # of cope: left out of a family's name


def read_responses(directories: Sequence[str]) -> pd.DataFrame:
    """Losses and needle accuracies of runs that differ in their clip.

    A run counts if its chain, apart from abf, is empty (a clip of 0, which every family shares) or one cope or
    hardclip. Evaluation at longer inputs may add test-time methods; the clip is that of training.

    Args:
        directories: run directories with an ``evaluation``, or what evaluate.py wrote itself.

    Returns:
        One row for each run, metric and context length: run, family (method with its window, "" without a clip), clip
        (pairs), task, metric, context_length (tokens), value, ci_low, ci_high. ``attrs["note"]`` says in words which
        runs were left out.

    Raises:
        UserError: where a directory holds no finished evaluation, or no run has a clip.
    """
    # late: torch, for which the other figures need not wait
    from ropewalk.evaluation.results import as_shares, read_evaluations

    rows, left_out = [], []
    for directory in map(Path, directories):
        evaluations = read_evaluations(directory)
        if not evaluations.record:
            raise UserError(f"results: {directory} holds no finished evaluation; scripts/evaluate.py writes one")
        results = as_shares(evaluations.results)
        chain = RopeChain.parse(_trained_chain(directory, evaluations.record))
        family = family_and_clip(chain)
        if family is None:
            left_out.append(f"{directory.name} ({chain})")
            continue
        wanted = pd.MultiIndex.from_frame(results[["task", "metric"]]).isin(list(METRICS))
        rows.append(results[wanted].assign(family=family[0], clip=family[1])[COLUMNS])
    found = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=COLUMNS)
    if not (found["clip"] > 0).any():
        raise UserError(
            f"results={list(directories)} holds no evaluated run with a cope or hardclip chain; name such runs, or "
            "leave results empty"
        )
    note = f"{found['run'].nunique()} trained runs with 95% intervals."
    note += " What has no clip begins every line." if (found["clip"] == 0).any() else ""
    found.attrs["note"] = note + (f" Left out, no plain clip: {', '.join(left_out)}." if left_out else "")
    return found


def family_and_clip(chain: RopeChain) -> tuple[str, int] | None:
    """``("cope", 20)``, ``("cope, kaiser", 20)``, ``("", 0)`` without a clip; None for a chain that does anything else.

    The base may differ: abf is not looked at.
    """
    steps = [dict(step) for step in chain.to_list() if step["method"] != "abf"]
    if not steps:
        return UNCLIPPED, 0
    if len(steps) > 1 or steps[0]["method"] not in ("cope", "hardclip") or not isinstance(steps[0]["clip"], int):
        return None
    step = steps[0]
    options = [step[name] for name in ("window", "taper_domain") if step.get(name) not in (None, *DEFAULTS)]
    return ", ".join([step["method"], *options]), step["clip"]


def _trained_chain(directory: Path, evaluation: Mapping[str, Any]) -> str:
    record = RunDirectory(directory).record
    if record.is_file():
        chain = json.loads(record.read_text(encoding="utf-8")).get("chain")
        if isinstance(chain, str):
            return chain
    return str(evaluation["settings"][0]["chain"])


def panels_of(responses: pd.DataFrame) -> list[tuple[str, str]]:
    """The metrics that the runs have, as (task, metric)."""
    has = set(zip(responses["task"], responses["metric"], strict=True))
    return [key for key in METRICS if key in has]


def draw_response(axes: Axes, responses: pd.DataFrame, task: str, metric: str, train_length: int) -> None:
    """One metric against the clip, a line for each family at the longest length in training and the longest of all."""
    rows = responses[(responses["task"] == task) & (responses["metric"] == metric)]
    lengths = np.array(sorted(rows["context_length"].astype(int).unique()))
    chosen = sorted({int(lengths[lengths <= train_length].max(initial=lengths[0])), int(lengths[-1])})
    families = sorted(set(responses["family"]) - {UNCLIPPED})
    styles = method_styles(families)
    for family in families:
        for length, dash in zip(chosen, DASHES, strict=False):
            line = rows[(rows["context_length"] == length) & rows["family"].isin([family, UNCLIPPED])]
            line = line.sort_values(["clip", "value"])
            bars = np.maximum([line["value"] - line["ci_low"], line["ci_high"] - line["value"]], 0)
            axes.errorbar(
                line["clip"], line["value"], yerr=bars, color=styles[family].color, linestyle=dash,
                marker=styles[family].marker, markersize=4.5, linewidth=1.5, elinewidth=1, capsize=2.5,
                label=label(f"{family}, {tokens(length)}"),
            )  # fmt: skip
    title, unit = METRICS[task, metric]
    axes.set_title(title)
    axes.set_xlabel("clip (pairs)")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.legend(loc="best", fontsize=8, handlelength=3.5)
