"""A chain of commands checked without running it: what each reads must be there, or promised by one before it.

Every entry takes ``--dry-run=LEDGER``: it composes and validates its configuration as always, checks the paths that it
would read against the disk and the ledger, adds what it would write to the ledger, and ends. The ledger is a JSON file.
``python -m ropewalk.cluster.dry_run CHAIN`` does so for the lines of a file, in one process; recipes write it, where
DRY_RUN=1.
"""

from __future__ import annotations

import json
import runpy
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ropewalk.cluster.requirements import check_promised, normalised, requirements
from ropewalk.config.data import PrepareConfig, PrepareVideoConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig
from ropewalk.config.rules import validate_train
from ropewalk.config.train import TrainConfig
from ropewalk.errors import UserError
from ropewalk.files import read_object, write_atomically


def dry_run(command: str, config: Any, ledger: Path) -> None:
    """Check one stage and note what it would write.

    Args:
        command: name of the entry's configuration.
        config: its dataclass.
        ledger: JSON file; made where there is none.

    Raises:
        UserError: for a configuration that does not hold, or a path that neither exists nor is promised.
    """
    validate = VALIDATIONS.get(command)
    if validate is not None:
        validate(config)
    stage, promised = requirements(command, config), _read(ledger)
    roots = (config.paths.data_dir, config.paths.output_dir)
    for requirement in stage.reads:
        check_promised(requirement, promised, roots)
    for promise in stage.writes:
        promised[normalised(promise.path)] = {"kind": promise.kind, "length": promise.length, "by": command}
    _write(ledger, promised)
    read, written = ([entry.path for entry in entries] or ["nothing"] for entries in (stage.reads, stage.writes))
    print(f"dry run: {command} reads {', '.join(read)}; writes {', '.join(written)}", flush=True)


def give(ledger: Path, path: str, kind: str) -> None:
    """Note a path that something else than an entry brings: a download, or what the user has."""
    _write(ledger, _read(ledger) | {normalised(path): {"kind": kind, "length": None, "by": "given"}})
    print(f"dry run: {path} is given ({kind})", flush=True)


def _validate_train(config: TrainConfig) -> None:
    validate_train(config, config.parallel.sequence)  # for so many ranks as there are: scripts/plan.py


def _validate_prepare(config: PrepareConfig) -> None:
    from ropewalk.data.prepare.pipeline import validate_prepare

    validate_prepare(config)


def _validate_prepare_video(config: PrepareVideoConfig) -> None:
    from ropewalk.data.prepare.video.visual_pipeline import validate_prepare_video

    validate_prepare_video(config)


def _validate_evaluate(config: EvaluateConfig) -> None:
    from ropewalk.evaluation.evaluated_checkpoint import check_chains
    from ropewalk.evaluation.harness.lm_eval_suite import check_scorers
    from ropewalk.evaluation.suites import validate_suites

    for suite in validate_suites(config):
        try:
            check_scorers(suite)
        except ValueError as error:  # the machine that evaluates may have them
            print(f"dry run: warning: {error}", file=sys.stderr, flush=True)
    check_chains(config.rope, config.test_time)


def _validate_compare(config: CompareConfig) -> None:
    from ropewalk.evaluation.paper import read_published

    if config.published is not None:
        read_published(config.published, "published")
    names = [Path(run).name for run in config.runs]
    if config.baseline is not None and config.baseline not in names:
        raise UserError(f"baseline={config.baseline} is none of the runs; use one of {', '.join(names)}")


VALIDATIONS: dict[str, Callable[[Any], None]] = {
    "train": _validate_train,
    "prepare": _validate_prepare,
    "prepare_video": _validate_prepare_video,
    "evaluate": _validate_evaluate,
    "compare": _validate_compare,
}


def _read(ledger: Path) -> dict[str, Any]:
    return read_object(ledger)


def _write(ledger: Path, promised: Mapping[str, Any]) -> None:
    ledger.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(ledger, json.dumps(promised, indent=2) + "\n")


def dry_run_chain(chain: Path) -> None:
    """Check the commands of a file in their order: ``ENTRY OVERRIDES...``, or ``given PATH KIND``. The planner plans.

    Raises:
        SystemExit: with the code of the first entry that does not hold; it has reported why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        ledger = Path(scratch) / "ledger.json"
        for words in map(shlex.split, chain.read_text(encoding="utf-8").splitlines()):
            if words[0] == "given":
                give(ledger, words[1], words[2])
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
