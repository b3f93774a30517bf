"""The suites that lm-eval's tasks make: one cell for each task, and each length where the tasks are run at lengths."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.evaluation.cells import Cell, CellStore
from ropewalk.evaluation.harness.tasks import (
    harness_version,
    rows_of,
    run_task,
    samples_of,
    task_spec,
)
from ropewalk.evaluation.subject import Subject
from ropewalk.training.distributed import Ranks, gather

HARNESS = "lm-eval"


def run_lm_eval(
    subject: Subject, suite: SuiteConfig, test_time: TestTimeConfig, store: CellStore, ranks: Ranks
) -> None:
    """Run what is not finished of ``suite``, one model in memory at a time.

    Raises:
        UserError: for an unknown task or unreadable data, before and between models; finished cells are kept.
    """
    specs = {task: task_spec(task, suite) for task in suite.tasks}
    lengths = subject.config.lengths if suite.needs_length else [subject.trained_length]
    for length, setting in subject.settings(lengths, test_time).items():
        columns = subject.columns(setting)
        at = length if suite.needs_length else None
        todo = {}
        for task in suite.tasks:
            cell = Cell(HARNESS, task, at, columns["test_time_scaling"])
            identity = {**subject.identity(setting, length), **_asked(task, suite)}
            if store.is_finished(cell, identity):
                print(f"kept: {cell}", flush=True)
            else:
                todo[task] = (cell, identity)
        if not todo:
            continue
        lm = subject.language_model(setting, length, suite.overflow, ranks)
        for task, (cell, identity) in todo.items():
            if ranks.rank == 0:
                print(f"begun: {cell}", flush=True)
            lm.cut = Counter()
            results = run_task(lm, specs[task], suite.few_shot.get(task), suite.samples, subject.config.seed, at)
            cut = sum((Counter(part) for part in gather(dict(lm.cut))), Counter())
            if results is not None:
                common = {
                    **columns,
                    "harness": HARNESS,
                    "harness_version": harness_version(),
                    "category": suite.name,
                    "context_length": at,
                }
                about = {"few_shot": _few_shot(results), "prompts_cut_in_the_middle": dict(cut)}
                store.write(cell, identity, list(rows_of(results, common)), about, list(samples_of(results)))
                print(f"done: {cell}{f'; cut in the middle: {sum(cut.values())} prompts' if cut else ''}", flush=True)


def _asked(task: str, suite: SuiteConfig) -> dict[str, Any]:
    """What a task's numbers depend on besides the model."""
    return {
        "harness_version": harness_version(),
        "few_shot": suite.few_shot.get(task),
        "samples": suite.samples,
        "overflow": suite.overflow,
        "dataset": suite.datasets.get(task, {}),
    }


def _few_shot(results: Any) -> dict[str, int]:
    return {task: count for task, count in results.get("n-shot", {}).items() if isinstance(count, int)}
