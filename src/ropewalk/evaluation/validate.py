"""Validation of a training-free change of the spectrum: ``python scripts/evaluate.py validate``.

Each arm (before, after, and one for each clip of the sweep) is an evaluation of its own below the output, so a
finished one is kept, and ``scripts/compare.py`` reads them all.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.config.evaluation import EvaluateConfig, ValidateConfig
from ropewalk.config.groups import RopeConfig, TestTimeConfig
from ropewalk.config.rules import existing_directory
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import beginning, encode, find_documents
from ropewalk.evaluation.evaluated_checkpoint import Setting, load_tokenizer, open_checkpoint, settings_by_length
from ropewalk.evaluation.harness.held_out import passes_of, read_windows, unfinished_cells, validate_held_out
from ropewalk.evaluation.results import (
    as_shares,
    read_document_losses,
    read_record,
    read_results,
    writable_directory,
    write_table,
)
from ropewalk.evaluation.results_store import ResultsStore
from ropewalk.evaluation.suites import evaluate
from ropewalk.evaluation.validate_report import AFTER, BEFORE, Measured, tables, validation_table
from ropewalk.export import resolve_checkpoint
from ropewalk.files import only_writer, write_atomically
from ropewalk.model.load import read_position
from ropewalk.rope import Position, Spectrum
from ropewalk.rope.advisor import recommended_clip
from ropewalk.rope.chain import clip_of, in_words
from ropewalk.training.distributed import Ranks

FIRST_CLIP = 10
RECORD = "validate.json"
TABLE = "validate"  # .csv and .parquet
UNCHANGED = TestTimeConfig(name="none")


@dataclass(frozen=True)
class Arm:
    """One spectrum and the evaluation that measures it; arms of one spectrum share an evaluation.

    Attributes:
        name: before, after or clip<n>.
        config: of the evaluation.
        settings: which pass serves which context length.
    """

    name: str
    config: EvaluateConfig
    settings: list[Setting]

    @property
    def directory(self) -> Path:
        """Of the evaluation."""
        return Path(self.config.output)

    @property
    def chain(self) -> str:
        """The printed chain, the model's own part included."""
        return str(self.settings[0].chain)

    def measures_as(self, other: Arm) -> bool:
        """True if both rotate alike at every length."""
        return _spectra(self) == _spectra(other)


@dataclass(frozen=True)
class LeftOut:
    """A context length that no document reaches."""

    multiple: int
    length: int  # tokens
    longest_document: str
    longest_tokens: int

    def __str__(self) -> str:
        return (
            f"left out: {self.multiple}x, {self.length:,} tokens; the longest document, "
            f"{self.longest_document!r}, has {self.longest_tokens:,}"
        )


def validate(config: ValidateConfig) -> pd.DataFrame:
    """Compare a model with itself under a changed spectrum and under a sweep of CoPE's clip, without training.

    Writes validate.csv, validate.parquet and, last, validate.json into ``config.output``, beside one directory for
    each arm; prints the tables and the verdicts.

    Returns:
        The tidy table, columns as in :data:`ropewalk.evaluation.validate_report.COLUMNS`.

    Raises:
        UserError: for a wrong configuration, model, chain or document, or an output that holds another validation,
            before a model is loaded.
    """
    _validate_values(config)
    directory = resolve_checkpoint(config.model.path)
    position = read_position(directory)
    clips = _clips_to_sweep(config, position)
    lengths, left_out = _fitting_lengths(config, directory, position.trained_length)
    arms = _make_arms(config, directory, position, lengths, clips)
    with only_writer(Path(config.output), f"output={config.output}"):
        _check_arms(arms)
        print(_announce(config, position, arms, lengths, left_out), flush=True)
        return _run_arms(config, arms, directory, position, left_out)


def _run_arms(
    config: ValidateConfig, arms: Sequence[Arm], directory: Path, position: Position, left_out: Sequence[LeftOut]
) -> pd.DataFrame:
    lengths = arms[0].config.lengths
    for evaluation in {arm.directory: arm.config for arm in arms}.values():
        evaluate(evaluation, Ranks())
    table = validation_table([_measured(arm) for arm in arms], lengths, config.tolerance, config.seed)
    documents = read_record(arms[0].directory)["documents"]
    record = {
        "config": asdict(config),
        "checkpoint": str(directory),
        "trained_length": position.trained_length,
        "lengths": lengths,
        "left_out": [asdict(length) for length in left_out],
        "recommended_clip": recommended_clip(position.spectrum()) if clip_of(position.chain) is None else None,
        "documents": documents,
        "arms": {arm.name: {"evaluation": arm.directory.name, "chain": arm.chain} for arm in arms},
        "short_context": _short_context(table),
    }
    _write(Path(config.output), table, record)
    shown = tables(table, config.tolerance, documents["too_short"])
    print("\n".join(["", shown, "", *map(str, left_out), "", _how_to_draw(config, arms)]), flush=True)
    return table


