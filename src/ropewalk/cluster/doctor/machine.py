"""The machine: GPUs and their kernels, the ranks' links and clocks, the file system under a run, its model and data."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ropewalk.cluster.doctor.screen import Finding, fail, ok, warn
from ropewalk.config.groups import ClusterConfig
from ropewalk.config.rules import cuda_problem
from ropewalk.config.train import TrainConfig
from ropewalk.data.store.remote import open_stores
from ropewalk.files import fsync_path, write_atomically
from ropewalk.model.attention import HOPPER, Documents, Kernel, attention_kernel, document_attention
from ropewalk.model.loss import tiled_linear_cross_entropy
from ropewalk.runs.directory import RunDirectory
from ropewalk.training.distributed import by_rank_zero, gather

INFINIBAND = Path("/sys/class/infiniband")
BUSY_GIB = 1.0  # of a GPU's memory that another process may hold
PEER_ELEMENTS = 2**20  # int32 that are copied from each GPU to each other
SKEW = 5.0  # seconds between a clock and another that nothing minds
SLOW_FSYNC = 1.0  # seconds for a file of a few bytes
GB = 1e9
PATIENCE = timedelta(minutes=3)  # of a collective; a dead link then ends the doctor, not a run hours later
SIZE = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}  # bytes that are added up
ROUNDS = 5
SLOW_SHARE = 0.3  # of what the cluster group says of its links
VISIBLE_WITHIN = 60.0  # seconds; NFS may remember for so long that a file is not there
GB = 1e9


def check_device(device: str, gpus: int, local_rank: int) -> Iterator[Finding]:
    """This rank's GPU and its driver, or the CPU.

    Args:
        device: cuda or cpu.
        gpus: that this process should see.
        local_rank: which of them is its own.
    """
    if device == "cpu":
        yield ok("device", f"cpu, torch {torch.__version__} with {torch.get_num_threads()} threads a rank")
        return
    if not torch.cuda.is_available():
        words = f"torch {torch.__version__} sees no CUDA device ({cuda_problem()}; driver {_driver()})"
        fix = "trainer.device=cpu, a GPU node, or the torch that fits the driver (docs/quickstart.md)"
        yield fail("device", f"{words}; {fix}")
        return
    count = torch.cuda.device_count()
    if local_rank >= count:
        yield fail("device", f"{count} GPUs are seen, and this is rank {local_rank} of its node: one task a GPU")
        return
    free, total = torch.cuda.mem_get_info(local_rank)
    properties = torch.cuda.get_device_properties(local_rank)
    summary = f"{count} x {properties.name}, {total / 2**30:.1f} GiB, driver {_driver()}, CUDA {torch.version.cuda}"
    if count < gpus:
        yield fail("device", f"{summary}; {gpus} are counted on: ask for them (cluster.gpus_per_node, --gpus-per-node)")
    elif (total - free) / 2**30 > BUSY_GIB:
        held = (total - free) / 2**30
        yield warn("device", f"{summary}; {held:.1f} GiB of one are held by another process (nvidia-smi names it)")
    else:
        yield ok("device", summary)
    yield from check_locked_memory()
    if not torch.cuda.is_bf16_supported():
        yield fail("device", f"{properties.name} has no bf16; use GPUs of Ampere or later")


def _sent(values: torch.Tensor, source: int, target: int) -> torch.Tensor:
    return values.to(f"cuda:{source}").to(f"cuda:{target}").cpu()


def check_peers(
    gpus: int,
    reaches: Callable[[int, int], bool] = torch.cuda.can_device_access_peer,
    sent: Callable[[torch.Tensor, int, int], torch.Tensor] = _sent,
) -> Iterator[Finding]:
    """The node's GPUs, every one to every other: whether it reaches that one's memory, and what arrives there.

    Without peer access NCCL goes through the host's memory. Over PCIe it can be granted and still break: CUDA supports
    no copies between peers behind an IOMMU on bare metal, which may corrupt memory without a word (CUDA C++ Programming
    Guide, "IOMMU on Linux").

    Args:
        gpus: of the node.
        reaches: true if a GPU is granted access to another's memory.
        sent: int32 values as they arrive that were copied from a GPU to another.
    """
    values = torch.arange(PEER_ELEMENTS, dtype=torch.int32)
    pairs = list(permutations(range(gpus), 2))
    apart = [pair for pair in pairs if not reaches(*pair)]
    broken = [pair for pair in pairs if pair not in apart and not torch.equal(sent(values, *pair), values)]
    if broken:
        fix = "switch the IOMMU or PCI access control off, or set NCCL_P2P_DISABLE=1 and give up the speed"
        yield fail("peers", f"what {_between(broken, pairs)} arrives changed; {fix}")
    elif apart:
        reason = "nvidia-smi topo -p2p r says why; it is often a virtual machine, or PCI access control"
        yield warn("peers", f"no direct access where {_between(apart, pairs)}, so all goes through the host; {reason}")
    else:
        yield ok("peers", f"{gpus} GPUs reach each other's memory, and what one sends arrives")


def _between(some: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]]) -> str:
    if len(some) == len(pairs):
        return "any GPU sends another"
    named = ", ".join(f"{source} sends {target}" for source, target in some[:4])
    return f"GPU {named}" + (f" and {len(some) - 4} more" if len(some) > 4 else "")


def check_locked_memory() -> Iterator[Finding]:
    """The limit on locked memory, where there is InfiniBand to register it with."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if INFINIBAND.is_dir() and limit != resource.RLIM_INFINITY:
        yield warn("memlock", f"{limit:,} bytes may be locked, and InfiniBand needs more; have ulimit -l be unlimited")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.split() else "unknown"


