"""Evaluation by suites (``python scripts/evaluate.py``): every harness, each number in one table."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pandas as pd
from omegaconf import OmegaConf

from ropewalk.config import CONFIG_DIR
from ropewalk.config.evaluation import EvaluateConfig, SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint, open_checkpoint, validate_engine
from ropewalk.evaluation.harness.held_out import passes_of, run_held_out, summarize_held_out, validate_held_out
from ropewalk.evaluation.harness.helmet.helmet_suite import check_checkout, run_helmet
from ropewalk.evaluation.harness.lm_eval_suite import check_scorers, check_tasks, run_lm_eval
from ropewalk.evaluation.harness.ruler_suite import run_ruler, validate_ruler
from ropewalk.evaluation.harness.vision_needle import run_vniah, summarize_vniah, validate_vniah
from ropewalk.evaluation.paper import beside_published, not_measured, read_published
from ropewalk.evaluation.results import TABLE, averages, not_finite, read_results, stratum_words
from ropewalk.evaluation.results_store import ResultsStore
from ropewalk.files import replace_atomically, write_atomically
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.distributed import Ranks, gather, held_directory, join_launched, rank_zero_first

Option = TypeVar("Option")
PATIENCE = timedelta(days=7)  # one rank's long prompts may keep the others waiting for hours
PAPER_CSV = "paper.csv"
NOT_FINITE = "not_finite.txt"  # numbers that are NaN or infinite; empty: there are none
VNIAH = "vniah"
HARNESSES = {
    "quick": run_held_out, "ruler": run_ruler, "lm_eval": run_lm_eval, "helmet": run_helmet, VNIAH: run_vniah,
}  # fmt: skip
SUITES = "suites"  # in place of a harness: a suite of suites
# Fields that mean something of a suite of suites; lengths and published are read before it is taken apart.
OF_SEVERAL = ("name", "harness", "suites", "lengths", "samples", "data", "unscaled_too", "published", "helmet")
SUMMARIZED = ("ruler", "lm-eval", "helmet")


def evaluate(config: EvaluateConfig, ranks: Ranks | None = None) -> pd.DataFrame:
    """Run ``config.suite``, keep what is finished, and print what the table holds.

    Args:
        config: of the evaluation.
        ranks: processes that share the samples; None: those that torchrun or srun started.

    Returns:
        the table of everything measured into ``config.output`` so far.

    Raises:
        UserError: for a wrong configuration, checkpoint, document, task or file; if possible, before a model is
            loaded.
    """
    suites = validate_suites(config)
    for suite in suites:
        check_scorers(suite)
    published = None if config.suite.published is None else read_published(config.suite.published)
    ranks = ranks or join_launched(timeout=PATIENCE)
    of_vision = any(suite.harness == VNIAH for suite in suites)
    checkpoint = rank_zero_first(lambda: open_checkpoint(config, of_vision=of_vision))  # it may export the run
    with held_directory(Path(config.output), f"output={config.output}"):
        _run_suites(config, suites, checkpoint, published, ranks)
    return read_results(config.output)


def _run_suites(
    config: EvaluateConfig,
    suites: Sequence[SuiteConfig],
    checkpoint: EvaluatedCheckpoint,
    published: pd.DataFrame | None,
    ranks: Ranks,
) -> None:
    output = Path(config.output)
    (output / NOT_FINITE).unlink(missing_ok=True)
    store = ResultsStore(output, config.overwrite, checkpoint.run)
    for suite in suites:
        for test_time in test_times_of(config, suite):
            HARNESSES[suite.harness](checkpoint, suite, test_time, store, ranks)
            if ranks.rank == 0 and suite.harness != VNIAH:  # which records factors with it
                record_test_time(checkpoint, test_time, store)
    gather(None)
    if ranks.rank == 0:
        store.write_tables()
        print(summarize(read_results(output), suites), flush=True)
        if published is not None:
            print(compare_published(output, published), flush=True)
        lines = not_finite(output)
        write_atomically(output / NOT_FINITE, "".join(f"{line}\n" for line in lines))
        print("\n".join([*(f"warning: not a finite number: {line}" for line in lines), next_step(output)]), flush=True)


def next_step(output: Path) -> str:
    """The place of the results, and the command that shows them."""
    run = output.parent if RunDirectory(output.parent).evaluation == output else output
    command = shlex.join(["python", "scripts/compare.py", f"runs=[{run}]"])
    return f"results: {output / TABLE}\nnext, with other runs beside it: {command}"


def test_times_of(config: EvaluateConfig, suite: SuiteConfig) -> list[TestTimeConfig]:
    """The test-time settings that a suite is run under, each name once.

    Raises:
        UserError: for a name that configs/test_time does not have.
    """
    settings = [config.test_time]
    settings += [read_option("test_time", name, TestTimeConfig, "test_time") for name in config.test_times]
    settings += [TestTimeConfig(name="none")] if suite.unscaled_too else []
    return list({setting.name: setting for setting in reversed(settings)}.values())[::-1]


def record_test_time(checkpoint: EvaluatedCheckpoint, test_time: TestTimeConfig, store: ResultsStore) -> None:
    """Record in ``store`` which scaling a test-time setting has at each length."""
    lengths = checkpoint.config.lengths
    scalings: dict[int | None, str] = {
        length: checkpoint.columns(setting)["test_time_scaling"]
        for length, setting in checkpoint.settings([*lengths, checkpoint.trained_length], test_time).items()
    }
    scalings[None] = scalings[checkpoint.trained_length]
    store.record_test_time(test_time.name, scalings, [s.longest for s in passes_of(checkpoint, test_time)])


def flattened(suite: SuiteConfig, data_dir: str) -> Iterator[SuiteConfig]:
    """The suites that a suite is made of; itself if it is not a suite of suites.

    Its samples and data, if set, its helmet and its unscaled_too go down to them.

    Raises:
        UserError: for a harness or suite that is not known, or a field that a suite of suites does not have.
    """
    if suite.harness not in (*HARNESSES, SUITES):
        raise UserError(f"suite.harness={suite.harness} is not known; use one of: {', '.join([*HARNESSES, SUITES])}")
    if suite.harness != SUITES:
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
        part = read_option("suite", name, SuiteConfig, "suite.suites", data_dir)
        given = {field: value for field in ("samples", "data") if (value := getattr(suite, field)) is not None}
        yield replace(part, **given, unscaled_too=suite.unscaled_too, helmet=suite.helmet)


def read_option(group: str, name: str, schema: type[Option], key: str, data_dir: str = "data") -> Option:
    """The option ``name`` of a config group, a file of configs/``group``.

    Raises:
        UserError: there is no such file; ``key`` is what named it.
    """
    path = CONFIG_DIR / group / f"{name}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(f"{key}: there is no {group} {name!r}; did you mean {near[0] if near else ', '.join(names)}?")
    whole = OmegaConf.create({group: OmegaConf.load(path), "paths": {"data_dir": data_dir}})
    loaded = OmegaConf.to_container(whole, resolve=True)[group]  # type: ignore[index,call-overload]
    option = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), loaded))
    assert isinstance(option, schema)
    return option


def compare_published(output: Path, published: pd.DataFrame) -> str:
    """Write paper.csv, the table's numbers beside published ones, and return it as text."""
    table = read_results(output)
    beside = beside_published(table, published)
    replace_atomically(output / PAPER_CSV, lambda path: beside.to_csv(path, index=False))
    shown = beside.drop(columns=["run", "tasks"]).to_string(index=False, na_rep="-", float_format="{:.2f}".format)
    return "\n".join(filter(None, [shown if len(beside) else "", not_measured(table, published)]))


