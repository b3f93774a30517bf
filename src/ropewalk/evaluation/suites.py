"""``python scripts/evaluate.py``: every suite, each number in one table."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from ropewalk.config import CONFIG_DIR
from ropewalk.config.evaluation import EvaluateConfig, SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.cells import Cell, CellStore
from ropewalk.evaluation.harness.tasks import check_scorers, check_tasks
from ropewalk.evaluation.helmet.run import check_checkout, run_helmet
from ropewalk.evaluation.paper import beside_published, not_measured, read_published
from ropewalk.evaluation.plan import check_engine, check_settings
from ropewalk.evaluation.results import RESULTS, writable_directory
from ropewalk.evaluation.ruler.run import check_ruler, run_ruler
from ropewalk.evaluation.run import evaluate
from ropewalk.evaluation.subject import Subject, make_subject
from ropewalk.evaluation.summary import summarize
from ropewalk.evaluation.table import LOSS_METRICS, read_table
from ropewalk.files import replace_atomically
from ropewalk.training.distributed import Ranks, gather, join_launched, rank_zero_first

PAPER_CSV = "paper.csv"
UNSCALED = TestTimeConfig(name="none")
PATIENCE = timedelta(days=7)  # one rank's long prompts may keep the others waiting for hours
HARNESSES = ("quick", "ruler", "lm_eval", "helmet", "suites")
# Fields that mean something of a suite of suites; lengths and published are read before it is taken apart.
OF_SEVERAL = ("name", "harness", "suites", "lengths", "samples", "data", "unscaled_too", "published", "helmet")


def evaluate_suite(config: EvaluateConfig) -> pd.DataFrame:
    """Run ``config.suite``, keep what is finished, and print what the table holds.

    Returns:
        the table of everything measured into ``config.output`` so far.

    Raises:
        UserError: for a wrong configuration, checkpoint, task or file, before a model is loaded where possible.
    """
    suites = checked_suites(config)
    for suite in suites:
        check_scorers(suite)
    published = None if config.suite.published is None else read_published(config.suite.published)
    ranks = join_launched(timeout=PATIENCE)
    subject = rank_zero_first(lambda: make_subject(config))  # it may export the run
    output = writable_directory("output", config.output)
    store = CellStore(output, config.overwrite)
    for suite in suites:
        for test_time in [config.test_time, *([UNSCALED] if suite.unscaled_too else [])]:
            _run(subject, suite, test_time, store, ranks)
    gather(None)
    if ranks.rank == 0:
        store.write_table()
        print(summarize(read_table(output), suites), flush=True)
        if published is not None:
            print(compare_published(output, published), flush=True)
    return read_table(output)


def flattened(suite: SuiteConfig, data_dir: str) -> Iterator[SuiteConfig]:
    """The suites that a suite is made of, itself where it is one.

    Its samples and data, where set, its helmet and unscaled_too go down to them.

    Raises:
        UserError: for a harness or suite that is not known, or a field that a suite of suites does not have.
    """
    if suite.harness not in HARNESSES:
        raise UserError(f"suite.harness={suite.harness} is not known; use one of: {', '.join(HARNESSES)}")
    if suite.harness != "suites":
        yield suite
        return
    plain = SuiteConfig()
    for field in fields(suite):
        if field.name not in OF_SEVERAL and getattr(suite, field.name) != getattr(plain, field.name):
            raise UserError(
                f"suite.{field.name} is each part's own, and suite={suite.name} is made of {', '.join(suite.suites)}; "
                f"run the part by itself (suite={suite.suites[0] if suite.suites else 'ruler'}) to set it"
            )
    for name in suite.suites:
        part = read_suite(name, data_dir)
        given = {field: value for field in ("samples", "data") if (value := getattr(suite, field)) is not None}
        yield replace(part, **given, unscaled_too=suite.unscaled_too, helmet=suite.helmet)


def read_suite(name: str, data_dir: str) -> SuiteConfig:
    """The suite of a file of configs/suite.

    Raises:
        UserError: where there is no such file.
    """
    path = CONFIG_DIR / "suite" / f"{name}.yaml"
    if not path.is_file():
        names = [file.stem for file in path.parent.glob("*.yaml")]
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"suite.suites: there is no suite {name!r}; did you mean {near[0] if near else ', '.join(names)}?"
        )
    whole = OmegaConf.create({"suite": OmegaConf.load(path), "paths": {"data_dir": data_dir}})
    loaded = OmegaConf.to_container(whole, resolve=True)["suite"]  # type: ignore[index,call-overload]
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SuiteConfig), loaded))
    assert isinstance(found, SuiteConfig)
    return found


def compare_published(output: Path, published: pd.DataFrame) -> str:
    """Write paper.csv, the table's numbers beside published ones, and return it as text."""
    table = read_table(output)
    beside = beside_published(table, published)
    replace_atomically(output / PAPER_CSV, lambda path: beside.to_csv(path, index=False))
    shown = beside.drop(columns=["run", "tasks"]).to_string(index=False, na_rep="-", float_format="{:.2f}".format)
    return "\n".join(filter(None, [shown if len(beside) else "", not_measured(table, published)]))


