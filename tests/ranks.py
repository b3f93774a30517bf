"""Ranks of a real run without a launcher, quick to start: processes forked from one that has the imports done.

torchrun hides the ranks behind an agent that a signal kills, and importing torch, transformers and DeepSpeed takes
several times as long as the runs of the tests. Here every rank is ``train.py`` itself in a process of its own, with its
own pid and exit code, as srun would start it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers import PYTHONPATH, TINY

from ropewalk.data import PackedStore


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def rank_main(directory: str, variables: dict[str, str], log: str, words: Sequence[str], fault: str | None) -> None:
    """``python WORDS`` as one rank, its output in ``log``; ``fault`` names a function of faults.py."""
    os.environ.update(variables)
    os.chdir(directory)  # the forkserver stays in that of the first test
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if fault is not None:
        getattr(importlib.import_module("faults"), fault)()
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


class RankProcesses:
    """The ranks of one run."""

    def __init__(self, processes: list[BaseProcess], logs: list[Path]) -> None:
        self.processes, self.logs = processes, logs

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait(seconds=0)

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks; to all where none is named."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                with suppress(ProcessLookupError):  # it has just ended, and its parent is another process
                    os.kill(pid, number)

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes, negative for a signal; what is not over by then is killed."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes]

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until ``condition()`` holds; fails where the ranks end first."""
        until = time.monotonic() + seconds
        while not condition():
            assert self.alive(), self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.002)

    def output(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in logs if log.exists())


def start_ranks(
    world_size: int, log_dir: Path, arguments: Sequence[str], fault: str | None = None, script: str = "train.py"
) -> RankProcesses:
    """Start ``python SCRIPT ARGUMENTS`` as ``world_size`` ranks; their output goes to files in ``log_dir``."""
    log_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [log_dir / f"rank{rank}.log" for rank in range(world_size)]
    processes: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(
            target=rank_main, args=(os.getcwd(), own, str(log), [script, *arguments], fault), daemon=True
        )
        with environment(OMP_NUM_THREADS="1", PYTHONPATH=PYTHONPATH):
            process.start()
        processes.append(process)
    return RankProcesses(processes, logs)


def run_ranks(
    world_size: int, log_dir: Path, arguments: Sequence[str], seconds: float = 300, script: str = "train.py"
) -> None:
    """Run to the end; fails the test where a rank fails, or is not done after so long."""
    with start_ranks(world_size, log_dir, arguments, script=script) as ranks:
        assert ranks.wait(seconds) == [0] * world_size, ranks.output()


def tiny_arguments(store: PackedStore, run_dir: Path, *more: str) -> list[str]:
    """The overrides that make ``python train.py`` run the tiny model on a store: four sequences a step."""
    return [
        "+experiment=demo/pretrain", "tracker=none", "data=packed", f"data.store={store.root}",
        f"data.sequence_length={store.sequence_length}", f"run_dir={run_dir}",
        "model.head_dim=16", "model.pretrained_length=64", "trainer.global_batch_size=4",
        "trainer.micro_batch_size=1", "trainer.checkpoint_every=2",
        *(f"model.architecture.{key}={value}" for key, value in TINY.items() if key != "max_position_embeddings"),
        *more,
    ]  # fmt: skip
