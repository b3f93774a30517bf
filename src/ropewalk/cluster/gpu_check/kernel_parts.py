"""Parts of the GPU check without an engine: machine, rotary tables, attention by kernel, loss.

Every part yields names and values; ``small`` is the size for a CPU, which proves that the part runs.
"""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import signature
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from ropewalk.config import CONFIG_DIR
from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import ModelConfig
from ropewalk.errors import UserError
from ropewalk.model.attention import PACKAGES, Documents, Kernel, attend, attention_kernel, load_kernel
from ropewalk.model.load import training_config
from ropewalk.model.loss import fp32_product, tiled_linear_cross_entropy
from ropewalk.model.rotary import install_spectrum
from ropewalk.runs.record import versions

Values = Iterator[tuple[str, Any]]
GIB = 2**30
ARMS = ("rope", "hardclip20", "cope20", "cope29", "cope34", "rope_id", "yarn8", "llama3")  # of configs/rope
LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
TINY = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def machine(device: torch.device, small: bool) -> Values:
    """Versions, the driver, what torch's own attention takes, which kernels there are, and a matrix product."""
    yield "python", platform.python_version()
    yield "versions", versions()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        yield (
            "gpu",
            f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, {properties.major}.{properties.minor}",
        )
        yield "cuda", torch.version.cuda
        yield "nccl", list(torch.cuda.nccl.version())
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        yield "driver", subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    yield "varlen_attn", ", ".join(signature(varlen.varlen_attn).parameters)
    yield "kernels", [{"kernel": name, "found": str(found)} for name, found in kernels(device)]
    n = 64 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    yield "matrix product, TFLOP/s", 2 * n**3 / seconds(lambda: a @ b, device) / 1e12


def adapted(varlen_attn: Callable[..., Any]) -> Callable[..., Any]:
    """torch's variable-length attention as torch 2.13 has it, from that of another version.

    Where ``enable_gqa`` is missing, keys and values are repeated, which takes their memory several times; an earlier
    form says ``is_causal`` in the place of ``window_size``.
    """
    names = signature(varlen_attn).parameters

    @wraps(varlen_attn)
    def call(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, scale: Any, window_size: Any, enable_gqa: bool) -> Any:
        words: dict[str, Any] = {"scale": scale}
        if "enable_gqa" in names:
            words["enable_gqa"] = enable_gqa
        elif enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        is_windowed = "window_size" in names
        if not is_windowed and window_size[0] >= 0:
            raise ValueError(f"window_size={window_size}: varlen_attn of this torch takes no window; use torch 2.13")
        words |= {"window_size": window_size} if is_windowed else {"is_causal": window_size == (-1, 0)}
        return varlen_attn(q, k, v, *bounds, **words)

    return call


def kernels(device: torch.device) -> Iterator[tuple[str, Kernel | UserError]]:
    """Every kernel by name, or why it cannot be used here."""
    for name in (*PACKAGES, "torch") if device.type == "cuda" else ("auto",):
        try:
            yield name, attention_kernel(device, name)
        except UserError as error:
            yield name, error


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[rounds // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(work: Callable[[], object], device: torch.device) -> float | None:
    """GiB that a call allocates at most beside what is there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    there = torch.cuda.memory_allocated(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - there) / GIB


def rotary(device: torch.device, small: bool) -> Values:
    """Tables of every arm against the CPU's, and against float64 of the same float32 frequencies."""
    positions = torch.cat([torch.arange(4096), torch.arange(4096, 520_192, 61), torch.arange(520_192, 524_288)])
    rows = []
    for arm in ARMS:
        rope = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "rope" / f"{arm}.yaml"))
        model = ModelConfig("llama3_8b", architecture={**TINY, "head_dim": 128}, theta=5e5, head_dim=128,
                            pretrained_length=8192)  # fmt: skip
        model.architecture["num_hidden_layers"] = 1
        lm = AutoModelForCausalLM.from_config(training_config(model, RopeConfig(**rope), 65_536))  # type: ignore[arg-type]
        install_spectrum(lm)
        module = lm.get_decoder().rotary_emb
        inv_freq = module.inv_freq.double()
        on_cpu = module(torch.zeros(1), positions[None])
        here = [x.cpu().double() for x in module.to(device)(torch.zeros(1, device=device), positions[None].to(device))]
        angles = torch.outer(positions.double(), inv_freq).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        off = torch.atan2(here[1][0] * cos - here[0][0] * sin, here[0][0] * cos + here[1][0] * sin)
        differs = max(float((a - b).abs().max()) for a, b in zip(here, on_cpu, strict=True))
        rows.append({"arm": arm, "from the CPU's": differs, "from float64, radians": float(off.abs().max())})
    yield "tables", rows


