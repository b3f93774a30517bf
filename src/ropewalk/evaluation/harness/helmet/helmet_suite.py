"""HELMET's own eval.py, run as a process of the user's environment for each category and length."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint, scaled_copy
from ropewalk.evaluation.harness.helmet.helmet_datasets import CATEGORIES, LENGTHS, Category, Dataset, with_samples
from ropewalk.evaluation.harness.helmet.helmet_inputs import rebuild
from ropewalk.evaluation.harness.helmet.helmet_scores import JUDGED, score_rows, unpublished_row
from ropewalk.evaluation.results_store import Cell, ResultsStore
from ropewalk.evaluation.settings import Setting
from ropewalk.files import sha256_of_json, write_atomically
from ropewalk.training.distributed import Ranks

HARNESS = "helmet"
LAUNCHER = Path(__file__).with_name("helmet_launcher.py")
MISROUTED = ("gpt", "claude", "gemini", "togetherapi")  # words in a path that HELMET takes for the name of an API


def run_helmet(
    checkpoint: EvaluatedCheckpoint, suite: SuiteConfig, test_time: TestTimeConfig, store: ResultsStore, ranks: Ranks
) -> None:
    """Run the categories of ``suite`` that are not finished at each length.

    Raises:
        UserError: for a directory that is not a checkout, a category that HELMET does not have, or a run that failed.
    """
    if ranks.world_size > 1:
        raise UserError("suite=helmet runs HELMET's own process; start scripts/evaluate.py without torchrun for it")
    checkout = check_checkout(suite)
    version = helmet_version(checkout)
    for length, setting in checkpoint.settings(checkpoint.config.lengths, test_time).items():
        columns = checkpoint.columns(setting)
        common = {**columns, "harness": HARNESS, "harness_version": version}
        for name in suite.tasks:
            category = with_samples(CATEGORIES[name], suite.samples)
            cell = Cell(HARNESS, name, length, columns["test_time_scaling"])
            identity = checkpoint.identity(setting, length) | {"harness_version": version}
            identity |= _task_identity(suite, category)
            work = work_directory(store.output, cell, identity)
            identity["judged"] = sorted(path.name for path in (work / name).glob(f"*{JUDGED}"))
            if store.is_finished(cell, identity):
                print(f"kept: {cell}", flush=True)
                continue
            rows = _run_category(checkpoint, suite, (category, length, setting), work, {**common, "category": name})
            store.write(cell, identity, rows, {"command": "in helmet/ beside cells/"})
            print(f"done: {cell}", flush=True)


def check_checkout(suite: SuiteConfig) -> Path:
    """HELMET's checkout, after a check of what the suite needs of it.

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
    """The commit of the checkout, marked if files differ from it; ``unknown`` if git gives none."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=12", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def work_directory(output: Path, cell: Cell, identity: dict[str, Any]) -> Path:
    """HELMET's directory for a length, scaling and identity: one for each, since it keeps outputs of earlier runs."""
    return output / HARNESS / f"{cell.file.stem}.{sha256_of_json(identity)[:8]}"


def _task_identity(suite: SuiteConfig, category: Category) -> dict[str, Any]:
    engine = "endpoint" if suite.helmet.endpoint else f"transformers {suite.helmet.attention}"
    return {"samples": category.samples, "engine": engine, "arguments": list(suite.helmet.arguments)}


def _run_category(
    checkpoint: EvaluatedCheckpoint,
    suite: SuiteConfig,
    part: tuple[Category, int, Setting],
    work: Path,
    common: dict[str, Any],
) -> list[dict[str, Any]]:
    category, length, setting = part
    runnable = [dataset for dataset in category.datasets if published(dataset, length)]
    rows = [unpublished_row(dataset, length, common) for dataset in category.datasets if dataset not in runnable]
    if not runnable:
        return [{**row, "source_file": ""} for row in rows]
    made = work / "data"
    for dataset in runnable:
        if length not in LENGTHS:
            target = made / str(dataset.at(length)["test_files"])
            rebuild_inputs(checkpoint, suite, dataset, target, length, category.samples)
    data = Path(suite.helmet.data or Path(suite.helmet.checkout or "") / "data").resolve()
    config = work / f"{category.name}.yaml"
    if checkpoint.tokenizer.chat_template is None:
        category = replace(category, chat=False)  # a base model gets no template
    write_yaml(config, helmet_yaml(category, runnable, length, data, made.resolve()))
    results = work / category.name
    command = helmet_command(checkpoint, suite, config, results, work / "model", (length, setting))
    run_process(command, Path(suite.helmet.checkout or ""), work / f"{category.name}.log")
    for dataset in runnable:
        rows += score_rows(dataset, length, results, common)
    return [{**row, "source_file": _below(work, results, row)} for row in rows]