def check_kernels(
    device: torch.device, dtype: torch.dtype, loss_chunk_size: int, attention: str = "auto"
) -> Iterator[Finding]:
    """Run attention and loss once, forward and backward, and see that one document does not see another."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels that are compiled as they are called are launched
    kernel = attention_kernel(device, attention)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 256, 64)
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(True) for _ in range(3)
    )
    documents = Documents.from_cu_seqlens(torch.tensor([0, 100, 256]), device)
    out, _ = document_attention(torch.nn.Identity(), query, key, value, None, documents=documents, choice=attention)
    out[:, 100:].float().sum().backward()
    if key.grad is None or not torch.isfinite(key.grad).all():
        yield fail("attention", f"{kernel}: its gradient is not finite")
    elif key.grad[:, :, :100].abs().max() > 0:
        yield fail("attention", f"{kernel}: a document's gradient reaches the document before it")
    else:
        yield check_generation(kernel, torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0)
    hidden, head = (torch.randn(256, 64, generator=generator).to(device, dtype).requires_grad_(True) for _ in range(2))
    labels = torch.arange(256, device=device)
    loss = tiled_linear_cross_entropy(hidden, head, labels, loss_chunk_size)
    loss.backward()
    expected = torch.nn.functional.cross_entropy((hidden @ head.T).float(), labels, reduction="sum")
    off = abs(float(loss.detach()) / float(expected.detach()) - 1)
    if off > 1e-2:
        yield fail("loss", f"tiled linear cross entropy is {off:.1%} off torch's own")
    else:
        yield ok("loss", f"tiled linear cross entropy in chunks of {loss_chunk_size} tokens")


def check_generation(kernel: Kernel, major: int) -> Finding:
    """Check that the attention kernel, which works, was written for this GPU.

    Args:
        kernel: chosen.
        major: of the GPU's compute capability.
    """
    if major != HOPPER or not kernel.is_of_flash_attention_2:
        return ok("attention", f"{kernel}, documents apart")
    reasons = "; ".join(kernel.passed_over) or "trainer.attention names it"
    return warn(
        "attention",
        f"{kernel}, documents apart; a kernel of FlashAttention-2 on Hopper, which -3 and -4 use better ({reasons}): "
        "make install GPU=1 ATTENTION=fa4",
    )


def check_model(model_config: Any, parameters: int, path: str | None) -> Iterator[Finding]:
    """The model's configuration, which was read to get here."""
    where = path or "from scratch"
    yield ok("model", f"{model_config.model_type}, {parameters / 1e9:.3g} billion parameters, {where}")