def validate_suites(config: EvaluateConfig) -> list[SuiteConfig]:
    """The suites of an evaluation, after all was checked that needs no checkpoint, documents, device or scorers.

    Raises:
        UserError: for a suite, task, length, HELMET checkout or file that is not there, a setting that does not hold,
            or lm-eval that is not installed.
    """
    suites = list(flattened(config.suite, config.paths.data_dir))
    validate_engine(config)
    test_times_of(config, config.suite)
    if config.suite.published is not None:
        read_published(config.suite.published)
    for suite in suites:
        if suite.data is not None and not Path(suite.data).is_dir():
            raise UserError(f"suite.data={suite.data} is not a directory; scripts/fetch_eval_data.sh brings it")
    needs = [suite.name for suite in suites if suite.harness in ("ruler", "lm_eval")]
    if needs and find_spec("lm_eval") is None:
        raise UserError(f"suite={needs[0]} runs through lm-eval, which is not installed; pip install 'ropewalk[eval]'")
    for suite in sorted(suites, key=lambda suite: suite.harness == "lm_eval"):  # whose check takes seconds, last
        if suite.harness == "quick":
            validate_held_out(config)
        elif suite.harness == "ruler":
            validate_ruler(suite, config.lengths)
        elif suite.harness == "lm_eval":
            check_tasks(suite)
        elif suite.harness == "helmet":
            check_checkout(suite)
        elif suite.harness == VNIAH:
            validate_vniah(config)
    if len({suite.harness == VNIAH for suite in suites}) > 1:
        raise UserError(
            f"suite={config.suite.name} holds V-NIAH, for models of images and videos, beside suites of text; run "
            "suite=vniah by itself"
        )
    return suites


def summarize(table: pd.DataFrame, suites: Sequence[SuiteConfig]) -> str:
    """One block for each harness of ``suites`` and scaling: task by length, then the averages, tasks named."""
    harnesses = {suite.harness for suite in suites}
    blocks = [summarize_held_out(table)] if "quick" in harnesses else []
    blocks += [summarize_vniah(table)] if VNIAH in harnesses else []
    scored = table[table["harness"].isin(SUMMARIZED) & table["depth"].isna()]
    scored = scored.assign(metric=[row["metric"] + stratum_words(row) for row in scored.to_dict("records")])
    for (harness, scaling), rows in scored.groupby(["harness", "test_time_scaling"]):
        shown = rows.assign(length=rows["context_length"].astype("string").fillna("own"))
        scores = shown.groupby(["task", "metric", "length"], sort=False)["value"].first().unstack(sort=False)
        blocks.append(
            f"{harness}, test-time scaling {scaling}\n{scores.to_string(float_format='{:.2f}'.format, na_rep='-')}"
        )
    blocks += [line for suite in suites for line in average_lines(table, suite)]
    return "\n\n".join(blocks)


def average_lines(table: pd.DataFrame, suite: SuiteConfig) -> list[str]:
    """Each average of a suite in words: value, length, how many tasks, which, and which are missing."""
    wanted = table["task"].map(suite.metrics)
    chosen = table[wanted.isna() | (table["metric"] == wanted)]  # of a task with a chosen metric, that metric alone
    lines = []
    for name, tasks in suite.averages.items():
        for _, row in averages(chosen, tasks).iterrows():
            length = "" if pd.isna(row["context_length"]) else f" at {row['context_length']:,}"
            missing = f"; missing: {row['missing']}" if row["missing"] else ""
            lines.append(
                f"{name}{length}, scaling {row['test_time_scaling']}: {row['value']:.2f} over {row['n_tasks']} of "
                f"{len(tasks)} tasks: {row['tasks']}{missing}"
            )
    return lines
