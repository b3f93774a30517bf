"""lm-eval's tasks as a harness: one cell for each task, and for each length if the tasks are run at lengths."""

from __future__ import annotations

import difflib
import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ropewalk.config.evaluation import SuiteConfig
from ropewalk.config.groups import TestTimeConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import token_count
from ropewalk.evaluation.evaluated_checkpoint import EvaluatedCheckpoint, Setting
from ropewalk.evaluation.model_reader import ModelReader
from ropewalk.evaluation.results_store import Cell, ResultsStore
from ropewalk.training.distributed import Ranks, gather

SHARES = (
    "acc",
    "acc_norm",
    "exact_match",
    "f1",
    "flexible_f1",
    "score",
)  # 0 to 1 in lm-eval; so is every metric named *_score
OF_LONGBENCH = ("jieba", "fuzzywuzzy", "rouge")  # packages that its tasks import
BABILONG_UNIT = 1024  # tokens of the k in its lengths


def harness_version() -> str:
    """For the table."""
    return version("lm_eval")


@cache
def task_manager(metadata: str = "{}") -> Any:
    """lm-eval's index of tasks, which get ``metadata`` (JSON); reading it takes some ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=json.loads(metadata))


@cache
def _names_in_files() -> frozenset[str]:
    """Names of tasks and groups on lines of their own in lm-eval's files, most of its index, in a second."""
    import lm_eval

    texts = (file.read_text(encoding="utf-8") for file in Path(lm_eval.__file__).parent.glob("tasks/**/*.yaml"))
    found = (
        re.search(r"^task: ?([\w-]+)$", text, re.M) or re.search(r"^group: ?([\w-]+)$", text, re.M) for text in texts
    )
    return frozenset(match[1] for match in found if match)