def check_data(config: TrainConfig) -> Iterator[Finding]:
    """Every domain of every store can be read, and the tokenizer lies beside."""
    start = time.monotonic()
    stores = open_stores(config.data)
    domains = 0
    for name, store in stores.items():
        for domain, info in store.domains.items():
            if info.sequences:
                store.read(domain, info.sequences - 1)
                domains += 1
        if not store.tokenizer_path.is_dir():
            yield fail("tokenizer", f"{store.tokenizer_path} is missing; copy the whole store")
        else:
            yield ok("tokenizer", f"{store.tokenizer['vocab_size']:,} tokens" + (f", of {name}" if name else ""))
    sequences = sum(info.sequences for store in stores.values() for info in store.domains.values())
    seconds = time.monotonic() - start
    summary = f"{len(stores)} store{'s' if len(stores) > 1 else ''}, {domains} domains, {sequences:,} sequences"
    if seconds > 30:
        yield warn("data", f"{summary}; one sequence of each took {seconds:.0f} s: copy the store to a faster disk")
    else:
        yield ok("data", summary)


def check_file_system(directory: Path) -> Iterator[Finding]:
    """Rename over a file, fsync, the time that files get, and flock, in ``directory``."""
    probe = directory / f".doctor-{os.uname().nodename}-{os.getpid()}"
    probe.mkdir()
    try:
        file = probe / "file"
        start = time.monotonic()
        write_atomically(file, "one")
        write_atomically(file, "two")
        fsync_path(probe)
        seconds = (time.monotonic() - start) / 2
        names = sorted(path.name for path in probe.iterdir())
        if file.read_text(encoding="utf-8") != "two" or names != ["file"]:
            yield fail(
                "file system", f"a rename over a file left {names} in {probe}; checkpoints could not be committed"
            )
        elif seconds > SLOW_FSYNC:
            yield warn(
                "file system", f"rename and fsync take {seconds:.1f} s a file in {directory}; saving will be slow"
            )
        else:
            yield ok("file system", f"rename is atomic, fsync works in {directory}")
        yield from _check_time(file)
        yield from _check_lock(file)
    finally:
        shutil.rmtree(probe)


def _check_time(file: Path) -> Iterator[Finding]:
    file.touch()
    skew = file.stat().st_mtime - time.time()
    if abs(skew) > SKEW:
        yield warn("clock", f"files get a time {skew:+.0f} s off this node's clock; have both follow one NTP server")


def _check_lock(file: Path) -> Iterator[Finding]:
    """A lock held by one descriptor must refuse another one."""
    with file.open() as held, file.open() as other:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield warn(
                "flock", f"not there ({error}); data.cache_dir must be on another disk than {file.parent.parent}"
            )
            return
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield ok("flock", "holds")
        else:
            yield warn("flock", f"does not exclude in {file.parent.parent}; data.cache_dir must be on another disk")


def check_space(directory: Path, size: float, checkpoints: int, steps: int) -> Iterator[Finding]:
    """Room for what a run has still to save: the checkpoints that it keeps and the one that is being written.

    Args:
        directory: of the run; what it holds already needs no more room.
        size: bytes of a checkpoint.
        checkpoints: that stay.
        steps: of the whole run.
    """
    free = shutil.disk_usage(directory).free
    run = RunDirectory(directory)
    saved = len(run.committed_checkpoints())
    need = max(1, checkpoints + 1 - saved) * size
    summary = f"{free / GB:,.0f} GB free, {size / GB:,.1f} GB a checkpoint, {checkpoints} kept"
    summary += f", {saved} there: {need / GB:,.1f} GB"
    if run.committed_step() == steps:
        yield ok("space", f"{free / GB:,.0f} GB free; all steps are saved")
    elif free < (size if saved else 2 * size):
        yield fail("space", f"{summary}; free some, or set run_dir to another disk")
    elif free < need:
        yield warn("space", f"{summary}; set trainer.keep_last=2, or free some before it is full")
    else:
        yield ok("space", summary)


