"""HELMET's own eval.py, run as a process of the user's environment for each category and length."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.cells import Cell, CellStore
from ropewalk.evaluation.helmet.configs import helmet_yaml, published, write_yaml
from ropewalk.evaluation.helmet.datasets import CATEGORIES, LENGTHS, Category, Dataset, with_samples
from ropewalk.evaluation.helmet.rebuild import rebuild
from ropewalk.evaluation.helmet.scores import JUDGED, score_rows, unpublished_row
from ropewalk.evaluation.scaled_copy import scaled_copy
from ropewalk.evaluation.settings import Setting
from ropewalk.evaluation.subject import Subject
from ropewalk.training.distributed import Ranks

HARNESS = "helmet"
LAUNCHER = Path(__file__).with_name("launch.py")
MISROUTED = ("gpt", "claude", "gemini", "togetherapi")  # words in a path that HELMET takes for the name of an API


def run_helmet(subject: Subject, suite: SuiteConfig, test_time: TestTimeConfig, store: CellStore, ranks: Ranks) -> None:
    """Run the categories of ``suite`` that are not finished at each length.

    Raises:
        UserError: for a checkout that is none, a category that HELMET does not have, or a run of it that failed.
    """
    if ranks.world_size > 1:
        raise UserError("suite=helmet runs HELMET's own process; start scripts/evaluate.py without torchrun for it")
    checkout = check_checkout(suite)
    version = helmet_version(checkout)
    for length, setting in subject.settings(subject.config.lengths, test_time).items():
        columns = subject.columns(setting)
        common = {**columns, "harness": HARNESS, "harness_version": version}
        for name in suite.tasks:
            category = with_samples(CATEGORIES[name], suite.samples)
            cell = Cell(HARNESS, name, length, columns["test_time_scaling"])
            identity = {**subject.identity(setting, length), "harness_version": version, **_asked(suite, category)}
            work = work_directory(store.output, cell, identity)
            identity["judged"] = sorted(path.name for path in (work / name).glob(f"*{JUDGED}"))
            if store.is_finished(cell, identity):
                print(f"kept: {cell}", flush=True)
                continue
            rows = _run_category(subject, suite, (category, length, setting), work, {**common, "category": name})
            store.write(cell, identity, rows, {"command": "in helmet/ beside cells/"})
            print(f"done: {cell}", flush=True)


def check_checkout(suite: SuiteConfig) -> Path:
    """HELMET's checkout, after the suite was found runnable.

    Raises:
        UserError: naming what is missing.
    """
    for name in suite.tasks:
        if name not in CATEGORIES:
            raise UserError(f"suite.tasks: HELMET has no category {name!r}; they are: {', '.join(CATEGORIES)}")
    checkout = Path(suite.helmet.checkout or "")
    if suite.helmet.checkout is None or not (checkout / "eval.py").is_file():
        raise UserError(
            f"suite.helmet.checkout={suite.helmet.checkout} holds no eval.py; clone github.com/princeton-nlp/HELMET, "
            "install its requirements in an environment of its own (suite.helmet.python=...), and name the clone"
        )
    if shutil.which(suite.helmet.python) is None:
        raise UserError(
            f"suite.helmet.python={suite.helmet.python} cannot be started (there is no such program); name the "
            "python of HELMET's environment"
        )
    return checkout.resolve()


def helmet_version(checkout: Path) -> str:
    """The commit of the checkout, marked where files differ from it; ``unknown`` where git cannot say."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def work_directory(output: Path, cell: Cell, identity: dict[str, Any]) -> Path:
    """Where HELMET runs: one directory for each length, scaling and identity, since it keeps outputs that it finds."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return output / HARNESS / f"{cell.file.stem}.{digest[:8]}"


def _asked(suite: SuiteConfig, category: Category) -> dict[str, Any]:
    engine = "endpoint" if suite.helmet.endpoint else f"transformers {suite.helmet.attention}"
    return {"samples": category.samples, "engine": engine, "arguments": list(suite.helmet.arguments)}


def _run_category(
    subject: Subject, suite: SuiteConfig, what: tuple[Category, int, Setting], work: Path, common: dict[str, Any]
) -> list[dict[str, Any]]:
    category, length, setting = what
    runnable = [dataset for dataset in category.datasets if published(dataset, length)]
    rows = [unpublished_row(dataset, length, common) for dataset in category.datasets if dataset not in runnable]
    if not runnable:
        return [{**row, "source_file": ""} for row in rows]
    made = work / "data"
    for dataset in runnable:
        if length not in LENGTHS:
            target = made / str(dataset.at(length)["test_files"])
            rebuild_inputs(subject, suite, dataset, target, length, category.samples)
    data = Path(suite.helmet.data or Path(suite.helmet.checkout or "") / "data").resolve()
    config = work / f"{category.name}.yaml"
    if subject.tokenizer.chat_template is None:
        category = replace(category, chat=False)  # a base model is asked without one
    write_yaml(config, helmet_yaml(category, runnable, length, data, made.resolve()))
    results = work / category.name
    command = helmet_command(subject, suite, config, results, work / "model", (length, setting))
    run_process(command, Path(suite.helmet.checkout or ""), work / f"{category.name}.log")
    for dataset in runnable:
        rows += score_rows(dataset, length, results, common)
    return [{**row, "source_file": _below(work, results, row)} for row in rows]


def _below(work: Path, results: Path, row: dict[str, Any]) -> str:
    """The path of a row's score file below the output of the evaluation, two levels above ``work``."""
    name = row.get("source_file")
    return (results / name).relative_to(work.parents[1]).as_posix() if name else ""