def attention(device: torch.device, small: bool) -> Values:
    """Every kernel over one document, each half of the rest, and short ones: time, memory, error, cost of one order."""
    heads, shared, width, tokens, short = (4, 2, 16, 128, 8) if small else (32, 8, 128, 65_536, 32)
    halves = [tokens >> k for k in range(1, 8)]
    shapes = {"one": [tokens], "halves": [*halves, halves[-1]], "short": [short] * (tokens // short)}
    rows = []
    for _, kernel in kernels(device):
        if isinstance(kernel, UserError):
            continue
        for shape, lengths in shapes.items():
            row: dict[str, Any] = {"kernel": str(kernel), "documents": shape}
            rows.append(row)
            try:
                _measure_attention(row, kernel, lengths, (heads, shared, width), device)
            except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # of a kernel; the others go on
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            yield "kernels", rows


def _measure_attention(
    row: dict[str, Any], kernel: Kernel, lengths: list[int], sizes: tuple[int, int, int], device: torch.device
) -> None:
    heads, shared, width = sizes
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, sum(lengths), count, width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for count in (heads, shared, shared)
    )
    documents = Documents.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), device)

    def forward() -> Tensor:
        return attend(kernel, q, k, v, None, documents)

    def both() -> None:
        torch.autograd.grad(forward().float().sum(), (q, k, v))

    few = min(4096, sum(lengths))
    ends = [end for end in torch.tensor(lengths).cumsum(0).tolist() if end < few]
    beginning = Documents.from_cu_seqlens(torch.tensor([0, *ends, few]), device)
    with torch.no_grad():
        first, second, third = (x[:, :, :few] for x in (q, k, v))
        out = attend(kernel, first, second, third, None, beginning)
        exact = attend(load_kernel("sdpa"), first.float(), second.float(), third.float(), None, beginning)
        row["from float32's"] = float((out.float() - exact).abs().max())
    flops = 4 * heads * width * sum(n * (n + 1) / 2 for n in lengths)  # backward: five products for forward's two
    for name, work, share in (("forward", forward, 1.0), ("both", both, 3.5)):
        taken = seconds(work, device)
        row |= {f"{name}, ms": taken * 1e3, f"{name}, TFLOP/s": share * flops / taken / 1e12}
    row["peak, GiB"] = peak_gib(both, device)
    torch.use_deterministic_algorithms(True)
    try:
        row["both in one order, ms"] = seconds(both, device) * 1e3
    finally:
        torch.use_deterministic_algorithms(False)


def loss(device: torch.device, small: bool) -> Values:
    """The tiled cross entropy, forward and both gradients, by the size of its chunks; logits in fp32 and rounded."""
    tokens, width, vocabulary = (256, 32, 512) if small else (65_536, 4096, 128_256)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, head = (torch.randn(n, width, device=device, dtype=dtype).requires_grad_() for n in (tokens, vocabulary))
    labels = torch.arange(tokens, device=device) % vocabulary
    rows = []
    for chunk in (64, 128) if small else (1024, 2048, 4096, 8192):

        def work(chunk: int = chunk) -> None:
            torch.autograd.grad(tiled_linear_cross_entropy(hidden, head, labels, chunk), (hidden, head))

        rows.append({"chunk": chunk, "ms": seconds(work, device) * 1e3, "peak, GiB": peak_gib(work, device)})
        yield "chunks", rows
    x, weight = hidden.detach()[:chunk], head.detach().T
    products: dict[str, Callable[[], Tensor]] = {
        "in fp32": lambda: fp32_product(x, weight),
        "rounded, then widened": lambda: torch.mm(x, weight).float(),
    }
    yield "products", [{"logits": name, "ms": seconds(product, device) * 1e3} for name, product in products.items()]
