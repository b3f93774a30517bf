"""The forward passes behind a run's losses, and which of unlike runs belong side by side.

All context lengths that share a spectrum come from one pass over the documents, to the longest of them; a
pass is known by that length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from ropewalk.report.runs import Run

NONE = "none"
OWN = ""


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
    settings = _settings(run)
    own = _own_setting(run, settings)
    found = []
    for (length, chain), curve in rows.groupby(["context_length", "chain"]):
        setting = settings.get(int(length), chain)
        found.append(Pass(int(length), chain, setting, _kind(setting, own), curve.sort_values("position_start")))
    return found


def _settings(run: Run) -> dict[int, str]:
    """Length of each pass -> its setting, from the evaluation's record, else from the per-document table."""
    recorded = {max(one["lengths"]): str(one["setting"]) for one in run.evaluation.get("settings", [])}
    pairs = run.documents[["context_length", "setting"]].drop_duplicates()
    return recorded or {int(length): str(setting) for length, setting in pairs.itertuples(index=False)}


def _own_setting(run: Run, settings: dict[int, str]) -> str:
    lengths = run.task("loss_at_length", "nll")["context_length"]
    starts_beyond = not lengths.empty and run.is_beyond(int(lengths.min()))
    return NONE if starts_beyond or not settings else settings[min(settings)]


def _kind(setting: str, own: str) -> str:
    steps, own_steps = setting.split(" > "), own.split(" > ")
    if steps[: len(own_steps)] == own_steps:
        steps = steps[len(own_steps) :]
    return re.sub(r"\([^)]*\)", "", " > ".join(steps))