def checked_suites(config: EvaluateConfig) -> list[SuiteConfig]:
    """The suites of an evaluation, after all was checked that needs no checkpoint, documents, device or scorers.

    Raises:
        UserError: for a suite, task, length, HELMET checkout or file that is not there, a setting that does not hold,
            or lm-eval that is not installed.
    """
    suites = list(flattened(config.suite, config.paths.data_dir))
    check_engine(config)
    if config.suite.published is not None:
        read_published(config.suite.published)
    for suite in suites:
        if suite.data is not None and not Path(suite.data).is_dir():
            raise UserError(f"suite.data={suite.data} is no directory; scripts/fetch_eval_data.sh brings it")
    needs = [suite.name for suite in suites if suite.harness in ("ruler", "lm_eval")]
    if needs and find_spec("lm_eval") is None:
        raise UserError(f"suite={needs[0]} runs through lm-eval, which is not installed; pip install 'ropewalk[eval]'")
    for suite in sorted(suites, key=lambda suite: suite.harness == "lm_eval"):  # whose check takes seconds, last
        if suite.harness == "quick":
            check_settings(config)
        elif suite.harness == "ruler":
            check_ruler(suite, config.lengths)
        elif suite.harness == "lm_eval":
            check_tasks(suite)
        elif suite.harness == "helmet":
            check_checkout(suite)
    return suites


def _run(subject: Subject, suite: SuiteConfig, test_time: TestTimeConfig, store: CellStore, ranks: Ranks) -> None:
    if suite.harness == "quick":
        run_quick(subject, test_time, store, ranks)
    elif suite.harness == "ruler":
        run_ruler(subject, suite, test_time, store, ranks)
    elif suite.harness == "lm_eval":
        from ropewalk.evaluation.harness.run import run_lm_eval

        run_lm_eval(subject, suite, test_time, store, ranks)
    else:
        run_helmet(subject, suite, test_time, store, ranks)


def run_quick(subject: Subject, test_time: TestTimeConfig, store: CellStore, ranks: Ranks) -> None:
    """Loss by position and the needle grid, and their rows in the table."""
    config = replace(subject.config, test_time=test_time)
    results = evaluate(config, ranks)
    gather(None)  # before results.parquet is made, no rank may look for it
    if ranks.rank:
        return
    settings = subject.settings(config.lengths, test_time)
    for length, rows in results.groupby("context_length"):
        columns = subject.columns(settings[int(length)])
        cell = Cell("ropewalk", "quick", int(length), columns["test_time_scaling"])
        identity = {**subject.identity(settings[int(length)], int(length)), "version": version("ropewalk")}
        store.write(cell, identity, [_quick_row(row, columns) for row in rows.to_dict("records")], {})


def _quick_row(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A row of results.parquet as one of the table: shares in percent, the bucket of positions in the task's name."""
    loss = row["metric"].removesuffix("_shuffled") in LOSS_METRICS
    scale = 1.0 if loss else 100.0
    task = row["task"]
    if task == "loss_by_position":
        task = f"loss_by_position[{row['position_start']},{row['position_end']})"
    return {
        **columns,
        "harness": "ropewalk",
        "harness_version": row["harness_version"],
        "task": task,
        "category": row["category"],
        "context_length": row["context_length"],
        "depth": row["depth"],
        "metric": row["metric"],
        "value": row["value"] * scale,
        "n": row["n"],
        "stderr": row["stderr"] * scale,
        "source_file": Path(RESULTS).name,
    }
