"""GPUs, the kernels that will run on them, and the model and data that they are to be fed with."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch

from ropewalk.cluster.doctor.screen import Finding, fail, ok, warn
from ropewalk.config.train import TrainConfig
from ropewalk.data.store.remote import open_stores
from ropewalk.model.attention import Documents, attention_kernel, document_attention
from ropewalk.model.loss import tiled_linear_cross_entropy

BUSY_GIB = 1.0  # of a GPU's memory that another process may hold


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
        yield fail("device", f"torch {torch.__version__} sees no CUDA device; trainer.device=cpu, or run on a GPU node")
        return
    count = torch.cuda.device_count()
    if local_rank >= count:
        yield fail("device", f"{count} GPUs are seen, and this is rank {local_rank} of its node: one task a GPU")
        return
    free, total = torch.cuda.mem_get_info(local_rank)
    properties = torch.cuda.get_device_properties(local_rank)
    said = f"{count} x {properties.name}, {total / 2**30:.1f} GiB, driver {_driver()}, CUDA {torch.version.cuda}"
    if count < gpus:
        yield fail("device", f"{said}; {gpus} are counted on: ask for them (cluster.gpus_per_node, --gpus-per-node)")
    elif (total - free) / 2**30 > BUSY_GIB:
        held = (total - free) / 2**30
        yield warn("device", f"{said}; {held:.1f} GiB of one are held by another process (nvidia-smi names it)")
    else:
        yield ok("device", said)
    if not torch.cuda.is_bf16_supported():
        yield fail("device", f"{properties.name} has no bf16; use GPUs of Ampere or later")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else "unknown"


def check_kernels(device: torch.device, dtype: torch.dtype, loss_chunk_size: int) -> Iterator[Finding]:
    """Run attention and loss once, forward and backward, and see that one document does not see another."""
    name = attention_kernel(device.type)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 256, 64)
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(True) for _ in range(3)
    )
    documents = Documents.from_cu_seqlens(torch.tensor([0, 100, 256]), device)
    out, _ = document_attention(torch.nn.Identity(), query, key, value, None, documents=documents)
    out[:, 100:].float().sum().backward()
    if key.grad is None or not torch.isfinite(key.grad).all():
        yield fail("attention", f"{name}: its gradient is not finite")
    elif key.grad[:, :, :100].abs().max() > 0:
        yield fail("attention", f"{name}: a document's gradient reaches the document before it")
    else:
        yield ok("attention", f"{name}, documents apart")
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


def check_model(model_config: Any, parameters: int, path: str | None) -> Iterator[Finding]:
    """The model's configuration, which was read to get here."""
    where = path or "from scratch"
    yield ok("model", f"{model_config.model_type}, {parameters / 1e9:.3g} billion parameters, {where}")


def check_data(config: TrainConfig) -> Iterator[Finding]:
    """Every domain of every store can be read, and the tokenizer lies beside."""
    before = time.monotonic()
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
    seconds = time.monotonic() - before
    said = f"{len(stores)} store{'s' if len(stores) > 1 else ''}, {domains} domains, {sequences:,} sequences"
    if seconds > 30:
        yield warn("data", f"{said}; one sequence of each took {seconds:.0f} s: copy the store to a faster disk")
    else:
        yield ok("data", said)
