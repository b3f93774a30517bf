"""Document-masked causal attention over packed sequences: one registered function, a kernel for each device.

Stock attention isolates packed documents only under conditions that it does not check (no cache, no mask, no sequence
parallelism) and leaks in silence otherwise. Here the documents are an argument, and without it there is an error.

On a GPU one call by keyword suits every kernel. FlashAttention is called by its own packages: torch's activation of
FlashAttention-4 unpacks two results of a function that returns four or five in its betas since 4.0.0b22, and changes
SDPA in the whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ropewalk.config.train import ATTENTION_CHOICES
from ropewalk.errors import UserError

NAME = "ropewalk_documents"
HOPPER = 9  # major compute capability of H100 and H200
ARGUMENTS = (
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "deterministic",
    "window_size",
)  # fmt: skip
BLOCK = 1024  # queries of a window that a CPU computes at once: their mask is BLOCK x (BLOCK + window)
UNKNOWN = ("dropout", "softcap", "s_aux")  # what other models hand to their attention (Gemma 2, gpt-oss's sinks)


class Package(NamedTuple):
    """The package of a kernel.

    Attributes:
        module: that has ``flash_attn_varlen_func``.
        distribution: its name in an index.
        majors: compute capabilities that it has kernels for.
    """

    module: str
    distribution: str
    majors: tuple[int, ...]


# In order of preference where several fit a GPU.
PACKAGES = {
    "fa3": Package("flash_attn_interface", "flash-attn-3", (9,)),
    "fa4": Package("flash_attn.cute", "flash-attn-4", (9, 10)),
    "fa2": Package("flash_attn", "flash-attn", (8, 9, 10, 12)),
}


@dataclass(frozen=True)
class Kernel:
    """A variable-length attention kernel.

    Attributes:
        name: as in ``trainer.attention``.
        distribution: what it came with.
        version: of that.
        call: takes q (tokens, heads, head_dim), k and v, and ARGUMENTS by keyword; returns the output like q, or a
            tuple that begins with it.
        passed_over: why kernels that would be preferred are not used.
    """

    name: str
    distribution: str
    version: str
    call: Callable[..., Any]
    passed_over: tuple[str, ...] = ()

    @property
    def is_of_flash_attention_2(self) -> bool:
        """True for kernels that use nothing that Hopper has and Ampere has not."""
        return self.name in ("fa2", "torch")

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents in one flat row of tokens; made once per batch.

    Attributes:
        cu_seqlens: int32 (n + 1,) on the model's device: 0, end of document 1, ..., number of tokens.
        max_seqlen: tokens of the longest document; a Python int, so that no layer waits for the device.
        group: the ranks that each hold an equal stretch of the row, in order; None where this rank holds all of it.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> Documents:
        """From cumulative lengths of the whole row, on the CPU.

        Raises:
            UserError: for a document without a token, with which FlashAttention-3's backward pass does not end.
        """
        lengths = cu_seqlens.diff().tolist()
        if min(lengths) <= 0:
            number = next(number for number, length in enumerate(lengths) if length <= 0)
            raise UserError(
                f"document {number} of {len(lengths)} in a row has {lengths[number]} tokens, and must have one or "
                "more; prepare the store again"
            )
        return cls(cu_seqlens.to(device, torch.int32, non_blocking=True), max(lengths), group)


class KeptAttention:
    """The attention of one checkpointed layer, held from its forward pass to the end of its backward pass.

    Held are the output and whatever else the kernel saves for its backward pass. Queries, keys and values are not: the
    checkpoint computes them again.
    """

    def __init__(self) -> None:
        self.out: Tensor | None = None  # with the kernel's graph
        self.leaves: list[Tensor] = []  # that graph's inputs, without their memory once the forward pass is over
        self.recomputed: list[Tensor] = []

    def run(self, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        """Run the kernel on q, k and v, with what it saves of their memory taken from ``recomputed`` later."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        owners = {x.untyped_storage()._cdata: number for number, x in enumerate(leaves)}
        recomputed = self.recomputed  # the graph must not hold this object, which holds the graph

        def pack(tensor: Tensor) -> Any:
            number = owners.get(tensor.untyped_storage()._cdata)
            if number is None:
                return tensor
            return number, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else recomputed[packed[0]].as_strided(*packed[1:])

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            self.out = call(*leaves)
        for leaf in leaves:
            leaf.data = leaf.new_empty(0)  # the graph holds its leaves
        self.leaves = leaves

    def gradients(self, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k and v; lets go of what was held."""
        self.recomputed[:] = inputs
        out, self.out = self.out, None
        assert out is not None
        gradients = torch.autograd.grad(out, self.leaves, grad)
        self.recomputed.clear()
        return gradients


class _RunOnce(torch.autograd.Function):
    """A kernel inside a checkpoint, which runs in the forward pass alone; when computed again it gives what is held.

    torch's selective checkpointing holds the output of operations by their name in the dispatcher, and sees every
    operation of the layer to find them. FlashAttention-4 has no such name; this knows no kernel.
    """

    @staticmethod
    def forward(ctx: Any, kept: KeptAttention, call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(*inputs)
        if kept.out is None:
            kept.run(call, inputs)
        assert kept.out is not None
        return kept.out.detach()

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # computes the layer again, up to here
        return None, None, *ctx.kept.gradients(inputs, grad_output[0])


@torch.compiler.disable  # a compiled graph would be made anew for the bounds of every batch
def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    documents: Documents | None = None,
    choice: str = "auto",
    kept_attention: KeptAttention | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, with transformers' attention signature.

    With a window w, query i of a document sees its keys j with 0 <= i - j < w, as transformers' own masks have it.

    Args:
        module: the attention layer (unused).
        query: (1, heads, tokens, head_dim).
        key: (1, key/value heads, tokens, head_dim); grouped heads are shared, not repeated in memory.
        value: like key.
        attention_mask: must be None; the documents say everything.
        scaling: of the logits; None for head_dim^-0.5.
        documents: bounds of the documents in this row; where its ``group`` shares the row, ``tokens`` is this rank's
            stretch of it. See :func:`ropewalk.config.rules.sharing_degrees` for the ranks that can.
        choice: kernel on a GPU, one of ATTENTION_CHOICES.
        kept_attention: of the checkpoint that this layer runs in, where its attention is not to be computed again.
        sliding_window: keys that a query of this layer sees, its own with them; None: all before it.
        **kwargs: none of UNKNOWN may be set.

    Returns:
        (1, tokens, heads, head_dim) and None for the weights.
    """
    if documents is None or attention_mask is not None:
        raise ValueError(
            f"attn_implementation={NAME} needs documents=Documents(...) and no attention mask; for one document in a "
            "row load the model with attn_implementation=sdpa"
        )
    if unknown := [name for name in UNKNOWN if torch.is_tensor(kwargs.get(name)) or kwargs.get(name)]:
        raise ValueError(
            f"{unknown[0]}={kwargs[unknown[0]]}: {NAME} knows none; set attention_dropout: 0.0 in the model's config, "
            "and train a model without soft caps and attention sinks"
        )
    if documents.group is not None:
        query, key, value = (_tokens_for_heads(x, documents.group) for x in (query, key, value))
    kernel = attention_kernel(query.device, choice)
    run = partial(attend, kernel, scaling=scaling, documents=documents, window=sliding_window)
    if kept_attention is None or not torch.is_grad_enabled():
        out = run(query, key, value)
    else:
        out = _RunOnce.apply(kept_attention, run, query, key, value)
    return out if documents.group is None else _heads_for_tokens(out, documents.group), None


def _tokens_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(1, heads, tokens / n, head_dim) -> (1, heads / n, tokens, head_dim); each rank's share, of n.

    Fewer heads than ranks: each head is sent to the n / heads ranks whose query heads attend to it, (1, 1, tokens,
    head_dim), and its gradient is the sum of theirs. torch adds them up in fp32 and rounds to their dtype once, as
    FlashAttention-2 does with the query heads that share a key/value head.
    """
    from deepspeed.sequence.layer import _dim_zero_all_to_all

    n = dist.get_world_size(group)
    if x.shape[1] < n:
        x = x.repeat_interleave(n // x.shape[1], dim=1)
    _, heads, tokens, head_dim = x.shape
    traded = _dim_zero_all_to_all(group, x.reshape(n, heads // n, tokens, head_dim))
    return traded.transpose(0, 1).reshape(1, heads // n, n * tokens, head_dim)


def _heads_for_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(1, tokens, heads / n, head_dim) -> (1, tokens / n, heads, head_dim)."""
    from deepspeed.sequence.layer import _dim_zero_all_to_all

    _, tokens, heads, head_dim = x.shape
    n = dist.get_world_size(group)
    traded = _dim_zero_all_to_all(group, x.reshape(n, tokens // n, heads, head_dim))
    return traded.transpose(0, 1).reshape(1, tokens // n, n * heads, head_dim)


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    documents: Documents,
    window: int | None = None,
) -> Tensor:
    """One kernel over all documents; the layouts and the window are those of :func:`document_attention`."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    # each package has its own word for no window; all count the keys before a query's own, and those after it
    bounds = {} if window is None or window >= longest else {"window_size": (window - 1, 0)}
    out = kernel.call(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=scaling,
        causal=True, deterministic=torch.are_deterministic_algorithms_enabled(), **bounds,
    )  # fmt: skip
    return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)


def _sdpa_per_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int] | None = None,
    **rest: Any,
) -> Tensor:
    """SDPA of each document, for CPUs: O(sum of squared lengths) work, O(tokens) memory.

    Under a window BLOCK queries at a time, with the keys that they see, so that no mask is as long as the document.
    """
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    run = partial(F.scaled_dot_product_attention, scale=softmax_scale, enable_gqa=query.shape[1] != key.shape[1])
    pieces, masks = list[Tensor](), dict[tuple[int, int], Tensor]()
    for start, end in pairwise(cu_seqlens_q.tolist()):
        if window_size is None or end - start <= window_size[0] + 1:
            part = slice(start, end)
            pieces.append(run(query[:, :, part], key[:, :, part], value[:, :, part], is_causal=causal))
            continue
        for first in range(start, end, BLOCK):
            last, seen = min(first + BLOCK, end), max(first - window_size[0], start)
            shape = last - first, last - seen
            if shape not in masks:  # kept for the backward pass, once for all blocks of a shape
                masks[shape] = _band(*shape, window_size[0], query)
            part, keys = slice(first, last), slice(seen, last)
            pieces.append(run(query[:, :, part], key[:, :, keys], value[:, :, keys], attn_mask=masks[shape]))
    return torch.cat(pieces, dim=2).squeeze(0).transpose(0, 1)


def _band(rows: int, columns: int, before: int, like: Tensor) -> Tensor:
    """(rows, columns) of 0 where a query sees a key, else -inf; the last query's own key is the last."""
    own = columns - rows
    is_seen = torch.ones(rows, columns, dtype=torch.bool, device=like.device).tril(own).triu(own - before)
    return torch.zeros(rows, columns, dtype=like.dtype, device=like.device).masked_fill(~is_seen, -torch.inf)


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, softmax_scale: float | None, causal: bool, window_size: tuple[int, int] = (-1, 0), **rest: Any,
) -> Any:  # fmt: skip
    """torch's own kernel, which is FlashAttention-2's. Its backward pass looks up itself whether torch is to be
    deterministic.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
        window_size=window_size, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


OF_TORCH: dict[str, Callable[..., Any]] = {"torch": _torch_varlen, "sdpa": _sdpa_per_document}


def load_kernel(name: str) -> Kernel:
    """The kernel of that name, imported.

    Raises:
        UserError: its package cannot be imported, or its function lacks one of ARGUMENTS.
    """
    if name in OF_TORCH:
        return Kernel(name, "torch", torch.__version__, OF_TORCH[name])
    package = PACKAGES[name]
    fix = f"install {package.distribution} (docs/quickstart.md), or set trainer.attention=auto"
    try:
        call = import_module(package.module).flash_attn_varlen_func
    except Exception as error:  # whatever a package raises that does not fit its CUDA, driver or dependencies
        words = " ".join(str(error).split())
        raise UserError(
            f"trainer.attention={name}: {package.module} cannot be imported ({type(error).__name__}: {words}); {fix}"
        ) from error
    missing = [argument for argument in ARGUMENTS if argument not in signature(call).parameters]
    if missing:
        raise UserError(
            f"trainer.attention={name}: flash_attn_varlen_func of {package.module} does not take {', '.join(missing)} "
            f"(flash-attn 2 brings an old {PACKAGES['fa4'].module} along, over that of flash-attn-4); {fix}"
        )
    try:
        installed = version(package.distribution)
    except PackageNotFoundError:  # built in place
        installed = "of unknown version"
    return Kernel(name, package.distribution, installed, call)


@cache
def choose_kernel(choice: str, major: int) -> Kernel:
    """The kernel for a GPU.

    Args:
        choice: one of ATTENTION_CHOICES; auto takes the first of PACKAGES that fits and can be imported, else torch's.
        major: of the GPU's compute capability; 9: Hopper.

    Raises:
        UserError: the one that is named cannot be imported, or has no kernels for the GPU.
    """
    if choice != "auto":
        if choice in PACKAGES and major not in PACKAGES[choice].majors:
            majors = ", ".join(map(str, PACKAGES[choice].majors))
            raise UserError(
                f"trainer.attention={choice}: {PACKAGES[choice].distribution} is for compute capability {majors}, and "
                f"this GPU has {major}; set trainer.attention=auto"
            )
        return load_kernel(choice)
    reasons: list[str] = []
    for name in [name for name, package in PACKAGES.items() if major in package.majors]:
        try:
            return replace(load_kernel(name), passed_over=tuple(reasons))
        except UserError as error:
            reasons.append(f"{name}: {error.__cause__ or error}")
    return replace(load_kernel("torch"), passed_over=tuple(reasons))


def attention_kernel(device: torch.device, choice: str = "auto") -> Kernel:
    """The kernel that document attention uses on a device; on a CPU one SDPA for each document.

    Raises:
        UserError: see :func:`choose_kernel`.
    """
    if device.type != "cuda":
        return load_kernel("sdpa")
    return choose_kernel(choice, torch.cuda.get_device_capability(device)[0])


def register(choice: str = "auto") -> str:
    """Make the function known to transformers; returns the name for ``attn_implementation``.

    No mask function is registered with it: transformers would look for packed documents in every forward pass to build
    its mask, for which the CPU waits for a GPU, and the documents are an argument here.

    Args:
        choice: kernel on a GPU, one of ATTENTION_CHOICES; each has a name of its own.
    """
    if choice not in ATTENTION_CHOICES:
        raise ValueError(f"{choice} is not one of {ATTENTION_CHOICES}")
    name = f"{NAME}_{choice}"
    AttentionInterface.register(name, partial(document_attention, choice=choice))
    return name
