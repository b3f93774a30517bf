"""Document-masked causal attention over packed sequences: one registered function, a back end for each device.

Stock attention isolates packed documents only under conditions that it does not check (no cache, no mask, no sequence
parallelism) and leaks in silence otherwise. Here the documents are an argument, and without it there is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "ropewalk_documents"


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents in one flat row of tokens; made once per batch.

    Attributes:
        cu_seqlens: int32 (n + 1,) on the model's device: 0, end of document 1, ..., number of tokens.
        bounds: the same numbers as Python ints, so that no layer waits for the device.
        max_seqlen: tokens of the longest document.
        group: the ranks that each hold an equal stretch of the row, in order; None where this rank holds all of it.
    """

    cu_seqlens: Tensor
    bounds: tuple[int, ...]
    max_seqlen: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> Documents:
        """From cumulative lengths of the whole row, on the CPU."""
        bounds = tuple(cu_seqlens.tolist())
        longest = max(end - start for start, end in pairwise(bounds))
        return cls(cu_seqlens.to(device, torch.int32, non_blocking=True), bounds, longest, group)


@torch.compiler.disable  # a compiled graph would be made anew for the bounds of every batch
def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, with transformers' attention signature.

    Args:
        module: the attention layer (unused).
        query: (1, heads, tokens, head_dim).
        key: (1, key/value heads, tokens, head_dim); grouped heads are shared, not repeated in memory.
        value: like key.
        attention_mask: must be None; the documents say everything.
        scaling: of the logits; None for head_dim^-0.5.
        documents: bounds of the documents in this row; where its ``group`` shares the row, ``tokens`` is this rank's
            stretch of it.
        **kwargs: dropout must be 0; a sliding window is refused.

    Returns:
        (1, tokens, heads, head_dim) and None for the weights.
    """
    if documents is None or attention_mask is not None:
        raise ValueError(
            f"attn_implementation={NAME} needs documents=Documents(...) and no attention mask; for one document in a "
            "row load the model with attn_implementation=sdpa"
        )
    if kwargs.get("dropout") or kwargs.get("sliding_window"):
        raise ValueError(
            f"dropout={kwargs.get('dropout')}, sliding_window={kwargs.get('sliding_window')}: {NAME} has neither; "
            "set attention_dropout: 0.0 and sliding_window: null in the model's config"
        )
    attend = _varlen if query.is_cuda else _per_document
    if documents.group is None:
        return attend(query, key, value, scaling, documents), None
    query, key, value = (_tokens_for_heads(x, documents.group) for x in (query, key, value))
    return _heads_for_tokens(attend(query, key, value, scaling, documents), documents.group), None


def _tokens_for_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(1, heads, tokens / n, head_dim) -> (1, heads / n, tokens, head_dim); each rank's share, of n."""
    from deepspeed.sequence.layer import _dim_zero_all_to_all

    _, heads, tokens, head_dim = x.shape
    n = dist.get_world_size(group)
    traded = _dim_zero_all_to_all(group, x.reshape(n, heads // n, tokens, head_dim))
    return traded.transpose(0, 1).reshape(1, heads // n, n * tokens, head_dim)


def _heads_for_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(1, tokens, heads / n, head_dim) -> (1, tokens / n, heads, head_dim)."""
    from deepspeed.sequence.layer import _dim_zero_all_to_all

    _, tokens, heads, head_dim = x.shape
    n = dist.get_world_size(group)
    traded = _dim_zero_all_to_all(group, x.reshape(n, tokens // n, heads, head_dim))
    return traded.transpose(0, 1).reshape(1, tokens // n, n * heads, head_dim)


def _per_document(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, documents: Documents) -> Tensor:
    """One causal SDPA per document: O(sum of squared lengths) work, O(tokens) memory."""
    pieces = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pairwise(documents.bounds)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, documents: Documents) -> Tensor:
    """The variable-length kernel: flash-attn's if installed, else torch's own."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    cu, longest = documents.cu_seqlens, documents.max_seqlen
    flash = _flash_attn_varlen()
    if flash is not None:
        out = flash(q, k, v, cu, cu, longest, longest, softmax_scale=scaling, causal=True)
    else:
        from torch.nn.attention.varlen import varlen_attn

        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
    return out[None]


@cache
def _flash_attn_varlen() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def attention_kernel(device: str) -> str:
    """Name of the back end that this machine will use, for the run's record."""
    if device == "cpu":
        return "sdpa per document"
    return "flash-attn varlen" if _flash_attn_varlen() is not None else "torch varlen"


def register() -> str:
    """Make the function known to transformers; returns the name for ``attn_implementation``.

    No mask function is registered with it: transformers would look for packed documents in every forward pass to build
    its mask, for which the CPU waits for a GPU, and the documents are an argument here.
    """
    AttentionInterface.register(NAME, document_attention)
    return NAME