def sweep_clips(spectrum: Spectrum, clips: Sequence[int] | None) -> list[int]:
    """The clips of the sweep, in the order they are measured.

    None: 10 first (all pairs if there are fewer), then the recommended clip, half of it, and all pairs whose period
    exceeds the trained length; without repeats, and without 1 and 0, which change nothing.

    Raises:
        UserError: for a clip of more pairs than the model has.
    """
    pairs = spectrum.inv_freq.size
    if clips is None:
        recommended = recommended_clip(spectrum)
        beyond = spectrum.pairs_beyond(spectrum.trained_length)
        wanted = [min(FIRST_CLIP, pairs), recommended, math.ceil(recommended / 2), beyond]
        return [clip for clip in dict.fromkeys(wanted) if clip > 1]
    for clip in clips:
        if not 1 <= clip <= pairs:
            raise UserError(f"clips={list(clips)}: {clip} is not within the {pairs} pairs of the model; use 1..{pairs}")
    return list(clips)


def _validate_values(config: ValidateConfig) -> None:
    multiples, clips, needle = config.multiples, config.clips, config.needle
    if not multiples or multiples[0] != 1 or multiples != sorted(set(multiples)):
        raise UserError(
            f"multiples={multiples} must ascend from 1 without repeats: the verdict on short context is measured at 1x "
            "the trained length; try [1,2,4]"
        )
    if clips is not None and len(set(clips)) != len(clips):
        raise UserError(f"clips={clips} must differ; name each clip once")
    if clips == [] and not config.rope.chain:
        raise UserError(
            f"rope={config.rope.name} changes nothing and clips=[] sweeps nothing; name a change (rope=cope10), or "
            "leave clips=null for the sweep"
        )
    if not config.tolerance >= 0:
        raise UserError(f"tolerance={config.tolerance} must be 0 or more nats per token; the default is 0.01")
    samples = config.sweep_samples
    if samples < 0 or min(samples, needle.samples) * len(needle.depths) == 1:
        raise UserError(
            f"sweep_samples={samples} over {len(needle.depths)} depths: the shuffled-answer control needs at least "
            "two prompts of a length; set sweep_samples=2 or more, or 0 for a sweep without the needle"
        )


def _clips_to_sweep(config: ValidateConfig, position: Position) -> list[int]:
    """The clips of the sweep; none on a model that is clipped already, since each would clip what its own has left."""
    own, rope = clip_of(position.chain), config.rope
    position.extended(rope.chain)  # refuses a second clip
    if own is None:
        return sweep_clips(position.spectrum(), config.clips)
    if config.clips:
        raise UserError(
            f"clips={config.clips} would clip model={config.model.path} a second time, after its own {own}; set "
            "clips=[], or validate the checkpoint that was trained without a clip"
        )
    if not rope.chain:
        raise UserError(
            f"model={config.model.path} is clipped already ({own}), so no clip is swept over, and rope={rope.name} "
            "changes nothing; name a change without a clip, such as rope=yarn8"
        )
    return []


def _fitting_lengths(config: ValidateConfig, directory: Path, trained_length: int) -> tuple[list[int], list[LeftOut]]:
    documents = existing_directory("documents", config.documents, "write one with data_prep/prepare.py")
    tokenizer = load_tokenizer(directory)
    begin = len(beginning(tokenizer))
    tokens = {name: begin + len(encode(tokenizer, text)) for name, text in find_documents(documents)}
    name = max(tokens, key=lambda document: tokens[document])
    if tokens[name] < trained_length:
        raise UserError(
            f"documents={documents} has no document of the {trained_length:,} tokens that model={config.model.path} "
            f"was trained at; the longest, {name!r}, has {tokens[name]:,}; name a directory with longer ones"
        )
    lengths = {multiple: multiple * trained_length for multiple in config.multiples}
    left_out = [LeftOut(m, length, name, tokens[name]) for m, length in lengths.items() if length > tokens[name]]
    return [length for length in lengths.values() if length <= tokens[name]], left_out


