"""``python scripts/analyze.py spectra|kernel|...``: figures of the methods that a user names, and of trained runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ropewalk.analysis.subjects import spectra_of
from ropewalk.config.analysis import FiguresConfig
from ropewalk.config.rules import one_of
from ropewalk.errors import UserError
from ropewalk.evaluation.results import writable_directory
from ropewalk.figures.figure import check_formats, write_figure
from ropewalk.figures.rope_id_ablations import ARGUMENTS, ablations_figure
from ropewalk.figures.spectrum import SPECTRUM_FIGURES
from ropewalk.figures.spectrum.clip_sweep import RESPONSES, UNCLIPPED, clips_figure
from ropewalk.files import read_object
from ropewalk.rope import RopeChain
from ropewalk.rope.registry import get_method
from ropewalk.runs.directory import RunDirectory

ALL, ABLATIONS = "figures", "ablations"
RULER = "13-task average"
PUBLISHED = {"channel_fraction": "share"}  # the paper's names of arguments where they are not ours
MOST_METHODS = 12  # small panels and colours carry no more
SHORTEST, LONGEST = 64, 2**22  # tokens: below, no axis is left; above, the clip figure takes minutes
COLUMNS = ["run", "family", "clip", "test_time", "task", "metric", "context_length", "value", "ci_low", "ci_high"]
DEFAULTS = ("raised_cosine", "index")  # of cope: left out of a family's name


def draw(name: str, config: FiguresConfig) -> list[Path]:
    """Draw one figure, or all of them for ``figures``, as ``<output>/<name>.<format>``; print each path.

    Two calls with the same configuration write the same bytes.

    Args:
        name: a key of ``SPECTRUM_FIGURES``, ``ablations``, or ``figures``.
        config: methods, model, lengths, formats and output.

    Returns:
        The files, in the order they were written.

    Raises:
        UserError: for a name, a format, a length or a method that is not known or possible, before anything is drawn.
    """
    one_of("figure", name, (*SPECTRUM_FIGURES, ABLATIONS, ALL))
    _validate(config)
    if name == ABLATIONS:
        measured = read_ablations(config.results)
        figure = ablations_figure(measured, published_ablations(config.published))
        return _printed(write_figure(figure, writable_directory("output", config.output), config.formats))
    spectra = spectra_of(config)
    figures = dict(SPECTRUM_FIGURES)
    if config.results and name in ("clips", ALL):
        figures["clips"] = partial(clips_figure, responses=read_responses(config.results))
    output = writable_directory("output", config.output)
    written = []
    for chosen in SPECTRUM_FIGURES if name == ALL else (name,):
        figure = figures[chosen](spectra, train_length=config.train_length, target_length=config.target_length)
        written += _printed(write_figure(figure, output, config.formats))
    return written


def _printed(paths: list[Path]) -> list[Path]:
    for path in paths:
        print(path)
    return paths


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
        chain = _parsed(_trained_chain(directory, evaluations.record), directory)
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


def _parsed(recorded: str, directory: Path) -> RopeChain:
    try:
        return RopeChain.parse(recorded)
    except UserError as error:
        raise UserError(f"results: the chain recorded in {directory}: {error}") from error


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
    chain = read_object(RunDirectory(directory).record).get("chain")
    if isinstance(chain, str):
        return chain
    return str(evaluation["settings"][0]["chain"])


def read_ablations(directories: Sequence[str]) -> pd.DataFrame:
    """RULER's mean of runs that differ from RoPE-ID's defaults in one argument, as ``ablations_figure`` takes it.

    A run with all of the defaults stands in every panel. The exponent of a ``temperature`` that an evaluation has
    appended counts as the method's own.

    Args:
        directories: run directories with an ``evaluation``, or what evaluate.py wrote itself.

    Raises:
        UserError: if no run has RULER's 13 tasks under a rope_id chain.
    """
    # late: torch, for which the other figures need not wait
    from ropewalk.evaluation.paper import measured_beside
    from ropewalk.evaluation.results import read_evaluations

    rows, left_out = [], []
    for directory in map(Path, directories):
        results = read_evaluations(directory).results
        for text, of_chain in results[results["harness"] == "ruler"].groupby("chain", sort=False):
            shown = _ablated(_parsed(str(text), directory))
            left_out += [] if shown else [f"{directory.name} ({text})"]
            for length in of_chain["context_length"].unique() if shown else ():
                cell = {"benchmark": "RULER", "task": RULER, "context_length": length, "method": "", "source": ""}
                for score in measured_beside(pd.Series({**cell, "value": math.nan}), of_chain):
                    measured = {"context_length": int(length), "value": score["measured"], "stderr": score["stderr"]}
                    rows += [{"argument": name, "setting": value, **measured} for name, value in shown.items()]
    columns = ["argument", "setting", "context_length", "value", "stderr"]
    table = pd.DataFrame(rows, columns=columns).dropna(subset="value").reset_index(drop=True)
    if table.empty:
        raise UserError(
            f"results={list(directories)} holds no run with RULER's 13 tasks under a rope_id chain that differs from "
            "the method's defaults in one argument at most; evaluate such runs with suite=ruler"
        )
    table.attrs["note"] = f"Left out, of another chain: {', '.join(left_out)}." if left_out else ""
    return table


def _ablated(chain: RopeChain) -> dict[str, float]:
    """The argument of rope_id that a chain changes, and its value; all of them where it changes none.

    Empty for a chain that does anything else, or changes several.
    """
    steps = chain.to_list()
    if not steps or steps[0]["method"] != "rope_id" or any(step["method"] != "temperature" for step in steps[1:]):
        return {}
    arguments = steps[0] | ({"temperature_exponent": steps[-1]["exponent"]} if steps[1:] else {})
    defaults = get_method("rope_id").defaults | {"longest_period": arguments["trained_length"] / 2}
    changed = [name for name in ARGUMENTS if arguments[name] != defaults[name]]
    return {name: float(arguments[name]) for name in changed or ARGUMENTS} if len(changed) < 2 else {}


def published_ablations(path: str | None) -> pd.DataFrame | None:
    """The ablations among published numbers (RULER, "13-task average, shortest_period=16"); None without a file.

    Raises:
        UserError: for a file that is no such table, or has none of them.
    """
    if path is None:
        return None
    from ropewalk.evaluation.paper import read_published

    published = read_published(path, "published")
    parts = published["task"].str.extract(rf"^{RULER}, (?P<argument>\w+)=(?P<setting>[\d./]+)$")
    of_rope_id = parts["argument"].replace(PUBLISHED)
    kept = (published["benchmark"] == "RULER") & of_rope_id.isin(list(ARGUMENTS))
    if not kept.any():
        raise UserError(f"published={path} has no ablation of RoPE-ID; recipes/rope_id_1b/expected.csv has them")
    settings = [float(Fraction(text)) for text in parts["setting"][kept]]
    return published[kept][["context_length", "value"]].assign(argument=of_rope_id[kept], setting=settings)
