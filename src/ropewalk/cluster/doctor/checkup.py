"""The doctor's checks for each command: of training on every rank that it was started with, of the others on one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ropewalk.cluster.doctor.machine import (
    check_all_reduce,
    check_clocks,
    check_data,
    check_device,
    check_file_system,
    check_kernels,
    check_model,
    check_peers,
    check_shared,
    check_space,
    links,
    make_directory,
)
from ropewalk.cluster.doctor.screen import Finding, fail, guarded, ok, screen, warn
from ropewalk.cluster.planner.cost import checkpoint_bytes, checkpoints_kept
from ropewalk.cluster.requirements import check_requirements
from ropewalk.config.data import PrepareConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig
from ropewalk.config.train import TrainConfig
from ropewalk.files import read_object
from ropewalk.model.hf_directory import read_config
from ropewalk.model.load import cache_bytes, count_parameters, training_config
from ropewalk.rope.hf_config import read_config_json
from ropewalk.runs.directory import RunDirectory, checkpoint_at
from ropewalk.runs.launch import take_place
from ropewalk.training.distributed import gather, join_launched
from ropewalk.training.inputs import check_heads

ELEMENT = {"bfloat16": 2, "float32": 4}  # bytes
GB = 1e9


def examine(config: TrainConfig) -> int:
    """Make every check and print one screen; returns how many things must be fixed. Collective."""
    take_place()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = config.trainer.device == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    gpus = int(os.environ.get("SLURM_NTASKS_PER_NODE") or config.cluster.gpus_per_node)  # one task a GPU
    findings = guarded("device", lambda: check_device(config.trainer.device, gpus, local_rank))
    ranks = join_launched()  # over gloo, which needs no GPU, and waits for slow disks
    together = ranks.world_size > 1
    findings += _of_this_rank(config, device)
    of_ranks = _together(config, device, findings) if together else [(_node(), [*findings, *_alone(device)])]
    nodes = len({name for name, _ in of_ranks})
    text, failed = screen(f"doctor: {config.run_name}, {len(of_ranks)} ranks on {nodes} nodes", of_ranks)
    if ranks.is_main:
        print(text, flush=True)
    if together:
        dist.barrier()
        dist.destroy_process_group()
    return failed


def examine_evaluation(config: EvaluateConfig) -> int:
    """Check one evaluation: its device (each process its own), model, memory, harness, texts and output."""
    gpus = 1 if config.device == "cuda" else torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = "cpu" if config.device == "cpu" else "cuda"
    findings = guarded("device", lambda: check_device(device, gpus, local_rank))
    findings += guarded("model", lambda: _after_inputs("evaluate", config, check_evaluated(config), "model"))
    findings += guarded("suite", lambda: _after_inputs("evaluate", config, check_suite(config), "documents"))
    return _print(config.name or config.checkpoint, findings, Path(config.output))


def examine_preparation(config: PrepareConfig) -> int:
    """Check one stage of a preparation: its sources or plan, tokenizer, room and output."""
    findings = guarded("sources", lambda: _after_inputs("prepare", config, check_sources(config)))
    return _print(f"{config.corpus.name}, stage={config.stage}", findings, Path(config.output))


def examine_comparison(config: CompareConfig) -> int:
    """Check a comparison: its runs and its output."""
    return _print(config.title, guarded("runs", lambda: check_runs(config)), Path(config.output).parent)


def _after_inputs(command: str, config: Any, checks: Iterator[Finding], *kinds: str) -> Iterator[Finding]:
    """The findings of ``checks``, which reads the command's inputs of these kinds, once they are known to be there."""
    check_requirements(command, config, *kinds)
    yield from checks


def _print(title: str, findings: list[Finding], output: Path) -> int:
    findings += guarded("file system", lambda: check_file_system(make_directory(output)))
    text, failed = screen(f"doctor: {title}, on {_node()}", [(_node(), findings)])
    if failed or os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
    return failed


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _of_this_rank(config: TrainConfig, device: torch.device) -> list[Finding]:
    trainer = config.trainer
    run_dir = Path(config.run_dir)
    dtype = getattr(torch, trainer.dtype)
    findings = guarded("kernels", lambda: check_kernels(device, dtype, trainer.loss_chunk_size, trainer.attention))
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return findings  # the rest is the node's, and once is enough
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        findings += guarded("peers", lambda: check_peers(torch.cuda.device_count()))
    findings += guarded("data", lambda: _after_inputs("train", config, check_data(config), "store"))
    findings += guarded("file system", lambda: check_file_system(make_directory(run_dir)))
    return findings + guarded(
        "model", lambda: _after_inputs("train", config, _model_and_space(config, run_dir), "model", "run")
    )


