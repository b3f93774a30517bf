"""Requirements of each command: the paths that it reads, with kind and length, and those that it writes.

The command walks its list before anything else is loaded, the dry run against what earlier stages promise, and the
doctor on the machine where the job runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.config.analysis import FiguresConfig, GeometryConfig
from ropewalk.config.data import ConvertConfig, GatherConfig, PrepareConfig, PrepareVideoConfig, PrepareVniahConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig
from ropewalk.config.export import ExportConfig
from ropewalk.config.rules import STORE_FIX, is_remote
from ropewalk.config.train import NoiseConfig, TrainConfig
from ropewalk.errors import UserError
from ropewalk.files import read_object
from ropewalk.runs.directory import MANIFEST, ZERO, RunDirectory, checkpoint_at

RECOGNISED = {"store", "run", "model"}  # kinds that a directory shows by its files
WRONG = {
    "store": f"is not a directory; {STORE_FIX}",
    "heldout": "is not a directory; write held-out documents with data_prep/prepare.py, or name one of text files",
    "model": "is neither a Hugging Face directory nor a hub model; name one (ORGANISATION/NAME on the hub)",
    "run": "is neither a run directory nor a checkpoint with a manifest; name one of a training that has saved",
}


@dataclass(frozen=True)
class Requirement:
    """A path that a command reads.

    Attributes:
        key: of the configuration.
        path: as it stands there.
        kinds: of what may lie there: store, heldout, model, run, evaluation, documents, mds, tokenizer,
            haystack.
        length: tokens of its sequences; None: any.
        longest: tokens that the longest of its documents must have; None: any.
        hub: it may be named as ORGANISATION/NAME on the hub.
        by_chain: a stage before must bring it; the command alone does without.
    """

    key: str
    path: str
    kinds: tuple[str, ...]
    length: int | None = None
    longest: int | None = None
    hub: bool = False
    by_chain: bool = False


@dataclass(frozen=True)
class Promise:
    """A path that a command writes, and what lies there; ``length`` in tokens, of held-out documents the least."""

    path: str
    kind: str
    length: int | None = None


@dataclass(frozen=True)
class Requirements:
    """The paths that one command reads and writes."""

    reads: list[Requirement]
    writes: list[Promise]


def _train(config: TrainConfig) -> Requirements:
    data, run = config.data, RunDirectory(Path(config.run_dir))
    reads = [Requirement("data.store", data.store, ("store",), None if data.stores else data.sequence_length)]
    reads += [Requirement(f"data.stores.{name}", path, ("store",)) for name, path in data.stores.items()]
    if config.evaluation.every is not None:
        reads.append(Requirement("evaluation.documents", str(config.evaluation.documents), ("heldout", "documents")))
    if config.start_from.run is None and config.model.path is not None:
        reads.append(Requirement("model.path", config.model.path, ("model",), hub=True))
    elif config.start_from.run is not None and not run.start_record.is_file():  # else it was chosen once and for all
        reads.append(Requirement("start_from.run", config.start_from.run, ("run",)))
    return Requirements(reads, [Promise(config.run_dir, "run", data.sequence_length)])


def _gather(config: GatherConfig) -> Requirements:
    return Requirements([], [Promise(config.output, "documents")])  # what it reads may be anywhere


def _prepare(config: PrepareConfig) -> Requirements:
    corpus, output = config.corpus, config.output
    later = config.stage not in ("all", "plan")  # reads the plan, which has found the sources
    reads = [Requirement("corpus.paths", path, ("documents",), by_chain=later) for path in corpus.paths]
    for source in corpus.sources:
        on_hub = source.kind == "dataset"
        reads.append(Requirement("corpus.sources", source.path, ("documents",), hub=on_hub, by_chain=later or on_hub))
    if corpus.tokenizer is not None:
        kinds = ("model", "tokenizer")
        reads.append(Requirement("corpus.tokenizer", corpus.tokenizer, kinds, hub=True, by_chain=True))
    writes = [Promise(f"{output}/packed-{length}", "store", length) for length in config.sequence_lengths]
    writes.append(Promise(f"{output}/tokenizer", "tokenizer"))
    if corpus.heldout_documents:
        writes.append(Promise(f"{output}/heldout", "heldout", corpus.heldout_length))
    return Requirements(reads, writes)


def _prepare_video(config: PrepareVideoConfig) -> Requirements:
    reads = [Requirement("visuals", config.visuals, ("documents",))] if config.visuals is not None else []
    if config.tokenizer is not None:
        reads.append(Requirement("tokenizer", config.tokenizer, ("model", "tokenizer"), hub=True, by_chain=True))
    store = Promise(f"{config.output}/packed-{config.sequence_length}", "store", config.sequence_length)
    return Requirements(reads, [store, Promise(f"{config.output}/tokenizer", "tokenizer")])


def _prepare_vniah(config: PrepareVniahConfig) -> Requirements:
    files = {name: path for name in ("film", "needles") if (path := getattr(config, name)) is not None}
    return Requirements(
        [Requirement(name, path, ("documents",)) for name, path in files.items()], [Promise(config.output, "haystack")]
    )


def _convert(config: ConvertConfig) -> Requirements:
    if config.format == "mds":
        return Requirements([Requirement("store", config.store or "", ("store",))], [Promise(config.output, "mds")])
    sources = {name: os.path.join(config.root, path) for name, path in config.sources.items()}
    reads = [Requirement(f"sources.{name}", path, ("mds",)) for name, path in sources.items()]
    return Requirements(reads, [Promise(config.output, "store", config.sequence_length)])


def _export(config: ExportConfig) -> Requirements:
    if config.checkpoint is not None:
        output = config.output or f"{RunDirectory(Path(config.checkpoint)).export}{config.average.suffix()}"
        reads = [Requirement("checkpoint", config.checkpoint, ("run",))]
        reads += [Requirement("average.runs", run, ("run",)) for run in config.average.runs]
        return Requirements(reads, [Promise(output, "model")])
    output = config.output or f"{config.paths.output_dir}/exports/{Path(config.model.path).name}"
    reads = [Requirement("model", config.model.path, ("model",), hub=True)] if config.model.path else []
    return Requirements(reads, [Promise(output, "model")])


def _evaluate(config: EvaluateConfig) -> Requirements:
    from ropewalk.evaluation.suites import validate_suites

    try:
        harnesses = {suite.harness for suite in validate_suites(config)}
    except UserError:  # the command itself reports that
        harnesses = set()
    reads = [Requirement("checkpoint", config.checkpoint, ("run", "model"))]
    if config.documents is not None and "quick" in harnesses:
        kinds = ("heldout", "documents")
        reads.append(Requirement("documents", config.documents, kinds, longest=max(config.lengths)))
    if config.vniah.data is not None and "vniah" in harnesses:
        reads.append(Requirement("vniah.data", config.vniah.data, ("haystack",)))
    return Requirements(reads, [Promise(config.output, "evaluation")])


def _compare(config: CompareConfig) -> Requirements:
    evaluations = [str(RunDirectory(Path(run)).evaluation) for run in config.runs]
    reads = [Requirement("runs", path, ("evaluation",), by_chain=True) for path in evaluations]
    return Requirements(reads, [Promise(config.output, "report")])


def _geometry(config: GeometryConfig) -> Requirements:
    reads = [Requirement("models", model, ("run", "model")) for model in config.models]
    kinds = ("heldout", "documents")
    reads.append(Requirement("documents", config.documents, kinds, longest=max(config.lengths, default=None)))
    return Requirements(reads, [Promise(config.output, "geometry")])


def _figures(config: FiguresConfig) -> Requirements:
    evaluations = [str(RunDirectory(Path(run)).evaluation) for run in config.results]
    reads = [Requirement("results", path, ("evaluation",), by_chain=True) for path in evaluations]
    return Requirements(reads, [Promise(config.output, "figures")])


def _noise(config: NoiseConfig) -> Requirements:
    evaluations = [str(RunDirectory(Path(run)).evaluation) for run in config.runs]
    reads = [Requirement("runs", path, ("evaluation",), by_chain=True) for path in evaluations]
    return Requirements(reads + (_train(config).reads if config.replicate else []), [])


COMMANDS: dict[str, Callable[[Any], Requirements]] = {
    "train": _train,
    "gather": _gather,
    "prepare": _prepare,
    "prepare_video": _prepare_video,
    "prepare_vniah": _prepare_vniah,
    "convert_mds": _convert,
    "export": _export,
    "evaluate": _evaluate,
    "compare": _compare,
    "geometry": _geometry,
    "figures": _figures,
    "noise": _noise,
}


def requirements(command: str, config: Any) -> Requirements:
    """The paths that ``command`` reads and writes with this configuration.

    Raises:
        UserError: for a command that none are listed for.
    """
    if command not in COMMANDS:
        raise UserError(f"no dry run is described for {command}; there is one for: {', '.join(COMMANDS)}")
    return COMMANDS[command](config)


def check_requirements(command: str, config: Any, *kinds: str) -> None:
    """Check the paths that a command reads on this machine; with ``kinds`` only those of these kinds.

    Raises:
        UserError: naming the first path that is missing, of another kind or of another length.
    """
    roots = (config.paths.data_dir, config.paths.output_dir)
    for requirement in requirements(command, config).reads:
        is_asked = not kinds or set(kinds) & set(requirement.kinds)
        if is_asked and not requirement.by_chain and not is_elsewhere(requirement, roots):
            problem = _problem_on_disk(requirement)
            if problem is not None:
                raise UserError(f"{requirement.key}={requirement.path} {problem}")


def check_promised(requirement: Requirement, promised: Mapping[str, Mapping[str, Any]], roots: tuple[str, ...]) -> None:
    """Check one path of a chain: on this disk, or written by a stage before.

    Args:
        requirement: of a stage.
        promised: what the stages before write, by normalised path: kind, length and by whom.
        roots: of our own files; what is named below them is not a hub id.

    Raises:
        UserError: neither, or of another kind or length.
    """
    if is_elsewhere(requirement, roots) or _problem_on_disk(requirement) is None:
        return
    key, path, kinds = requirement.key, requirement.path, requirement.kinds
    parents = [promised.get(str(parent), {}) for parent in Path(normalised(path)).parents]
    entry = promised.get(normalised(path)) or next((entry for entry in parents if entry.get("by") == "given"), None)
    if entry is None:
        known = [path for path, entry in promised.items() if entry["kind"] in kinds] or ["nothing of that kind"]
        raise UserError(
            f"{key}={path} is not on this disk and no stage before promises it; promised: {', '.join(known)}"
        )
    if entry["kind"] not in kinds:
        raise UserError(f"{key}={path} will hold a {entry['kind']}, not a {' or '.join(kinds)}")
    length = entry["length"]
    if None not in (requirement.length, length) and requirement.length != length:
        raise UserError(
            f"{key}={path} will hold sequences of {length:,} tokens and data.sequence_length={requirement.length}; "
            "make them equal"
        )
    if requirement.longest is not None and length is not None and requirement.longest > length:
        raise UserError(
            f"{key}={path} will hold documents of {length:,} tokens or more and lengths goes to "
            f"{requirement.longest:,}; set corpus.heldout_length={requirement.longest} there, or lengths to no more "
            f"than {length}"
        )


def is_elsewhere(requirement: Requirement, roots: tuple[str, ...]) -> bool:
    """True for a URL, and for ORGANISATION/NAME of the hub; anything below our own roots is a path."""
    parts = requirement.path.split("/")
    own = any(normalised(requirement.path).startswith(normalised(root) + os.sep) for root in roots)
    is_id = requirement.hub and not own and len(parts) == 2 and all(parts) and parts[0] not in (".", "..")
    return is_remote(requirement.path) or (is_id and not Path(requirement.path).exists())


def _problem_on_disk(requirement: Requirement) -> str | None:
    """The fault of the path on this disk; None: it is there, of the kind and length that are required."""
    path, first = Path(requirement.path), requirement.kinds[0]
    wrong = WRONG.get(first, f"is not on this disk; name one that exists ({' or '.join(requirement.kinds)})")
    if not path.exists():
        return wrong
    kind = _kind_of(path)
    if set(requirement.kinds) <= RECOGNISED and kind not in requirement.kinds:
        return f"is a {kind}, not a {' or '.join(requirement.kinds)}; name another" if kind else wrong
    if requirement.kinds == ("run",) and checkpoint_at(path) is None:
        return "holds no committed checkpoint; name a run directory that does, or one of its checkpoints"
    if kind == "store" and requirement.length is not None:
        length = read_object(path / MANIFEST).get("sequence_length")
        if length != requirement.length:
            return (
                f"holds sequences of {length} tokens and data.sequence_length={requirement.length}; set "
                f"data.sequence_length={length} or name another store"
            )
    return None


def _kind_of(path: Path) -> str | None:
    """The kind of a directory, by the files in it; None: it shows none."""
    run = RunDirectory(path)
    if run.record.is_file() or run.checkpoints.is_dir() or (path / ZERO).is_dir():
        return "run"
    if (path / MANIFEST).is_file():
        return "store"
    return "model" if (path / "config.json").is_file() else None


def normalised(path: str) -> str:
    """The path as promises are kept under."""
    return os.path.normpath(path)
