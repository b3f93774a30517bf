"""A chain of commands checked without running it: what each reads must be there, or promised by one before it.

Every entry takes ``--dry-run=LEDGER``: it composes and validates its configuration as always, checks the paths that it
would read against the disk and the ledger, adds what it would write to the ledger, and ends. The ledger is a JSON file.
``python -m ropewalk.cluster.dry_run CHAIN`` does so for the lines of a file, in one process; recipes write it, where
DRY_RUN=1.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.config.data import ConvertConfig, GatherConfig, PrepareConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig
from ropewalk.config.export import ExportConfig
from ropewalk.config.rules import is_remote, validate_train
from ropewalk.config.train import TrainConfig
from ropewalk.errors import UserError
from ropewalk.files import write_atomically
from ropewalk.runs.directory import RunDirectory


@dataclass(frozen=True)
class Need:
    """A path that a stage reads.

    Attributes:
        key: of the configuration.
        path: as it stands there.
        kinds: of what may lie there: store, heldout, model, run, evaluation, documents, mds.
        length: tokens of its sequences, where they must be as many.
        longest: tokens that the longest of its documents must have, where that is asked.
        hub: whether it may be named as ORGANISATION/NAME on the hub.
    """

    key: str
    path: str
    kinds: tuple[str, ...]
    length: int | None = None
    longest: int | None = None
    hub: bool = False


@dataclass(frozen=True)
class Promise:
    """A path that a stage writes, and what will lie there; ``length`` in tokens, of a heldout's documents the least."""

    path: str
    kind: str
    length: int | None = None


@dataclass(frozen=True)
class Stage:
    """The paths that one command would read and write."""

    needs: list[Need]
    promises: list[Promise]


def dry_run(command: str, config: Any, ledger: Path) -> None:
    """Check one stage and note what it would write.

    Args:
        command: name of the entry's configuration.
        config: its dataclass.
        ledger: JSON file; made where there is none.

    Raises:
        UserError: for a configuration that does not hold, or a path that neither exists nor is promised.
    """
    describe = STAGES.get(command)
    if describe is None:
        raise UserError(f"no dry run is described for {command}; there is one for: {', '.join(STAGES)}")
    stage, promised = describe(config), _read(ledger)
    roots = (config.paths.data_dir, config.paths.output_dir)
    for need in stage.needs:
        _check(need, promised, roots)
    for promise in stage.promises:
        promised[_plain(promise.path)] = {"kind": promise.kind, "length": promise.length, "by": command}
    _write(ledger, promised)
    read, written = ([one.path for one in some] or ["nothing"] for some in (stage.needs, stage.promises))
    print(f"dry run: {command} reads {', '.join(read)}; writes {', '.join(written)}", flush=True)


def promise(ledger: Path, path: str, kind: str) -> None:
    """Note a path that something else than an entry brings: a download, or what the user has."""
    _write(ledger, _read(ledger) | {_plain(path): {"kind": kind, "length": None, "by": "given"}})
    print(f"dry run: {path} is given ({kind})", flush=True)


def _train(config: TrainConfig) -> Stage:
    validate_train(config, config.parallel.sequence, stores=False)  # for so many ranks as there are: scripts/plan.py
    data = config.data
    needs = [Need("data.store", data.store, ("store",), data.sequence_length if not data.stores else None)]
    needs += [Need(f"data.stores.{name}", path, ("store",)) for name, path in data.stores.items()]
    if config.start_from.run is not None:
        needs.append(Need("start_from.run", config.start_from.run, ("run",)))
    elif config.model.path is not None:
        needs.append(Need("model.path", config.model.path, ("model",), hub=True))
    return Stage(needs, [Promise(config.run_dir, "run", data.sequence_length)])


def _gather(config: GatherConfig) -> Stage:
    return Stage([], [Promise(config.output, "documents")])  # what it reads may be anywhere


def _prepare(config: PrepareConfig) -> Stage:
    from ropewalk.data.prepare.pipeline import validate_prepare

    validate_prepare(config)
    corpus, output = config.corpus, config.output
    needs = [Need("corpus.paths", path, ("documents",)) for path in corpus.paths]
    for source in corpus.sources:
        needs.append(Need("corpus.sources", source.path, ("documents",), hub=source.kind == "dataset"))
    if corpus.tokenizer is not None:
        needs.append(Need("corpus.tokenizer", corpus.tokenizer, ("model", "tokenizer"), hub=True))
    promises = [Promise(f"{output}/packed-{length}", "store", length) for length in config.sequence_lengths]
    promises.append(Promise(f"{output}/tokenizer", "tokenizer"))
    if corpus.heldout_documents:
        promises.append(Promise(f"{output}/heldout", "heldout", corpus.heldout_length))
    return Stage(needs, promises)


def _convert(config: ConvertConfig) -> Stage:
    if config.format == "mds":
        needs = [Need("store", config.store or "", ("store",))]
        return Stage(needs, [Promise(config.output, "mds")])
    needs = [Need(f"sources.{n}", os.path.join(config.root, path), ("mds",)) for n, path in config.sources.items()]
    return Stage(needs, [Promise(config.output, "store", config.sequence_length)])