def nearest(name: str, names: list[str]) -> str:
    """A hint for a task that is not among ``names``."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {len(names)}, such as {', '.join(names[:5])}"


def check_tasks(suite: SuiteConfig) -> None:
    """Raise UserError for a task that lm-eval does not have, under any key of the suite."""
    for task in suite.strata:
        if task not in suite.metrics:
            raise UserError(f"suite.strata={task}: nothing says which metric of it; set suite.metrics.{task}")
    for key in ("tasks", "few_shot", "datasets", "metrics", "strata"):
        for task in getattr(suite, key):
            if task not in _names_in_files() and task not in (known := task_manager().all_tasks):
                raise UserError(
                    f"suite.{key}: lm-eval {harness_version()} has no task {task!r}; {nearest(task, known)} "
                    "(`lm_eval ls tasks` lists them)"
                )


def check_scorers(suite: SuiteConfig) -> None:
    """Raise UserError for tasks whose scores need packages that are not installed here."""
    scorers = [name for name in OF_LONGBENCH if find_spec(name) is None]
    if scorers and any(task.startswith("longbench") for task in suite.tasks):
        raise UserError(
            f"suite={suite.name}: LongBench's scores need {', '.join(scorers)}, of lm-eval's extra longbench; "
            "pip install 'ropewalk[eval]'"
        )


def task_spec(name: str, suite: SuiteConfig) -> str | dict[str, Any]:
    """A task for lm-eval: its name, or its configuration with the suite's data in place of the hub's.

    Raises:
        UserError: a data file is missing.
    """
    fields = suite.datasets.get(name)
    if not fields:
        return name
    from lm_eval.tasks._yaml_loader import load_yaml

    path = task_manager().task_index[name].yaml_path
    spec = {**load_yaml(path, resolve_func=True), **fields}
    files = dict(spec.get("dataset_kwargs", {}).get("data_files", {}))
    for split, file in files.items():
        whole = Path(suite.data or ".") / file
        if not whole.is_file():
            raise UserError(
                f"{name}: {whole} is missing; scripts/fetch_eval_data.sh short writes it, or name "
                "its directory with suite.data"
            )
        files[split] = str(whole)
    if files:
        spec["dataset_kwargs"] = {**spec["dataset_kwargs"], "data_files": files}
    return spec


def run_task(
    lm: Any, spec: Any, few_shot: int | None, samples: int | None, seed: int, length: int | None = None
) -> Any:
    """lm-eval's results of one task or group of tasks; None on every rank but the first.

    Its ``evaluate`` is called, not ``simple_evaluate``, which spends seconds of every call on describing the machine.

    Args:
        lm: lm-eval's model.
        spec: a name, a configuration or a task.
        few_shot: examples before each question; None: the task's own number. A task fixed at none stays there.
        samples: questions of each task; None: all.
        seed: of the choice of examples.
        length: tokens, for the tasks that need it.

    Raises:
        UserError: the data cannot be read.
    """
    import httpx
    from lm_eval.api.task import Task
    from lm_eval.evaluator import evaluate

    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)
    try:
        if isinstance(spec, Task):
            loaded: Any = {"tasks": {spec.task_name: spec}, "groups": {}, "group_map": {}}
        else:
            loaded = task_manager(_metadata(spec, length)).load([spec])
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if few_shot is not None and own != 0:
                task.set_config(key="num_fewshot", value=few_shot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
        return evaluate(lm, loaded, limit=samples, bootstrap_iters=1000)
    except (OSError, httpx.HTTPError) as error:
        name = spec if isinstance(spec, str) else getattr(spec, "task_name", None) or spec["task"]
        raise UserError(
            f"the data of {name} could not be read ({type(error).__name__}: {str(error).splitlines()[0][:200]}); if "
            "the hub is not to be reached from here, fill its cache (HF_HOME) on a machine that reaches it, or give "
            "offline data (suite=short_offline); finished tasks are kept"
        ) from error


def _metadata(spec: Any, length: int | None) -> str:
    """Metadata of a task, as JSON: for BABILong the size of its set, by name."""
    needs_length = isinstance(spec, str) and spec.startswith("babilong") and length is not None
    return json.dumps({"max_seq_lengths": f"{length // BABILONG_UNIT}k"} if needs_length and length else {})


def rows_of(results: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the table for every task and group in lm-eval's results.

    A group's row is lm-eval's own aggregate over the rows beside it, and its category is ``group``.
    """
    groups = results.get("groups", {})
    for name, metrics in results["results"].items():
        n = metrics.get("sample_len") or sum(_counts(results, name))
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if "_stderr" in metric or not filtered or not isinstance(value, (int, float)):
                continue
            scale = _scale(metric)
            error = metrics.get(f"{metric}_stderr,{filtered}")
            yield {
                **common,
                "task": name,
                "category": "group" if name in groups else common["category"],
                "metric": metric if filtered == "none" else key,
                "value": value * scale,
                "n": n,
                "stderr": error * scale if isinstance(error, (int, float)) else math.nan,
            }


