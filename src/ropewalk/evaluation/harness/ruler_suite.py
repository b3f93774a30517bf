"""RULER through lm-eval: its task machinery and texts, our lengths and count of samples, upstream's scoring."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import token_count
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint
from ropewalk.evaluation.harness.lm_eval_suite import harness_version, language_model, run_task
from ropewalk.evaluation.harness.ruler_prompts import Sample, build_samples, check_length
from ropewalk.evaluation.harness.ruler_tasks import ALL_TASKS, PUBLISHED_SAMPLES, SCORES, RulerTask, cleaned
from ropewalk.evaluation.results_store import Cell, ResultsStore
from ropewalk.training.distributed import Ranks

HARNESS = "ruler"
WELL_FILLED = 0.9  # of the length; prompts that are shorter on average are reported


def validate_ruler(suite: SuiteConfig, lengths: list[int]) -> None:
    """Raise UserError for a task that RULER does not have, a length that it has no prompts for, or no samples."""
    for name in suite.tasks:
        if name not in ALL_TASKS:
            near = difflib.get_close_matches(name, ALL_TASKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are: {', '.join(ALL_TASKS)}"
            raise UserError(f"suite.tasks: RULER has no task {name!r}; {hint}")
        for length in lengths:
            check_length(length, ALL_TASKS[name])
    if suite.samples is not None and suite.samples < 1:
        raise UserError(f"suite.samples={suite.samples} must be 1 or more, or null for {PUBLISHED_SAMPLES}")


def run_ruler(
    checkpoint: EvaluatedCheckpoint, suite: SuiteConfig, test_time: TestTimeConfig, store: ResultsStore, ranks: Ranks
) -> None:
    """Run the tasks of ``suite`` that are not finished at each length, one model in memory at a time.

    Raises:
        UserError: for a wrong task or length, or missing data; finished cells are kept.
    """
    config = checkpoint.config
    for length, setting in checkpoint.settings(config.lengths, test_time).items():
        columns = checkpoint.columns(setting)
        identity = {
            **checkpoint.identity(setting, length),
            "harness_version": harness_version(),
            "samples": suite.samples or PUBLISHED_SAMPLES,
            "data": "hub" if suite.data is None else "offline",
        }
        cells = {name: Cell(HARNESS, name, length, columns["test_time_scaling"]) for name in suite.tasks}
        todo = {name: cell for name, cell in cells.items() if not store.is_finished(cell, identity)}
        print(f"ruler at {length:,}: {len(cells) - len(todo)} of {len(cells)} tasks kept", flush=True)
        lm = language_model(checkpoint, setting, length, "error", ranks) if todo else None
        for name, cell in todo.items():
            if ranks.rank == 0:
                print(f"begun: {cell}", flush=True)
            task = ALL_TASKS[name]
            samples = _samples(checkpoint, suite, task, length, logs=ranks.rank == 0)
            results = run_task(lm, lm_eval_task(task, samples), None, None, config.seed)
            if results is not None:
                row = {**columns, "harness": HARNESS, "harness_version": f"lm-eval {harness_version()}"}
                _write(store, cell, identity, task, samples, results, row)


def _samples(
    checkpoint: EvaluatedCheckpoint, suite: SuiteConfig, task: RulerTask, length: int, *, logs: bool
) -> list[Sample]:
    count_tokens = partial(token_count, checkpoint.tokenizer)
    data = None if suite.data is None else Path(suite.data)
    count = suite.samples or PUBLISHED_SAMPLES
    try:
        return build_samples(task, count_tokens, length, count, checkpoint.config.seed, data, logs=logs)
    except OSError as error:
        raise UserError(
            f"{task.name}: its texts could not be read ({type(error).__name__}: {str(error)[:200]}); without the hub, "
            "run scripts/fetch_eval_data.sh ruler and set suite.data=data/eval/ruler; finished tasks are kept"
        ) from error


def lm_eval_task(task: RulerTask, samples: list[Sample]) -> Any:
    """The task as lm-eval runs it over these samples."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def dataset(**_: Any) -> dict[str, datasets.Dataset]:
        return {"test": datasets.Dataset.from_list([sample.record() for sample in samples])}

    return ConfigurableTask(
        config={
            "task": task.name,
            "custom_dataset": dataset,
            "dataset_path": "",
            "dataset_name": "",
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": lambda doc: doc["prompt"],
            "doc_to_target": lambda doc: doc["references"],
            "process_results": partial(_score, task.metric),
            "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"do_sample": False, "max_gen_toks": task.new_tokens, "until": []},
            "repeats": 1,
            "metadata": {"version": 1.0},
        }
    )


def _score(metric: str, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {metric: SCORES[metric](cleaned(results[0]), doc["references"])}


def _write(
    store: ResultsStore,
    cell: Cell,
    identity: dict[str, Any],
    task: RulerTask,
    samples: list[Sample],
    results: Any,
    common: dict[str, Any],
) -> None:
    measured = results["results"][task.name]
    error = measured.get(f"{task.metric}_stderr,none")
    row = {
        **common,
        "task": task.name,
        "category": task.category,
        "context_length": cell.length,
        "metric": task.metric,
        "value": measured[f"{task.metric},none"],
        "n": len(samples),
        "stderr": error if isinstance(error, float) else None,
    }
    tokens = [sample.tokens + task.new_tokens for sample in samples]
    mean, length = sum(tokens) / len(tokens), identity["length"]
    about = {"tokens": {"mean": mean, "least": min(tokens), "most": max(tokens)}}
    answers = {sample["doc_id"]: sample["filtered_resps"][0] for sample in results["samples"][task.name]}
    records = [
        {
            "index": sample.index,
            "tokens": sample.tokens,
            "references": sample.references,
            "answer": answers[sample.index],
            task.metric: SCORES[task.metric](cleaned(answers[sample.index]), sample.references),
            "depth": _depth(sample),
        }
        for sample in samples
    ]
    store.write(cell, identity, [row], about, records)
    short = f"; its prompts fill {mean / length:.0%} of the length" if mean < WELL_FILLED * length else ""
    print(f"done: {cell}: {row['value']:.1f} of 100 over {len(samples)} samples{short}", flush=True)


def _depth(sample: Sample) -> float | None:
    """Share of the prompt before its first reference; None: the prompt does not hold it."""
    start = sample.prompt.find(sample.references[0])
    return None if start < 0 else start / len(sample.prompt)
