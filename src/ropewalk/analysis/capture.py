"""Queries and keys of one forward pass, before and after RoPE, handed over layer by layer and then forgotten.

Both sides are captured, neither is computed: *after* is what a registered attention function receives, *before* is the
output of the last module ahead of the rotation. Turning *after* back would be exact only in real numbers: in bfloat16
the cosines, the sines and the rotated values are rounded, and an un-rotated query would not be the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

NAME = "ropewalk_observed"
ROPE = ("before", "after")
# Relative change of a Frobenius norm that rounding explains: eight bits of bfloat16, averaged over many values.
NORM_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class LayerHeads:
    """Queries and keys of one layer in one pass.

    Attributes:
        layer: index.
        queries: "before" and "after" RoPE, each (heads, tokens, head_dim) in the model's dtype.
        keys: likewise (key/value heads, tokens, head_dim); query head h attends to key head h // (heads / key heads).
        attention_scaling: factor of cosines and sines, so *after* is a rotation of *before* times this.
        logit_scaling: what the model multiplies q.k by before the softmax, head_dim^-0.5.
    """

    layer: int
    queries: dict[str, Tensor]
    keys: dict[str, Tensor]
    attention_scaling: float
    logit_scaling: float


Observer = Callable[[LayerHeads], None]


def observe(model: PreTrainedModel, ids: Tensor, layers: Collection[int], observer: Observer) -> None:
    """Run the decoder over one document and call ``observer`` in every layer of ``layers``, in their order.

    The logits are never computed, and no layer's queries and keys outlive its call, but for what the observer keeps.

    Args:
        model: of a type in SUPPORTED_MODEL_TYPES, in evaluation mode.
        ids: LongTensor (tokens,).
        layers: indices of the layers to observe.
        observer: gets each layer's queries and keys.

    Raises:
        RuntimeError: where *after* is not a rotation of *before*, so that the model was not read right.
    """
    AttentionInterface.register(NAME, _observed_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    decoder = model.get_decoder()
    stock = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode(), _unrotated(decoder, layers) as before:
            scaling = decoder.rotary_emb.attention_scaling
            handover = _Handover(before, observer, scaling)
            decoder(input_ids=ids[None].to(model.device), use_cache=False, handover=handover)
    finally:
        model.set_attn_implementation(stock)


@dataclass
class _Handover:
    """Joins both sides of a layer, checks them and passes them on."""

    before: dict[int, dict[str, Tensor]]
    observer: Observer
    attention_scaling: float

    def __call__(self, module: Any, query: Tensor, key: Tensor, logit_scaling: float) -> None:
        unrotated = self.before.pop(module.layer_idx, None)
        if unrotated is None:
            return
        heads = LayerHeads(
            layer=module.layer_idx,
            queries={"before": unrotated["q"], "after": query[0]},
            keys={"before": unrotated["k"], "after": key[0]},
            attention_scaling=self.attention_scaling,
            logit_scaling=logit_scaling,
        )
        _check_rotation(heads)
        self.observer(heads)


def _observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    handover: _Handover | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stock causal SDPA that shows the handover its queries and keys; transformers' attention signature."""
    if handover is not None:
        handover(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def _unrotated(decoder: Any, layers: Collection[int]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Output of the last module before the rotation, by layer and side, (heads, tokens, head_dim) each.

    That is the norm of the heads where there is one (Qwen3), else the projection, whose bias (Qwen2) is part of it.
    """
    outputs: dict[int, dict[str, Tensor]] = {}
    hooks = []
    for layer in layers:
        attention = decoder.layers[layer].self_attn
        for side in "qk":
            module = getattr(attention, f"{side}_norm", None) or getattr(attention, f"{side}_proj")

            def keep(_module: nn.Module, _args: Any, out: Tensor, layer: int = layer, side: str = side) -> None:
                head_dim = decoder.layers[layer].self_attn.head_dim
                outputs.setdefault(layer, {})[side] = out[0].view(out.shape[1], -1, head_dim).transpose(0, 1)

            hooks.append(module.register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _check_rotation(heads: LayerHeads) -> None:
    for name, side in (("queries", heads.queries), ("keys", heads.keys)):
        before, after = (torch.linalg.vector_norm(side[rope].double()).item() for rope in ROPE)
        expected = before * heads.attention_scaling
        if abs(after - expected) > NORM_TOLERANCE[side["after"].dtype] * expected:
            raise RuntimeError(
                f"layer {heads.layer}: the Frobenius norm of the {name} is {before:.6g} before RoPE and {after:.6g} "
                f"after, with an attention scaling of {heads.attention_scaling:.6g}; what was captured is not one "
                "rotation, so this model's attention is built differently"
            )
