"""Inputs of the commands that train nothing: a model and its texts, raw documents, finished runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from ropewalk.cluster.doctor.disk import make_directory
from ropewalk.cluster.doctor.screen import Finding, fail, ok, warn
from ropewalk.config.data import PrepareConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig
from ropewalk.model.load import count_parameters, head_dim

ELEMENT = {"bfloat16": 2, "float32": 4}  # bytes
GB = 1e9


def check_evaluated(config: EvaluateConfig) -> Iterator[Finding]:
    """The checkpoint is whole, and fits on the device beside the longest context's keys and values."""
    from ropewalk.evaluation.evaluated_checkpoint import check_checkpoint
    from ropewalk.export.source import committed_checkpoint

    directory = Path(config.checkpoint)
    if list(directory.glob("*.safetensors")):
        directory = check_checkpoint(config.checkpoint)
    else:  # the evaluation exports it; its config.json stands in the checkpoint too
        directory = committed_checkpoint(directory)
    model_config = AutoConfig.from_pretrained(directory)
    parameters = count_parameters(model_config)
    yield ok("model", f"{model_config.model_type}, {parameters / 1e9:.3g} billion parameters, {directory}")
    if config.backend == "vllm":
        yield _installed("vllm", "backend=vllm")
        return
    longest = max(config.lengths, default=0)
    need = ELEMENT[config.dtype] * (parameters + longest * _cached_per_token(model_config))
    free = _free_memory(config.device)
    said = f"{need / GB:,.1f} GB for weights and the cache of {longest:,} tokens, {free / GB:,.1f} GB free"
    if need > free and getattr(model_config.get_text_config(), "sliding_window", None):
        yield warn("memory", f"{said}; layers with a window keep less, so it may still fit")
    elif need > free:
        yield fail("memory", f"{said}; set fewer lengths, device=auto over several GPUs, or backend=vllm")
    else:
        yield ok("memory", said)


def _cached_per_token(model_config: Any) -> int:
    """Elements of keys and values that a token leaves in the cache."""
    text = model_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_dim(text))


def _free_memory(device: str) -> int:
    if device == "cpu" or not torch.cuda.is_available():
        return int(psutil.virtual_memory().available)
    each = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    return sum(each) if device == "auto" else each[0]


def _installed(package: str, why: str) -> Finding:
    if find_spec(package) is None:
        return fail(package, f"{why}, and {package} is not installed in this environment; install it")
    return ok(package, "is installed")


def check_suite(config: EvaluateConfig) -> Iterator[Finding]:
    """Every part of the suite finds its harness and its data."""
    from ropewalk.evaluation.documents import find_documents
    from ropewalk.evaluation.harness.lm_eval.lm_eval_tasks import check_scorers
    from ropewalk.evaluation.suites import validate_suites

    for suite in validate_suites(config):
        check_scorers(suite)
        if suite.harness == "quick":
            count = sum(1 for _ in find_documents(Path(str(config.documents))))
            yield ok("documents", f"{count:,} in {config.documents}")
        else:
            yield ok("data", f"{suite.name}: {suite.data or 'from the hub'}")


def check_sources(config: PrepareConfig) -> Iterator[Finding]:
    """Every source and the tokenizer can be opened; of the later stages, the plan and the tokenizer beside it."""
    from ropewalk.data.prepare.pipeline import validate_prepare
    from ropewalk.data.prepare.prepare_plan import Plan, open_encoders
    from ropewalk.data.prepare.sources import corpus_sources
    from ropewalk.data.prepare.stages import PREPARED
    from ropewalk.data.prepare.tokenizer import load_tokenizer

    validate_prepare(config)
    if (Path(config.output) / PREPARED).is_file():
        yield ok("plan", f"{config.output} is finished already")
        return
    if config.stage not in ("all", "plan"):
        plan = Plan.load(Path(config.output))
        open_encoders(plan)
        yield ok("plan", f"{plan.shards} shards, {len(plan.sources)} sources, {plan.vocab_size:,} tokens")
        return
    sources = corpus_sources(config.corpus)
    yield ok("sources", ", ".join(source.name for source in sources))
    if config.corpus.tokenizer is None:
        yield ok("tokenizer", f"a BPE of {config.corpus.vocab_size:,} tokens is trained")
    else:
        load_tokenizer(config.corpus.tokenizer, config.corpus.engine, config.corpus.bos, config.corpus.eos)
        yield ok("tokenizer", config.corpus.tokenizer)
    yield from check_room_for_tokens(config)


def check_room_for_tokens(config: PrepareConfig) -> Iterator[Finding]:
    """Room for the tokens of local sources, once as token files and once in each store.

    A token takes four bytes, about as many as its text has.
    """
    paths = [*config.corpus.paths, *(source.path for source in config.corpus.sources)]
    text = sum(_size(Path(path)) for path in paths)
    need = text * (1 + len(config.sequence_lengths))
    free = disk_usage(make_directory(Path(config.output))).free
    said = f"{text / GB:,.1f} GB of files, about {need / GB:,.1f} GB to write, {free / GB:,.1f} GB free"
    yield (warn if need > free else ok)("space", said + ("; free some, or set output" if need > free else ""))


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(path) for name in names)


def check_runs(config: CompareConfig) -> Iterator[Finding]:
    """Every run to compare can be read."""
    from ropewalk.report.runs import load_runs

    runs = load_runs(config.runs)
    yield ok("runs", ", ".join(run.name for run in runs))
    for run in runs:
        if run.results.empty and run.table.empty:
            yield warn("runs", f"{run.name} has no evaluation; the report shows its training alone")
