"""``python scripts/analyze.py spectra|kernel|...``: figures of the methods that a user names, and of trained runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.analysis.subjects import spectra_of
from ropewalk.config.analysis import FiguresConfig
from ropewalk.config.rules import one_of
from ropewalk.errors import UserError
from ropewalk.figures.figure import check_formats, write_figure
from ropewalk.figures.spectrum import SPECTRUM_FIGURES
from ropewalk.figures.spectrum.clip_sweep import RESPONSES, UNCLIPPED, clips_figure
from ropewalk.rope import RopeChain
from ropewalk.runs.directory import RunDirectory

ALL = "figures"
MOST_METHODS = 12  # small panels and colours carry no more
SHORTEST, LONGEST = 64, 2**22  # tokens: below, no axis is left; above, the clip figure takes minutes
COLUMNS = ["run", "family", "clip", "test_time", "task", "metric", "context_length", "value", "ci_low", "ci_high"]
DEFAULTS = ("raised_cosine", "index")  # of cope: left out of a family's name


def draw(name: str, config: FiguresConfig) -> list[Path]:
    """Draw one figure, or all of them for ``figures``, as ``<output>/<name>.<format>``; print each path.

    Two calls with the same configuration write the same bytes.

    Args:
        name: a key of ``SPECTRUM_FIGURES``, or ``figures``.
        config: methods, model, lengths, formats and output.

    Returns:
        The files, in the order they were written.

    Raises:
        UserError: for a name, a format, a length or a method that is not known or possible, before anything is drawn.
    """
    one_of("figure", name, (*SPECTRUM_FIGURES, ALL))
    _validate(config)
    spectra = spectra_of(config)
    figures = dict(SPECTRUM_FIGURES)
    if config.results and name in ("clips", ALL):
        figures["clips"] = partial(clips_figure, responses=read_responses(config.results))
    output = _directory(config.output)
    written = []
    for chosen in SPECTRUM_FIGURES if name == ALL else (name,):
        figure = figures[chosen](spectra, train_length=config.train_length, target_length=config.target_length)
        for path in write_figure(figure, output, config.formats):
            print(path)
            written.append(path)
    return written


def _validate(config: FiguresConfig) -> None:
    check_formats("formats", config.formats)
    count = len(config.methods)
    if not 1 <= count <= MOST_METHODS:
        raise UserError(f"methods has {count} entries; give 1 to {MOST_METHODS}, or draw twice")
    for name in ("train_length", "target_length"):
        length = getattr(config, name)
        if not SHORTEST <= length <= LONGEST:
            raise UserError(f"{name}={length} must be {SHORTEST} to {LONGEST:,} tokens; choose one between")
    if config.target_length <= config.train_length:
        raise UserError(
            f"target_length={config.target_length} must exceed train_length={config.train_length}: the figures are "
            "about lengths beyond training; raise one or lower the other"
        )


def _directory(output: str) -> Path:
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be made ({error.strerror}); name a writable directory") from error
    return path


def read_responses(directories: Sequence[str]) -> pd.DataFrame:
    """Losses and needle accuracies of runs that differ in their clip.

    A run counts if its chain, apart from abf, is empty (a clip of 0, which every family shares) or one cope or
    hardclip. Evaluation at longer inputs may add test-time methods; the clip is that of training.

    Args:
        directories: run directories with an ``evaluation``, or what evaluate.py wrote itself.

    Returns:
        One row for each run, test-time setting, metric and context length: run, family (method with its window, ""
        without a clip), clip (pairs), test_time (name of the setting; "": not recorded), task, metric, context_length
        (tokens), value, ci_low, ci_high. ``attrs["note"]`` names the runs that were left out.

    Raises:
        UserError: if a directory holds no finished evaluation, or no run has a clip.
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
        wanted = pd.MultiIndex.from_frame(results[["task", "metric"]]).isin(list(RESPONSES))
        of_run = results[wanted].assign(family=family[0], clip=family[1], test_time=results["test_time"].str.split(","))
        rows.append(of_run.explode("test_time")[COLUMNS])
    responses = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=COLUMNS)
    if not (responses["clip"] > 0).any():
        raise UserError(
            f"results={list(directories)} holds no evaluated run with a cope or hardclip chain; name such runs, or "
            "leave results empty"
        )
    note = "Trained runs with 95% intervals."
    note += " The runs without a clip begin every line." if (responses["clip"] == 0).any() else ""
    responses.attrs["note"] = note + (f" Left out, no plain clip: {', '.join(left_out)}." if left_out else "")
    return responses


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
