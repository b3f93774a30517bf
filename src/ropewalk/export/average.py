"""The average of checkpoints: its members, what they must share, and their mean weights, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ropewalk.config.export import AverageConfig
from ropewalk.errors import UserError
from ropewalk.export.source import Source, committed_checkpoint, trained_source
from ropewalk.files import sha256_of
from ropewalk.model.hf_directory import Weights
from ropewalk.rope.chain import Steps
from ropewalk.runs.directory import MANIFEST, RunDirectory, read_manifest, run_name

# Entries of the contract that members must share: else their weights are of other functions, or began apart.
SHARED = ("position", "base_model", "start_from", "tokenizer")


class AveragedWeights(Weights):
    """The mean of several checkpoints' fp32 weights; a look-up reads that one weight of every member."""

    def __init__(self, members: Sequence[Weights]) -> None:
        """Take members with the same names and shapes.

        Raises:
            UserError: for a member that differs in them.
        """
        self._members = members
        self.shapes, self.dtypes = members[0].shapes, members[0].dtypes
        for member in members[1:]:
            if member.shapes != self.shapes:
                name = next(iter(sorted(set(member.shapes.items()) ^ set(self.shapes.items()))))[0]
                raise UserError(f"average: {name} is not of one shape in all members; average checkpoints of one model")

    def __getitem__(self, name: str) -> Tensor:
        return self.gather(name, torch.float32)

    def gather(self, name: str, dtype: torch.dtype) -> Tensor:
        """The mean of one weight, summed in fp32 in the order of the members, then rounded to ``dtype``."""
        mean = self._members[0].gather(name, torch.float32)
        for member in self._members[1:]:
            mean += member.gather(name, torch.float32)
        return mean.div_(len(self._members)).to(dtype)


def averaged_source(checkpoint: Path, average: AverageConfig, test_time: Steps = ()) -> Source:
    """The mean of the checkpoints that ``average`` names, with test-time steps appended.

    Config, position and tokenizer are the last member's: the newest of a run, and ``checkpoint`` among other runs. All
    members are part of the export's identity.

    Raises:
        UserError: for a member that is not there or is named twice, or members of several chains, models or starts.
    """
    members = members_of(checkpoint, average)
    check_members(members)
    source = trained_source(members[-1], test_time)
    return replace(
        source,
        open=lambda: AveragedWeights([trained_source(member).open() for member in members]),
        identity={**source.identity, "average": [_described(member) for member in members]},
    )


def members_of(checkpoint: Path, average: AverageConfig) -> list[Path]:
    """The committed checkpoints that are averaged: those of a run by their steps, those of others as named.

    Raises:
        UserError: for more than one of the keys, or a checkpoint that is not there or is named twice.
    """
    given = [name for name, value in vars(average).items() if value]
    if len(given) != 1:
        raise UserError(f"average.{' and average.'.join(given)} are set; choose members by one of last, steps and runs")
    run = RunDirectory.of(checkpoint)
    committed = {int(path.name.rpartition("-")[2]): path for path in run.committed_checkpoints()}
    if average.runs:
        members = [*(committed_checkpoint(path) for path in average.runs), checkpoint]
    else:
        steps = sorted(average.steps)
        if average.last is not None:
            steps = [step for step in committed if step <= int(checkpoint.name.rpartition("-")[2])][-average.last :]
        absent = [step for step in steps if step not in committed]
        if absent or (average.last or 0) > len(steps):
            wanted = f"average.last={average.last}" if average.last else f"average.steps={absent}"
            raise UserError(
                f"{wanted}: {run.root} has the checkpoints {', '.join(map(str, committed))}; average those, or keep "
                "more of the next run (trainer.checkpoint_every, trainer.keep_last)"
            )
        members = [committed[step] for step in steps]
    if len({member.resolve() for member in members}) < max(2, len(members)):
        raise UserError(f"average: {', '.join(map(str, members))}: an average is of two or more, each named once")
    return members


def check_members(members: Sequence[Path]) -> None:
    """Raise UserError unless all members have one chain, one base and one tokenizer, and began with the same weights.

    Two runs from random weights did not, and two that share a start did: the mean of those lies in one basin of the
    loss (model soups, arXiv 2203.05482).
    """
    contracts = [_shared(member) for member in members]
    first = contracts[0]
    for member, shared in zip(members, contracts, strict=True):
        different = [name for name in SHARED if shared[name] != first[name]]
        if different:
            name = different[0]
            raise UserError(
                f"average: {member} differs from {members[0]} in {', '.join(different)} ({name} {shared[name]!r}, "
                f"there {first[name]!r}), and a mean of the two is neither; average checkpoints of one chain, model "
                "and start"
            )
    if any("learned" in read_manifest(member).get("state", {}) for member in members):
        raise UserError(
            f"average: the members, {members[0]} the first, have each learned frequencies of their own, and a mean of "
            "weights fits none of them; export one of them"
        )
    runs = {RunDirectory.of(member).root for member in members}
    if len(runs) > 1 and not first["start_from"] and not (first["base_model"] or {}).get("path"):
        raise UserError(
            f"average: {', '.join(map(str, sorted(runs)))} each began with random weights of its own, and their mean "
            "is no model; average checkpoints of one run, or of runs with one start_from.run"
        )


def _shared(checkpoint: Path) -> dict[str, Any]:
    contract = read_manifest(checkpoint).get("contract", {})
    start = contract.get("start_from") or {}
    return {name: contract.get(name) for name in SHARED} | {"start_from": start.get("manifest_sha256")}


def _described(checkpoint: Path) -> dict[str, Any]:
    manifest = read_manifest(checkpoint)
    name = run_name(RunDirectory.of(checkpoint).root)
    return {"run": name, "step": manifest["step"], "manifest_sha256": sha256_of(checkpoint / MANIFEST)}