def _model_and_space(config: TrainConfig, run_dir: Path) -> Iterator[Finding]:
    run = config.start_from.run
    record, start = RunDirectory(run_dir).start_record, None
    if record.is_file():  # chosen in an earlier session; the other run may be gone
        start = read_object(record)["config"]
    elif run is not None:
        start = read_config_json(str(checkpoint_at(run)), "start_from.run")
    model_config = training_config(config.model, config.rope, config.data.sequence_length, start=start)
    check_heads(model_config, config.parallel.sequence)
    parameters = count_parameters(model_config)
    yield from check_model(model_config, parameters, run or config.model.path)
    size = checkpoint_bytes(parameters, config.deepspeed.stage, ELEMENT[config.trainer.dtype])
    yield from check_space(run_dir, size, checkpoints_kept(config.trainer), config.trainer.max_steps)


def _together(config: TrainConfig, device: torch.device, findings: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """The findings of all ranks, with those of the checks that they make together. Collective.

    Each check is made only where no rank has failed before it: one that stands aside in a collective holds up the
    others, and nobody would read what it has found.
    """
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "all-reduce": lambda: check_all_reduce(device, config.cluster, links(device)),
        "clock": check_clocks,
        "shared": lambda: check_shared(make_directory(Path(config.run_dir))),
    }
    of_ranks = gather((_node(), findings))
    for subject, check in checks.items():
        if any(finding.level == "FAIL" for _, of_rank in of_ranks for finding in of_rank):
            findings = [*findings, warn(subject, "not looked at, since something was found before")]
        else:
            findings = findings + guarded(subject, check)
        of_ranks = gather((_node(), findings))
    return of_ranks


def _alone(device: torch.device) -> Iterator[Finding]:
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        start = f"torchrun --nproc-per-node {torch.cuda.device_count()} scripts/doctor.py ..."
        yield warn("all-reduce", f"not measured by one process; {start}")


def check_evaluated(config: EvaluateConfig) -> Iterator[Finding]:
    """The checkpoint is whole, and fits on the device beside the longest context's keys and values."""
    from ropewalk.evaluation.evaluated_checkpoint import check_checkpoint
    from ropewalk.export.source import committed_checkpoint

    directory = Path(config.checkpoint)
    if list(directory.glob("*.safetensors")):
        directory = check_checkpoint(config.checkpoint, of_vision=config.suite.harness == "vniah")
    else:  # the evaluation exports it; its config.json stands in the checkpoint too
        directory = committed_checkpoint(directory)
    model_config = read_config(directory, key="checkpoint")
    parameters = count_parameters(model_config)
    yield ok("model", f"{model_config.model_type}, {parameters / 1e9:.3g} billion parameters, {directory}")
    if config.backend == "vllm":
        yield _installed("vllm", "backend=vllm")
        return
    longest = max(config.lengths, default=0)
    element = ELEMENT[config.dtype]
    need = element * parameters + cache_bytes(model_config, longest, element)
    free = _free_memory(config.device)
    summary = f"{need / GB:,.1f} GB for weights and the cache of {longest:,} tokens, {free / GB:,.1f} GB free"
    if need > free:
        yield fail("memory", f"{summary}; set fewer lengths, device=auto over several GPUs, or backend=vllm")
    else:
        yield ok("memory", summary)


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
    from ropewalk.evaluation.harness.lm_eval_suite import check_scorers
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
    """Room for what the preparation writes."""
    from ropewalk.data.prepare.pipeline import bytes_to_write

    need = bytes_to_write(config)
    text = need / (1 + len(config.sequence_lengths))
    free = disk_usage(make_directory(Path(config.output))).free
    summary = f"{text / GB:,.1f} GB of files, about {need / GB:,.1f} GB to write, {free / GB:,.1f} GB free"
    yield (warn if need > free else ok)("space", summary + ("; free some, or set output" if need > free else ""))


def check_runs(config: CompareConfig) -> Iterator[Finding]:
    """Every run to compare can be read."""
    from ropewalk.report.runs import load_runs

    runs = load_runs(config.runs)
    yield ok("runs", ", ".join(run.name for run in runs))
    for run in runs:
        if run.results.empty and run.table.empty:
            yield warn("runs", f"{run.name} has no evaluation; the report shows its training alone")
