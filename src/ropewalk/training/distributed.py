"""Ranks: the processes of a run, how they join and leave their group, and how they agree.

If one rank fails, all do: none waits in a collective for another that has given up. Every function here is for the
default process group; a process without one is alone, and each collective is then a plain call.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ropewalk.errors import UserError
from ropewalk.files import only_writer
from ropewalk.model.load import exact_products
from ropewalk.runs.launch import PLACE, leave_place, left_with, take_place

M_MMAP_THRESHOLD = -3  # glibc's malloc.h
WAITED = 20.0  # seconds for the other ranks before a line says so
GLOO_THREADS_REST = 0.2  # seconds; they need microseconds, a loaded machine may not give them a core at once
CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others; ``Ranks()`` is a process alone.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: processes that share the work.
        device: where this one trains.
        sequence: neighbouring ranks that share each row of tokens (parallel.sequence).
        group: those ranks; None if there is no other.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    sequence: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        """Number of this rank's share of the global batch, 0 to data_size - 1."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """Shares that the global batch is divided in."""
        return self.world_size // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Number of this rank's stretch of the rows that its group shares, 0 to sequence - 1."""
        return self.rank % self.sequence

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes the run's record."""
        return self.rank == 0

    def local_device(self, kind: str) -> str:
        """This process's own device: ``cuda`` becomes ``cuda:<local rank>`` among several processes.

        Raises:
            UserError: for ``auto`` among several processes, each of which would take all GPUs.
        """
        if kind == "auto" and self.world_size > 1:
            raise UserError("device=auto spreads one model over all GPUs; start one process, without torchrun")
        if kind != "cuda" or self.world_size == 1:
            return kind
        device = f"cuda:{self.rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)  # else each process opens a second context on GPU 0
        return device


def launched_world_size() -> int:
    """Ranks that the launcher, srun or torchrun, has announced, before any of them is joined.

    Raises:
        UserError: srun started several tasks that do not know where to meet, or a rank lacks its place on the node:
            each would be a run of its own in the same directory.
    """
    take_place()
    if "RANK" not in os.environ:  # what an earlier launcher has left of the others says nothing
        leave_place()
        return 1
    missing = [name for name in PLACE if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set without {', '.join(missing)}; set all five, or unset RANK to train alone")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdigit():
            raise UserError(f"{name}={os.environ[name]} is not a number; start by torchrun or srun, or unset RANK")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world_size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}; start by torchrun or srun, or unset RANK")
    if int(os.environ["MASTER_PORT"]) >= 2**16:
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} is not a port; set one below 65,536")
    return world_size


def join_launched(timeout: timedelta | None = None) -> Ranks:
    """Join the processes that torchrun or srun started, over gloo, to exchange results; no engine follows.

    A process that was started alone forms no group.

    Args:
        timeout: of a collective; None: torch's default for gloo, half an hour.
    """
    exact_products()
    if launched_world_size() == 1:
        return Ranks()
    if not dist.is_initialized():
        with own_port():
            dist.init_process_group("gloo", timeout=timeout)
        atexit.register(end_processes)
    return Ranks(dist.get_rank(), dist.get_world_size())


# The place of a process by itself, as torchrun would name it. The store finds a free port itself for port 0, so that no
# other process takes it meanwhile.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def start_processes(device: str, sequence: int = 1, deterministic: bool = False) -> Ranks:
    """Join the process group that the engine works in; a process alone makes one of a single process.

    Args:
        device: cpu or cuda.
        sequence: neighbouring ranks that share a row of tokens.
        deterministic: see :func:`set_deterministic`.
    """
    set_deterministic(deterministic)  # before cuBLAS starts
    deepspeed = import_deepspeed(device)
    exact_products()
    if "RANK" not in os.environ:  # also where the group stands already: ZeRO-3 reads LOCAL_RANK for every model
        os.environ.update(ALONE)
    if not dist.is_initialized():
        _join(deepspeed, device)
    own = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else CPU
    _, group = sequence_groups(sequence)
    return Ranks(dist.get_rank(), dist.get_world_size(), own, sequence, group)


def _join(deepspeed: Any, device: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with own_port():
        deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    atexit.register(end_processes)


@contextmanager
def own_port() -> Iterator[None]:
    """Turn a MASTER_PORT that another process has into a UserError; say who is waited for, if it takes a while."""
    address = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    text = f"RANK={rank} of WORLD_SIZE={size} waits for the others at {address}; to run alone, unset RANK"
    timer = threading.Timer(WAITED, partial(print, text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} is used by another process of this node; set another one, or "
            "start by torchrun --standalone, which finds a free one"
        ) from error
    finally:
        timer.cancel()


def sequence_groups(size: int) -> tuple[Any, dist.ProcessGroup | None]:
    """Form groups of ``size`` neighbouring ranks that share each row of tokens. Collective.

    Sequence parallelism is DeepSpeed Ulysses' (arXiv 2309.14509): each rank of a group holds an equal stretch of the
    row. Everything but attention works token by token; for attention the ranks trade tokens for heads
    (ropewalk.model.attention), so each sees whole documents in its share of the heads.

    Returns:
        The ``mpu`` of deepspeed.initialize and this rank's group; None and None for a ``size`` of 1.
    """
    if size == 1:
        return None, None
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.sequence.layer import register_all_to_all_group

    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(size)
    elif parallel_state_sp.get_sequence_parallel_world_size() != size:
        raise UserError(
            f"parallel.sequence={size}, but this process is in a group of "
            f"{parallel_state_sp.get_sequence_parallel_world_size()}; start a new process"
        )
    group = parallel_state_sp.get_sequence_parallel_group()
    register_all_to_all_group(group)
    return parallel_state_sp, group


def end_processes() -> None:
    """Leave the process group and let its threads come to rest; called at exit.

    After an error the process ends at once instead, its traceback or line written: this rank may have collectives in
    flight that no other will complete, and destroying an NCCL group waits for them, and for the node's other ranks,
    which holds all GPUs until they give up. One rank alone has an error where its own store is damaged, say.

    A gloo thread lets go of a collective's tensors a moment after the collective is done, and takes the interpreter's
    lock for that. If the interpreter is ending by then, Python ends the thread inside a C++ destructor and the process
    aborts with "terminate called without an active exception". Destroying the group would join the threads, but
    DeepSpeed's parameters keep it alive; sleeping leaves them the lock, and without a collective they never want it
    again.
    """
    if dist.is_initialized():
        code = 1 if hasattr(sys, "last_value") else None  # of an exception that nobody has caught; not of SystemExit
        if dist.get_world_size() > 1:  # alone, a caller may have caught SystemExit, and nobody is waited for
            code = code or left_with()
        if code is not None:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)
        dist.destroy_process_group()
    time.sleep(GLOO_THREADS_REST)


