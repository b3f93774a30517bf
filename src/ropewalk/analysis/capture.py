"""Queries and keys of one forward pass, before and after RoPE, handed over layer by layer and then forgotten.

Both sides are captured, neither is computed: *before* is what the model's own rotation receives, *after* is what a
registered attention function receives. Turning *after* back would be exact only in real numbers: in bfloat16 the
cosines, the sines and the rotated values are rounded, and an un-rotated query would not be the model's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from ropewalk.rope.log_temperature import BETA, CARRIER, LENGTH

NAME = "ropewalk_observed"
ROPE = ("before", "after")
# Relative change of a Frobenius norm that rounding explains: eight bits of bfloat16, averaged over many values.
NORM_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class LayerHeads:
    """Queries and keys of one layer in one pass.

    Attributes:
        layer: index.
        queries: "before" and "after" RoPE, each (heads, tokens, head_dim) in the model's dtype; equal in a layer that
            does not rotate. Where the model scales queries by their position (Ministral 3), both are scaled.
        keys: likewise (key/value heads, tokens, head_dim); query head h attends to key head h // (heads / key heads).
        attention_scaling: factor of cosines and sines, so *after* is a rotation of *before* times this.
        logit_scaling: what the model multiplies q.k by before the softmax, mostly head_dim^-0.5.
        window: keys that a query sees, the last ones up to its own; None: all up to its own.
        softcap: bound of the scaled logits, c tanh(x / c) (Gemma 2); None: they have none.
    """

    layer: int
    queries: dict[str, Tensor]
    keys: dict[str, Tensor]
    attention_scaling: float
    logit_scaling: float
    window: int | None = None
    softcap: float | None = None


Observer = Callable[[LayerHeads], None]


def observe(model: PreTrainedModel, ids: Tensor, layers: Collection[int], observer: Observer) -> None:
    """Run the decoder over one document and call ``observer`` in every layer of ``layers``, in their order.

    The logits are never computed, and no layer's queries and keys outlive its call, but for what the observer keeps.

    Args:
        model: of a type in geometry_plan.MEASURED_TYPES, in evaluation mode.
        ids: LongTensor (tokens,).
        layers: indices of the layers to observe.
        observer: gets each layer's queries and keys.

    Raises:
        RuntimeError: where *after* is not a rotation of *before*, so that the model was not read right.
    """
    decoder, stock = model.get_decoder(), model.config._attn_implementation
    modeling = sys.modules[type(decoder.layers[0].self_attn).__module__]
    attend = AttentionInterface().get_interface(stock, getattr(modeling, "eager_attention_forward", None))
    capture = _Capture({layer: _attention_scaling(decoder, layer) for layer in layers}, observer, attend)
    AttentionInterface.register(NAME, capture.attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()[stock])
    model.set_attn_implementation(NAME)
    try:
        with torch.inference_mode(), _watched_rotation(modeling, capture):
            decoder(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        model.set_attn_implementation(stock)


def _attention_scaling(decoder: Any, layer: int) -> float:
    rotary = decoder.rotary_emb
    if hasattr(rotary, "attention_scaling"):
        return float(rotary.attention_scaling)
    return float(getattr(rotary, f"{decoder.config.layer_types[layer]}_attention_scaling"))


@dataclass
class _Capture:
    """Joins both sides of a layer, checks them and passes them on.

    Attributes:
        scalings: attention scaling of each layer to observe.
        observer: gets them.
        attend: the model's own attention function.
        unrotated: queries and keys of the rotation that no attention has followed yet.
    """

    scalings: Mapping[int, float]
    observer: Observer
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    unrotated: tuple[Tensor, ...] = field(default=(), init=False)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention, which shows its queries and keys first; transformers' signature."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        rotates = bool(getattr(module, "use_rope", True))  # SmolLM3's layers may not
        unrotated, self.unrotated = self.unrotated if rotates else (query, key), ()
        if module.layer_idx in self.scalings and unrotated:
            q, k = unrotated
            config: Any = module.config
            if config.model_type == CARRIER:  # it scales after the rotation, with which a factor commutes
                entry = config.rope_parameters
                q = q * get_llama_4_attn_scale(kwargs["position_ids"], entry[BETA], entry[LENGTH]).to(q.dtype)
            heads = LayerHeads(
                layer=int(module.layer_idx),  # type: ignore[arg-type]
                queries={"before": q[0], "after": query[0]},
                keys={"before": k[0], "after": key[0]},
                attention_scaling=self.scalings[module.layer_idx] if rotates else 1.0,  # type: ignore[index]
                logit_scaling=scaling,
                window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
            )
            _check_rotation(heads)
            self.observer(heads)
        return self.attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


@contextmanager
def _watched_rotation(modeling: Any, capture: _Capture) -> Iterator[None]:
    """Have the rotation of transformers' modeling file note what it is given, whatever norm or clamp stands before it.

    Every layer looks the function up there when it is called; nothing else of the file is touched.
    """
    stock = modeling.apply_rotary_pos_emb

    def noting(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        capture.unrotated = (q, k)
        return stock(q, k, cos, sin, *args, **kwargs)

    modeling.apply_rotary_pos_emb = noting
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = stock


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