def make_directory(directory: Path) -> Path:
    """``directory``, made if it is missing.

    Raises:
        OSError: where it cannot be made, or is a file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def links(device: torch.device) -> dist.ProcessGroup:
    """The ranks as the run joins them: NCCL on GPUs, gloo on CPUs; a collective in it gives up soon. Collective."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)


def check_all_reduce(
    device: torch.device, cluster: ClusterConfig, group: dist.ProcessGroup | None = None
) -> Iterator[Finding]:
    """Bandwidth of the links, and whether what arrives is the sum. Collective.

    The bus bandwidth is nccl-tests' figure, bytes x 2 (n - 1) / n / seconds, the same for any number of ranks.
    """
    ranks, backend = dist.get_world_size(), dist.get_backend(group)
    elements = SIZE[device.type] // 4
    values = torch.ones(elements, device=device)
    dist.all_reduce(values, group=group)
    if not bool((values == ranks).all()):
        yield fail(
            "all-reduce", f"{backend}: ones of {ranks} ranks did not add up to {ranks}; a link or a GPU is broken"
        )
        return
    values.fill_(1)
    _settle(device, group)
    start = time.monotonic()
    for _ in range(ROUNDS):
        dist.all_reduce(values, group=group)
    _settle(device, group)
    seconds = torch.tensor([(time.monotonic() - start) / ROUNDS], device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)  # one number on all ranks
    speed = SIZE[device.type] * 2 * (ranks - 1) / ranks / float(seconds) / GB
    summary = f"{backend}, {ranks} ranks: {speed:.3g} GB/s bus bandwidth for {SIZE[device.type] >> 20} MiB"
    expected = _expected(ranks, cluster)
    if device.type == "cuda" and speed < SLOW_SHARE * expected:
        yield warn(
            "all-reduce", f"{summary}, of {expected:.0f} that cluster={cluster.name} says; see NCCL_DEBUG=INFO's lines"
        )
    else:
        yield ok("all-reduce", summary)


def _expected(ranks: int, cluster: ClusterConfig) -> float:
    """GB/s: inside a node its NVLink, between nodes all ports of a node together, if that is less."""
    between = cluster.network_gb_s * cluster.gpus_per_node
    return cluster.nvlink_gb_s if ranks <= cluster.gpus_per_node else min(cluster.nvlink_gb_s, between)


def _settle(device: torch.device, group: dist.ProcessGroup | None) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier(group)


def check_clocks() -> Iterator[Finding]:
    """The nodes' clocks against each other. Collective."""
    dist.barrier()
    clocks = gather(time.time())
    spread = max(clocks) - min(clocks)
    if spread > SKEW:
        yield warn("clock", f"the nodes' clocks are {spread:.0f} s apart; have them follow one NTP server")
    else:
        yield ok("clock", "the nodes agree")


def check_shared(directory: Path) -> Iterator[Finding]:
    """A file that rank 0 writes into the run's directory, every rank must see. Collective."""
    words = [f"{os.getpid()} {time.time_ns()}"]
    dist.broadcast_object_list(words)
    file = directory / ".doctor-shared"
    by_rank_zero(write_atomically, file, words[0])  # a failure is every rank's finding
    start = time.monotonic()
    while not _holds(file, words[0]) and time.monotonic() < start + VISIBLE_WITHIN:
        time.sleep(0.5)
    is_visible, waited = _holds(file, words[0]), time.monotonic() - start
    dist.barrier()
    if dist.get_rank() == 0:
        file.unlink()
    if not is_visible:
        yield fail(
            "shared", f"{directory} is another directory on this node; set run_dir on a file system of all nodes"
        )
    elif waited > 1:
        yield warn(
            "shared", f"{directory}: a new file was seen after {waited:.0f} s; training waits so long at each save"
        )
    else:
        yield ok("shared", "what one rank writes, all see")


def _holds(file: Path, words: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == words
    except OSError:
        return False