def _below(work: Path, results: Path, row: dict[str, Any]) -> str:
    """The path of a row's score file below the output of the evaluation, two levels above ``work``."""
    name = row.get("source_file")
    return (results / name).relative_to(work.parents[1]).as_posix() if name else ""


def rebuild_inputs(
    checkpoint: EvaluatedCheckpoint, suite: SuiteConfig, dataset: Dataset, target: Path, length: int, samples: int
) -> None:
    """Make the inputs of a dataset at a length that HELMET does not publish."""
    tokenizer = checkpoint.tokenizer
    rebuild(
        dataset.name,
        target,
        length,
        samples,
        dataset.size(length) if dataset.name == "json_kv" else None,
        lambda text: len(tokenizer.encode(text, verbose=False)),
        checkpoint.config.seed,
        None if suite.data is None else Path(suite.data),
    )


def helmet_command(
    checkpoint: EvaluatedCheckpoint,
    suite: SuiteConfig,
    config: Path,
    results: Path,
    model: Path,
    at: tuple[int, Setting],
) -> list[str]:
    """The command line of one run.

    In process, HELMET reads a directory whose config.json is compiled for the length, so its transformers needs nothing
    of ours. Behind an endpoint the server must have been started on such a directory; the tokenizer is read from here.

    Raises:
        UserError: for a path that HELMET would take for an API.
    """
    length, setting = at
    path = scaled_copy(checkpoint.directory, model.resolve(), setting, length)
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
    program = shutil.which(name) or name
    return os.path.abspath(program) if os.sep in program else program


def run_process(command: list[str], directory: Path, log: Path) -> None:
    """Run HELMET with its output in ``log``.

    Raises:
        UserError: it cannot be started or fails; with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        out.write(" ".join(command) + "\n")
        out.flush()
        try:
            ended = subprocess.run(command, cwd=directory, stdout=out, stderr=subprocess.STDOUT, check=False)
        except OSError as error:
            raise UserError(
                f"suite.helmet.python={command[0]} cannot be started ({error.strerror}); name the python of HELMET's "
                "environment"
            ) from error
    if ended.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise UserError(f"HELMET ended with code {ended.returncode}: {last[:300]}; all of it is in {log}")


def published(dataset: Dataset, length: int) -> bool:
    """True if the inputs of ``dataset`` at ``length`` are HELMET's own, or can be made anew."""
    return length in LENGTHS or dataset.rebuilt


def helmet_yaml(category: Category, datasets: Sequence[Dataset], length: int, data: Path, made: Path) -> dict[str, Any]:
    """The content of a YAML: parallel comma-separated lists, one entry for each dataset.

    Args:
        category: whose settings apply.
        datasets: of it.
        length: tokens of prompt and answer.
        data: HELMET's data directory.
        made: directory of inputs that were made anew, below which the same names stand.
    """
    rows = [dataset.at(length) for dataset in datasets]
    for row in rows:
        root = data if length in LENGTHS else made
        row["test_files"] = str(root / str(row["test_files"])) if row["test_files"] else ""
        if row["demo_files"] and not str(row["demo_files"]).startswith("prompts/"):
            row["demo_files"] = str(data / str(row["demo_files"]))
    return {
        **{name: ",".join(str(row[name]) for row in rows) for name in rows[0]},
        "use_chat_template": category.chat,
        "max_test_samples": category.samples,
        "shots": category.shots,
        "stop_new_line": category.newline,
    }


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration that eval.py's ``--config`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(content, sort_keys=False))
