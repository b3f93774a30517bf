"""HELMET's own eval.py, run as a process of the user's environment for each category and length, and its scores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint, Setting
from ropewalk.evaluation.harness.helmet.helmet_datasets import (
    CATEGORIES,
    LENGTHS,
    Category,
    Dataset,
    rebuild,
)
from ropewalk.evaluation.results import NEEDS_JUDGE, UNPARSED, UNPUBLISHED
from ropewalk.evaluation.results_store import Cell, ResultsStore
from ropewalk.files import sha256_of_json, write_atomically
from ropewalk.training.distributed import Ranks

HARNESS = "helmet"
LAUNCHER = Path(__file__).with_name("helmet_launcher.py")
JUDGED = "-gpt4eval_o.json"  # what HELMET's own judge scripts write beside the outputs
PERCENT_OF = {
    "gpt-4-f1": 100.0,
    "gpt-4-score": 100.0 / 3,
}  # of what those hold; .score files are in percent
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
            category = CATEGORIES[name]
            category = replace(category, samples=suite.samples or category.samples)
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
    runnable = [dataset for dataset in category.datasets if length in LENGTHS or dataset.rebuilt]
    rows = [unpublished_row(dataset, length, common) for dataset in category.datasets if dataset not in runnable]
    if not runnable:
        return [{**row, "source_file": ""} for row in rows]
    made = work / "data"
    for dataset in runnable:
        if length not in LENGTHS:
            target = made / str(dataset.at(length)["test_files"])
            rebuild(dataset, target, length, category.samples, checkpoint.tokenizer, checkpoint.config.seed, suite.data)
    data = Path(suite.helmet.data or Path(suite.helmet.checkout or "") / "data").resolve()
    config = work / f"{category.name}.yaml"
    if checkpoint.tokenizer.chat_template is None:
        category = replace(category, chat=False)  # a base model gets no template
    content = helmet_yaml(category, runnable, length, data, made.resolve())
    config.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config, yaml.safe_dump(content, sort_keys=False))
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
    path = checkpoint.scaled_copy(model.resolve(), setting, length)
    if word := next((word for word in MISROUTED if word in str(path)), None):
        raise UserError(f"{path} holds {word!r}, by which HELMET would call an API; name another output")
    options = ["--config", str(config.resolve()), "--model_name_or_path", str(path)]
    options += ["--output_dir", str(results.resolve()), "--tag", "ropewalk", "--seed", "42"]
    if suite.helmet.endpoint:
        options += ["--use_tgi_or_vllm_serving", "--endpoint_url", suite.helmet.endpoint]
    checkout = str(Path(suite.helmet.checkout or "").resolve())
    launch = [_program(suite.helmet.python), str(LAUNCHER), checkout, suite.helmet.attention]
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


def score_rows(dataset: Dataset, length: int, output: Path, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of one dataset at one length: its scores, or a row without a value whose metric says why.

    Where HELMET parses answers, one more row is the percent of them in which it found nothing, which score what an
    empty answer does: those whose first line is empty, and rankings without a number.

    Args:
        dataset: which.
        length: tokens.
        output: directory that eval.py wrote into.
        common: columns that all rows share.

    Raises:
        UserError: eval.py wrote no score for a dataset that it scores.
    """
    task = dataset.name
    row = {**common, "task": task, "context_length": length}
    stem = find_output(dataset, length, output)
    judged = stem.with_name(stem.name.removesuffix(".json") + JUDGED)
    unparsed = list(_unparsed(stem, row)) if dataset.parsed else []
    if dataset.judge and not judged.is_file():
        return [{**row, "metric": NEEDS_JUDGE, "value": None, "n": 0, "source_file": stem.name}, *unparsed]
    source = judged if dataset.judge else stem.with_name(stem.name + ".score")
    if not source.is_file():
        raise UserError(f"{output}: HELMET wrote no score for {task} at {length}; its log says why ({stem.name})")
    return [*_scored(dataset, source, stem, row), *unparsed]


def unpublished_row(dataset: Dataset, length: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a dataset whose inputs at ``length`` nobody can rebuild."""
    return {**common, "task": dataset.name, "context_length": length, "metric": UNPUBLISHED, "value": None, "n": 0}


def find_output(dataset: Dataset, length: int, output: Path) -> Path:
    """The JSON of outputs that eval.py wrote for a dataset at a length.

    Raises:
        UserError: there is none, or several of different settings.
    """
    tail = dataset.at(length)["datasets"]
    outputs = sorted(output.glob(f"{tail}_*_in{length}_*.json"))
    outputs = [path for path in outputs if not path.name.endswith(JUDGED)]
    if len(outputs) != 1:
        names = ", ".join(path.name for path in outputs) or "none"
        raise UserError(
            f"{output} must hold one output of HELMET for {tail} at {length}, and holds: {names}; delete what other "
            "settings left there, or look into its log"
        )
    return outputs[0]


def _scored(dataset: Dataset, source: Path, stem: Path, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    scores = json.loads(source.read_text(encoding="utf-8"))
    scores = scores.get("averaged_metrics", scores)
    outputs = json.loads(stem.read_text(encoding="utf-8"))
    for metric in dataset.metrics:
        if metric not in scores:
            raise UserError(f"{source} has no {metric}; it holds: {', '.join(scores)}")
        values = outputs.get("metrics", {}).get(metric, [])
        yield {
            **row,
            "metric": metric,
            "value": scores[metric] * PERCENT_OF.get(metric, 1.0),
            "n": len(outputs["data"]),
            "stderr": _stderr(values),
            "source_file": source.name,
        }


def _unparsed(stem: Path, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    outputs = json.loads(stem.read_text(encoding="utf-8"))["data"]
    parsed = [output["parsed_output"] for output in outputs if "parsed_output" in output]
    if parsed:
        shares = [float(_is_empty(answer)) for answer in parsed]
        value = 100 * sum(shares) / len(shares)
        error = _stderr(shares)
        yield {**row, "metric": UNPARSED, "value": value, "n": len(shares), "stderr": error, "source_file": stem.name}


def _is_empty(parsed: str | dict[str, int] | None) -> bool:
    """True for what HELMET's parsers leave of an answer that they find nothing in; a ranking is a mapping from IDs."""
    if isinstance(parsed, dict):
        return not any(name.isdigit() for name in parsed)
    return parsed is None or not parsed.strip()


def _stderr(values: list[float]) -> float | None:
    """Standard error, in percent, of the mean of per-sample scores of 0 to 1; None: there are fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return float(100 * (sum((value - mean) ** 2 for value in values) / (n - 1) / n) ** 0.5)