def stratum_rows(
    results: Mapping[str, Any], task: str, metric: str, tokens: Callable[[str], int], common: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A task's score over the prompts of each length stratum, from 2^k to 2^(k + 1) - 1 tokens, the shortest first.

    A prompt counts by its own length, whatever of it is cut to the length that the task is run at, so strata hold the
    same prompts at every one. A group's prompts are pooled, as in a mean that is weighted by size.

    Args:
        results: lm-eval's, of this task or group alone, with samples.
        task: its name.
        metric: as in the table: ``acc``, or ``exact_match,get-answer`` with a filter.
        tokens: of a text.
        common: columns that all rows share.
    """
    name, _, filtered = metric.partition(",")
    scale = _scale(name)
    strata: dict[int, list[float]] = {}
    for samples in results["samples"].values():
        for sample in samples:
            if sample["filter"] == (filtered or "none"):
                prompt = sample["arguments"][0][0]
                strata.setdefault(tokens(prompt).bit_length() - 1, []).append(scale * sample[name])
    for exponent, values in sorted(strata.items()):
        yield {
            **common,
            "task": task,
            "category": "group" if task in results.get("groups", {}) else common["category"],
            "metric": metric,
            "position_start": 2**exponent,
            "position_end": 2 ** (exponent + 1),
            "value": float(np.mean(values)),
            "n": len(values),
            "stderr": float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan,
        }


def _scale(metric: str) -> float:
    """Factor from lm-eval's number to the table's: percent of a share, else as it is."""
    return 100.0 if metric in SHARES or metric.endswith("_score") else 1.0


def _counts(results: Mapping[str, Any], group: str) -> Iterator[int]:
    """Samples of every task below a group."""
    for member in results.get("group_subtasks", {}).get(group, ()):
        counted = results["n-samples"].get(member)
        yield from [counted["effective"]] if counted else _counts(results, member)


def samples_of(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Question by question, a JSON object with target, answers and scores."""
    for task, samples in results.get("samples", {}).items():
        for sample in samples:
            yield {
                "task": task,
                "doc_id": sample["doc_id"],
                "filter": sample["filter"],
                "target": str(sample["target"]),
                "answers": [str(answer) for answer in sample["filtered_resps"]],
                **{metric: sample[metric] for metric in sample["metrics"] if isinstance(sample[metric], (int, float))},
            }


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
                rows = list(rows_of(results, common))
                if task in suite.strata:
                    tokens = partial(token_count, checkpoint.tokenizer)
                    rows += stratum_rows(results, task, suite.metrics[task], tokens, common)
                store.write(cell, identity, rows, about, list(samples_of(results)))
                print(f"done: {cell}{f'; cut in the middle: {sum(cut.values())} prompts' if cut else ''}", flush=True)


def language_model(checkpoint: EvaluatedCheckpoint, setting: Setting, length: int, overflow: str, ranks: Ranks) -> Any:
    """The model as lm-eval takes it, in process or in vLLM, for prompts of ``length`` tokens, answer included."""
    config = checkpoint.config
    if config.backend == "vllm":
        return load_vllm(checkpoint, setting, length, overflow)
    from ropewalk.evaluation.harness.reader_lm import ReaderLM  # imports lm-eval, an extra

    model = checkpoint.load(setting, length, ranks.local_device(config.device))
    return ReaderLM(ModelReader(model, config.prefill_chunk), checkpoint.tokenizer, length, overflow, ranks)


def _task_identity(task: str, suite: SuiteConfig) -> dict[str, Any]:
    return {
        "harness_version": harness_version(),
        "few_shot": suite.few_shot.get(task),
        "samples": suite.samples,
        "overflow": suite.overflow,
        "dataset": suite.datasets.get(task, {}),
        **({"strata": suite.metrics[task]} if task in suite.strata else {}),
    }


def _few_shot(results: Any) -> dict[str, int]:
    return {task: count for task, count in results.get("n-shot", {}).items() if isinstance(count, int)}


def load_vllm(checkpoint: EvaluatedCheckpoint, setting: Setting, length: int, overflow: str) -> Any:
    """lm-eval's vLLM model under a setting's spectrum, every visible GPU holding a part of it.

    Raises:
        UserError: vLLM is not installed, or prompts are to be cut in the middle, which it does not do.
    """
    if overflow != "error":
        raise UserError(f"backend=vllm cuts no prompts, and suite.overflow={overflow}; use backend=transformers")
    if find_spec("vllm") is None:
        raise UserError(
            "backend=vllm, but vllm is not installed; install it on the GPU machine, or use backend=transformers"
        )
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    class CheckedVLLM(VLLM):
        """vLLM that refuses prompts that lm-eval's own class would cut from the left."""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for request in requests:
                text, options = request.args
                check_room(len(self.tok_encode(text)) + int(options.get("max_gen_toks", self.max_gen_toks)))
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for _, context, continuation in requests:
                check_room(len(context) + len(continuation))
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)

    def check_room(tokens: int) -> None:
        if tokens > length:
            raise UserError(
                f"a prompt takes {tokens} tokens with its answer, length {length} is less; use a greater one"
            )

    scratch = tempfile.TemporaryDirectory(prefix="ropewalk-vllm-")
    model = CheckedVLLM(
        pretrained=str(checkpoint.scaled_copy(Path(scratch.name), setting, length)),
        dtype=checkpoint.config.dtype,
        tensor_parallel_size=max(1, torch.cuda.device_count()),
        max_model_len=length,
        seed=checkpoint.config.seed,
    )
    model.scratch = scratch  # kept as long as the model
    return model