def _make_arms(
    config: ValidateConfig, directory: Path, position: Position, lengths: list[int], clips: Sequence[int]
) -> list[Arm]:
    """before, after (unless the chain is empty) and the sweep; a clip whose spectrum an earlier arm has shares it."""

    def arm(name: str, rope: RopeConfig, samples: int) -> Arm:
        evaluation = EvaluateConfig(
            checkpoint=str(directory),
            name=name,
            output=str(Path(config.output) / name),
            documents=config.documents,
            lengths=lengths,
            seed=config.seed,
            device=config.device,
            dtype=config.dtype,
            max_documents=config.max_documents,
            overwrite=config.overwrite,
            needle=replace(config.needle, samples=min(samples, config.needle.samples)),
            rope=rope,
            test_time=UNCHANGED,
            paths=config.paths,
        )
        return Arm(name, evaluation, settings_by_length(position, rope, UNCHANGED, lengths))

    arms = [arm(BEFORE, RopeConfig("default", []), config.needle.samples)]
    if config.rope.chain:
        arms.append(arm(AFTER, config.rope, config.needle.samples))
    for clip in clips:
        rope = RopeConfig(f"cope{clip}", [{"method": "cope", "clip": clip}])
        swept = arm(f"clip{clip}", rope, config.sweep_samples)
        same = next((other for other in arms if swept.measures_as(other)), swept)
        arms.append(replace(swept, config=same.config))
    return arms


def _check_arms(arms: Sequence[Arm]) -> None:
    """Check documents, needle and device, and that no arm's directory holds another evaluation."""
    validate_held_out(arms[0].config)
    checkpoint = open_checkpoint(arms[0].config)
    windows = read_windows(checkpoint)
    for arm in arms:
        store = ResultsStore(writable_directory("output", arm.config.output), arm.config.overwrite, arm.name)
        of_arm = replace(checkpoint, config=arm.config)  # same checkpoint, same windows
        for setting in passes_of(of_arm, UNCHANGED):
            unfinished_cells(of_arm, windows, setting, store)


def _spectra(arm: Arm) -> list[tuple[Any, ...]]:
    return [(s.lengths, s.spectrum.inv_freq.tobytes(), s.spectrum.attention_scaling) for s in arm.settings]


def _measured(arm: Arm) -> Measured:
    sums = read_document_losses(arm.directory)
    passes = {
        length: sums[sums["context_length"] == setting.longest]
        for setting in arm.settings
        for length in setting.lengths
    }
    return Measured(arm.name, arm.chain, arm.directory.name, passes, as_shares(read_results(arm.directory)))


def _announce(
    config: ValidateConfig, position: Position, arms: Sequence[Arm], lengths: Sequence[int], left_out: Sequence[LeftOut]
) -> str:
    at = ", ".join(f"{length:,}" for length in lengths)
    lines = [
        f"validate {config.model.path}, trained at {position.trained_length:,} tokens, at {at}",
        *map(str, left_out),
    ]
    if not config.rope.chain:
        lines.append(f"rope={config.rope.name} changes nothing, so only the sweep runs")
    if own := clip_of(position.chain):
        lines.append(f"the model is clipped already ({own}), so no clip is swept over: it would be a second one")
    for arm in arms:
        shared = "" if arm.directory.name == arm.name else f", measured as {arm.directory.name}"
        lines.append(f"  {arm.name}: {in_words(arm.settings[0].chain)}{shared}")
    return "\n".join(lines)


def _short_context(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """arm -> verdict, difference in nats per token and its interval (null: there is none), documents."""
    rows = table[(table["metric"] == "nll_difference") & (table["position_start"] == 0)]
    verdicts = rows[["arm", "verdict", "value", "ci_low", "ci_high", "n"]].to_dict("records")
    return {
        row.pop("arm"): {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in verdicts
    }


def _write(output: Path, table: pd.DataFrame, record: dict[str, Any]) -> None:
    (output / RECORD).unlink(missing_ok=True)  # if it is there, the tables beside it are its own
    write_table(output, TABLE, table)
    write_atomically(output / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _how_to_draw(config: ValidateConfig, arms: Sequence[Arm]) -> str:
    runs = ",".join(dict.fromkeys(str(arm.directory) for arm in arms))
    report = Path(config.output) / "report.html"
    return (
        f"report: python scripts/compare.py {shlex.join([f'runs=[{runs}]', f'baseline={BEFORE}', f'output={report}'])}"
    )
