"""All checks for one command: of training on every rank that it was started with, of the others on the one they use."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ropewalk.cluster.doctor.command_inputs import check_evaluated, check_runs, check_sources, check_suite
from ropewalk.cluster.doctor.disk import check_file_system, check_space, make_directory
from ropewalk.cluster.doctor.machine import check_data, check_device, check_kernels, check_model
from ropewalk.cluster.doctor.network import check_all_reduce, check_clocks, check_shared, links
from ropewalk.cluster.doctor.screen import Finding, guarded, screen, warn
from ropewalk.cluster.planner.cost import checkpoints_kept
from ropewalk.config.data import PrepareConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig
from ropewalk.config.train import TrainConfig
from ropewalk.errors import UserError
from ropewalk.model.load import count_parameters, training_config
from ropewalk.runs.directory import checkpoint_at
from ropewalk.runs.launch import take_place
from ropewalk.training.distributed import gather, join_launched


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
    findings += guarded("model", lambda: check_evaluated(config))
    findings += guarded("suite", lambda: check_suite(config))
    return _print(config.name or config.checkpoint, findings, Path(config.output))


def examine_preparation(config: PrepareConfig) -> int:
    """Check one stage of a preparation: its sources or plan, tokenizer, room and output."""
    findings = guarded("sources", lambda: check_sources(config))
    return _print(f"{config.corpus.name}, stage={config.stage}", findings, Path(config.output))


def examine_comparison(config: CompareConfig) -> int:
    """Check a comparison: its runs and its output."""
    return _print(config.title, guarded("runs", lambda: check_runs(config)), Path(config.output).parent)


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
    findings = guarded("kernels", lambda: check_kernels(device, dtype, trainer.loss_chunk_size))
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return findings  # the rest is the node's, and once is enough
    findings += guarded("data", lambda: check_data(config))
    findings += guarded("file system", lambda: check_file_system(make_directory(run_dir)))
    return findings + guarded("model", lambda: _model_and_space(config, run_dir))


def _model_and_space(config: TrainConfig, run_dir: Path) -> Iterator[Finding]:
    run = config.start_from.run
    start = json.loads((_checkpoint_of(run) / "config.json").read_text()) if run is not None else None
    model_config = training_config(config.model, config.rope, config.data.sequence_length, start=start)
    parameters = count_parameters(model_config)
    yield from check_model(model_config, parameters, run or config.model.path)
    yield from check_space(run_dir, parameters, checkpoints_kept(config.trainer), config.trainer.max_steps)


def _checkpoint_of(run: str) -> Path:
    """The checkpoint that ``start_from.run`` names, by itself or as the newest of its run."""
    checkpoint = checkpoint_at(run)
    if checkpoint is None:
        raise UserError(f"start_from.run={run} holds no committed checkpoint; name a run directory that does")
    return checkpoint


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