def rebuild_inputs(
    subject: Subject, suite: SuiteConfig, dataset: Dataset, target: Path, length: int, samples: int
) -> None:
    """Make the inputs of a dataset at a length that HELMET does not publish."""
    tokenizer = subject.tokenizer
    rebuild(
        dataset.name,
        target,
        length,
        samples,
        dataset.size(length) if dataset.name == "json_kv" else None,
        lambda text: len(tokenizer.encode(text, verbose=False)),
        subject.config.seed,
        None if suite.data is None else Path(suite.data),
    )


def helmet_command(
    subject: Subject, suite: SuiteConfig, config: Path, results: Path, model: Path, at: tuple[int, Setting]
) -> list[str]:
    """The command line of one run.

    In process, HELMET reads a directory whose config.json is compiled for the length, so its transformers needs nothing
    of ours. Behind an endpoint the server must have been started on such a directory; the tokenizer is read from here.

    Raises:
        UserError: for a path that HELMET would take for an API.
    """
    length, setting = at
    path = scaled_copy(subject.directory, model.resolve(), setting, length)
    if word := next((word for word in MISROUTED if word in str(path)), None):
        raise UserError(f"{path} holds {word!r}, by which HELMET would call an API; name another output")
    options = [
        "--config",
        str(config.resolve()),
        "--model_name_or_path",
        str(path),
        "--output_dir",
        str(results.resolve()),
    ]
    options += ["--tag", "ropewalk", "--seed", "42"]
    if suite.helmet.endpoint:
        options += ["--use_tgi_or_vllm_serving", "--endpoint_url", suite.helmet.endpoint]
    launch = [
        _program(suite.helmet.python),
        str(LAUNCHER),
        str(Path(suite.helmet.checkout or "").resolve()),
        suite.helmet.attention,
    ]
    return [*launch, *options, *suite.helmet.arguments]


def _program(name: str) -> str:
    """A python's path from any directory. A link stays one: by it a venv's python knows its venv."""
    found = shutil.which(name) or name
    return os.path.abspath(found) if os.sep in found else found


def run_process(command: list[str], where: Path, log: Path) -> None:
    """Run HELMET with its output in ``log``.

    Raises:
        UserError: where it cannot be started or fails, with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        out.write(" ".join(command) + "\n")
        out.flush()
        try:
            ended = subprocess.run(command, cwd=where, stdout=out, stderr=subprocess.STDOUT, check=False)
        except OSError as error:
            raise UserError(
                f"suite.helmet.python={command[0]} cannot be started ({error.strerror}); name the python of HELMET's "
                "environment"
            ) from error
    if ended.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise UserError(f"HELMET ended with code {ended.returncode}: {last[:300]}; all of it is in {log}")