def _export(config: ExportConfig) -> Stage:
    if config.checkpoint is not None:
        need = Need("checkpoint", config.checkpoint, ("run",))
        return Stage([need], [Promise(config.output or str(RunDirectory(Path(config.checkpoint)).export), "model")])
    output = config.output or f"{config.paths.output_dir}/exports/{Path(config.model.path).name}"
    return Stage([Need("model", config.model.path, ("model",), hub=True)], [Promise(output, "model")])


def _evaluate(config: EvaluateConfig) -> Stage:
    from ropewalk.evaluation.evaluated_checkpoint import check_chains
    from ropewalk.evaluation.harness.lm_eval_suite import check_scorers
    from ropewalk.evaluation.suites import validate_suites

    suites = validate_suites(config)
    for suite in suites:
        try:
            check_scorers(suite)
        except ValueError as error:  # the machine that evaluates may have them
            print(f"dry run: warning: {error}", file=sys.stderr, flush=True)
    check_chains(config.rope, config.test_time)
    needs = [Need("checkpoint", config.checkpoint, ("run", "model"))]
    if config.documents is not None and any(suite.harness == "quick" for suite in suites):
        needs.append(Need("documents", config.documents, ("heldout", "documents"), longest=max(config.lengths)))
    return Stage(needs, [Promise(config.output, "evaluation")])


def _compare(config: CompareConfig) -> Stage:
    from ropewalk.evaluation.paper import read_published

    if config.published is not None:
        read_published(config.published, "published")
    names = [Path(run).name for run in config.runs]
    if config.baseline is not None and config.baseline not in names:
        raise UserError(f"baseline={config.baseline} is none of the runs; use one of {', '.join(names)}")
    needs = [Need("runs", str(RunDirectory(Path(run)).evaluation), ("evaluation",)) for run in config.runs]
    return Stage(needs, [Promise(config.output, "report")])


STAGES: dict[str, Callable[[Any], Stage]] = {
    "train": _train,
    "gather": _gather,
    "prepare": _prepare,
    "convert_mds": _convert,
    "export": _export,
    "evaluate": _evaluate,
    "compare": _compare,
}


def _check(need: Need, promised: Mapping[str, Mapping[str, Any]], roots: tuple[str, ...]) -> None:
    if is_remote(need.path) or Path(need.path).exists() or _is_hub_id(need, roots):
        return
    found = promised.get(_plain(need.path)) or _above(need, promised)
    if found is None:
        known = [path for path, entry in promised.items() if entry["kind"] in need.kinds] or ["nothing of that kind"]
        raise UserError(
            f"{need.key}={need.path} is not on this disk and no stage before promises it; promised: {', '.join(known)}"
        )
    if found["kind"] not in need.kinds:
        raise UserError(f"{need.key}={need.path} will hold a {found['kind']}, not a {' or '.join(need.kinds)}")
    length = found["length"]
    if None not in (need.length, length) and need.length != length:
        raise UserError(
            f"{need.key}={need.path} will hold sequences of {length:,} tokens and "
            f"data.sequence_length={need.length}; make them equal"
        )
    if need.longest is not None and length is not None and need.longest > length:
        raise UserError(
            f"{need.key}={need.path} will hold documents of {length:,} tokens or more and lengths goes to "
            f"{need.longest:,}; set corpus.heldout_length={need.longest} there, or lengths to no more than {length}"
        )


def _above(need: Need, promised: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """A directory of the same kind that was promised whole, such as all MDS directories below one root."""
    for parent in _parents(_plain(need.path)):
        entry = promised.get(parent)
        if entry is not None and entry["by"] == "given":
            return entry
    return None


def _parents(path: str) -> Iterator[str]:
    yield from map(str, Path(path).parents)


def _is_hub_id(need: Need, roots: tuple[str, ...]) -> bool:
    """True if it is named as ORGANISATION/NAME; anything below our own roots is a path."""
    parts = need.path.split("/")
    own = any(_plain(need.path).startswith(_plain(root) + os.sep) for root in roots)
    return need.hub and not own and len(parts) == 2 and all(parts) and parts[0] not in (".", "..")


def _plain(path: str) -> str:
    return os.path.normpath(path)


def _read(ledger: Path) -> dict[str, Any]:
    return json.loads(ledger.read_text()) if ledger.is_file() else {}


def _write(ledger: Path, promised: Mapping[str, Any]) -> None:
    ledger.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(ledger, json.dumps(promised, indent=2) + "\n")


def dry_run_chain(chain: Path) -> None:
    """Check the commands of a file in their order: ``ENTRY OVERRIDES...``, or ``given PATH KIND``. The planner plans.

    Raises:
        SystemExit: with the code of the first entry that does not hold; it has said why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ledger = Path(scratch) / "ledger.json"
        for words in map(shlex.split, chain.read_text().splitlines()):
            if words[0] == "given":
                promise(ledger, words[1], words[2])
            else:
                _run_entry(words, ledger)


def _run_entry(words: list[str], ledger: Path) -> None:
    """The entry's own file, as if it had been started with these words."""
    entry, *overrides = words
    plans = Path(entry).name == "plan.py"
    sys.argv[:] = [entry, *overrides, *([] if plans else [f"--dry-run={ledger}"])]
    try:
        runpy.run_path(entry, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            print(f"dry run: stopped at {shlex.join(words)}", file=sys.stderr)
            raise


if __name__ == "__main__":
    dry_run_chain(Path(sys.argv[1]))
