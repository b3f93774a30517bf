"""lm-eval's tasks as a harness: one cell for each task, and for each length if the tasks are run at lengths."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint
from ropewalk.evaluation.harness.lm_eval.lm_eval_tasks import (
    harness_version,
    rows_of,
    run_task,
    samples_of,
    task_spec,
)
from ropewalk.evaluation.model_reader import ModelReader
from ropewalk.evaluation.results_store import Cell, ResultsStore
from ropewalk.evaluation.settings import Setting
from ropewalk.training.distributed import Ranks, gather

HARNESS = "lm-eval"


def run_lm_eval(
    checkpoint: EvaluatedCheckpoint, suite: SuiteConfig, test_time: TestTimeConfig, store: ResultsStore, ranks: Ranks
) -> None:
    """Run the tasks of ``suite`` that are not finished, one model in memory at a time.

    Raises:
        UserError: for an unknown task or unreadable data, before and between models; finished cells are kept.
    """
    specs = {task: task_spec(task, suite) for task in suite.tasks}
    lengths = checkpoint.config.lengths if suite.needs_length else [checkpoint.trained_length]
    for length, setting in checkpoint.settings(lengths, test_time).items():
        columns = checkpoint.columns(setting)
        at = length if suite.needs_length else None
        todo = {}
        for task in suite.tasks:
            cell = Cell(HARNESS, task, at, columns["test_time_scaling"])
            identity = {**checkpoint.identity(setting, length), **_task_identity(task, suite)}
            if store.is_finished(cell, identity):
                print(f"kept: {cell}", flush=True)
            else:
                todo[task] = (cell, identity)
        if not todo:
            continue
        lm = language_model(checkpoint, setting, length, suite.overflow, ranks)
        for task, (cell, identity) in todo.items():
            if ranks.rank == 0:
                print(f"begun: {cell}", flush=True)
            lm.cut = Counter()
            results = run_task(lm, specs[task], suite.few_shot.get(task), suite.samples, checkpoint.config.seed, at)
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


def language_model(checkpoint: EvaluatedCheckpoint, setting: Setting, length: int, overflow: str, ranks: Ranks) -> Any:
    """The model as lm-eval takes it, in process or in vLLM, for prompts of ``length`` tokens, answer included."""
    config = checkpoint.config
    if config.backend == "vllm":
        from ropewalk.evaluation.harness.lm_eval.vllm_lm import load_vllm

        return load_vllm(checkpoint, setting, length, overflow)
    from ropewalk.evaluation.harness.lm_eval.reader_lm import ReaderLM  # imports lm-eval, an extra

    model = checkpoint.load(setting, length, ranks.local_device(config.device))
    return ReaderLM(ModelReader(model, config.prefill_chunk), checkpoint.tokenizer, length, overflow, ranks)


def _task_identity(task: str, suite: SuiteConfig) -> dict[str, Any]:
    return {
        "harness_version": harness_version(),
        "few_shot": suite.few_shot.get(task),
        "samples": suite.samples,
        "overflow": suite.overflow,
        "dataset": suite.datasets.get(task, {}),
    }


def _few_shot(results: Any) -> dict[str, int]:
    return {task: count for task, count in results.get("n-shot", {}).items() if isinstance(count, int)}