def set_deterministic(deterministic: bool) -> None:
    """Have kernels add up in one order, so that a step on a GPU gives the same bits again; or leave it to them.

    An operation that has no such kernel raises RuntimeError. Attention's kernels ask torch for this setting.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two that cuBLAS is deterministic with
    torch.use_deterministic_algorithms(deterministic)


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, set to the accelerator that is meant and kept from compiling what is not used.

    On CPU the first init would build the shared-memory collective, for minutes; only inference calls it.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    if device == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # rows differ in what they allocate
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # DeepSpeed 0.19 calls torch.distributed names that torch 2.13 deprecates, twice a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops

    deepspeed.logger.setLevel(logging.WARNING)
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        _return_freed_memory()
    return deepspeed


def _return_freed_memory() -> None:
    """Have glibc give large freed blocks back to the system at once.

    Left alone it raises its own threshold to 32 MB, and ZeRO-3's small gathered weights then pin freed activations in
    the heap: a forward pass with activation checkpointing grew by 2.2 GiB where 0.2 GiB was alive.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 4 * 2**20)


def control_group(device: str) -> dist.ProcessGroup | None:
    """A gloo group for agreement between the ranks' CPUs; None (the default group) if that one is gloo. Collective."""
    return dist.new_group(backend="gloo") if device == "cuda" else None


def log(line: str) -> None:
    """Print a line. A log on a full disk, or a closed terminal, is not a reason to leave the other ranks."""
    with suppress(OSError):  # what was not printed is still in Python's buffer
        print(line, flush=True)


def log_once(line: str) -> None:
    """Print a line on rank 0, for all."""
    if _rank() == 0:
        log(line)


def gather(item: T) -> list[T]:
    """The item of every rank, in their order, on every rank. Collective."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def first_problem(problem: T | None) -> T | None:
    """The lowest rank's problem, on every rank; None if no rank has one. Collective."""
    return next((problem for problem in gather(problem) if problem is not None), None)


def together(work: Callable[..., T], *arguments: Any, failure: type[Exception] = UserError) -> T:
    """Do this rank's part of something, and return its result. Collective.

    Raises:
        failure: on every rank, with the same words, if any rank's part raised OSError or UserError; for a ``failure``
            of another type, also if it raised any other ValueError.
        Exception: if a part raised anything else, which is a fault of the program: itself on its own rank, RuntimeError
            on the others.
    """
    problem, result, cause = None, None, None
    expected = (OSError, UserError if failure is UserError else ValueError, SafetensorError)
    try:
        result = work(*arguments)
    except Exception as error:
        words = str(error) if isinstance(error, UserError) else f"rank {_rank()}: {error}"
        problem, cause = (words, not isinstance(error, expected)), error
    problem = first_problem(problem)
    if problem is not None:
        words, is_fault = problem
        if is_fault:
            raise cause or RuntimeError(words)
        raise failure(words) from cause
    return cast(T, result)


def by_rank_zero(work: Callable[..., T], *arguments: Any) -> T:
    """Have rank 0 do something; its result, on every rank. Collective.

    Raises:
        UserError: on every rank, if it raised OSError or UserError; of other exceptions see :func:`together`.
    """
    results = [together(lambda: work(*arguments) if _rank() == 0 else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(results)
    return cast(T, results[0])


@contextmanager
def held_directory(directory: Path, name: str) -> Iterator[None]:
    """Hold a directory against other writers, rank 0 for all; see files.only_writer. Collective.

    Args:
        directory: made if needed.
        name: the setting that names the directory, with its value, for messages.

    Raises:
        UserError: on every rank, if another process writes there, or it cannot be written.
    """
    with ExitStack() as held:
        by_rank_zero(held.enter_context, only_writer(directory, name))
        yield


def rank_zero_first(work: Callable[[], T]) -> T:
    """Do something on rank 0 before the others: it may write what they then read. Each returns its own. Collective.

    Raises:
        UserError: on every rank, if it raised OSError or UserError on rank 0; of other exceptions see :func:`together`.
    """
    if not dist.is_initialized():
        return work()
    result = together(lambda: work() if _rank() == 0 else None)
    return cast(T, result) if _rank() == 0 else work()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
