"""Activation memory: checkpointing, what it keeps and where, the tiled MLP and compilation; no gradient changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ropewalk.config.train import TrainerConfig
from ropewalk.errors import UserError
from ropewalk.model.attention import KeptAttention

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ROTATION = "apply_rotary_pos_emb"  # as every model of SUPPORTED_MODEL_TYPES calls it
Gate = Callable[[Tensor, Tensor], Tensor]


def place_activations(lm: PreTrainedModel, trainer: TrainerConfig) -> None:
    """Put checkpointing, its offload, the tiled MLP and compilation in place, as configured; before the engine is.

    Compiled is what runs between the matrix products: the norms, the MLP's gate and the rotation of queries and keys.
    Whole layers are not, because each projection gathers its weights in hooks, which cut a layer's graph to such pieces
    anyway; compiled with them, two tiny layers took a minute to compile and four times as long to run.

    Raises:
        UserError: the MLP is to be tiled or compiled and is not the gated one.
    """
    if trainer.activation_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    gate = torch.compile(_gate) if trainer.compile else _gate
    for layer in lm.get_decoder().layers:
        if trainer.offload_activations or trainer.keep_attention:
            layer._gradient_checkpointing_func = partial(
                checkpoint_layer, on_host=trainer.offload_activations, keep_attention=trainer.keep_attention
            )
        if trainer.mlp_chunk_size is not None or trainer.compile:
            _check_gated(layer.mlp)
            forward = _whole_mlp if trainer.mlp_chunk_size is None else partial(_tiled_mlp, trainer.mlp_chunk_size)
            activation = layer.mlp.act_fn.forward  # without the hooks that ZeRO-3 puts on every module
            layer.mlp.forward = partial(forward, layer.mlp, partial(gate, activation))
    if trainer.compile:
        _compile_rotation([layer.self_attn for layer in lm.get_decoder().layers])
        norm = torch.compile(_rms_norm)
        for module in lm.modules():
            if type(module).__name__.endswith("RMSNorm"):  # OLMo 1's is a LayerNorm without weights, and stays
                module.forward = partial(_compiled_norm, module, norm)


def checkpoint_layer(function: Callable[..., Any], *inputs: Any, on_host: bool, keep_attention: bool) -> Any:
    """Checkpoint a layer in a way that transformers does not.

    Args:
        function: forward of the layer.
        *inputs: its hidden states.
        on_host: the inputs wait in host memory. transformers has an option of this kind, which requests pinned memory
            without a GPU, and fails.
        keep_attention: the attention is not computed again; what is held of it stays on the device.
    """
    if keep_attention:
        function = partial(function, kept_attention=KeptAttention())
    waiting: Any = torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host) if on_host else nullcontext()
    with waiting:
        return checkpoint(function, *inputs, use_reentrant=False)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """A copy in host memory; on a GPU a pinned one, made in the stream's order, so that nothing waits for it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, host = packed
    return host.to(device, non_blocking=True)


def _check_gated(mlp: nn.Module) -> None:
    children = [name for name, _ in mlp.named_children()]
    if set(children) != {*PROJECTIONS, "act_fn"}:
        raise UserError(
            f"trainer.mlp_chunk_size and trainer.compile know MLPs of {', '.join(PROJECTIONS)} and act_fn; "
            f"{type(mlp).__name__} has {', '.join(children)}: leave both out"
        )


def _compile_rotation(attentions: list[Any]) -> None:
    """Have each attention call a compiled ``apply_rotary_pos_emb``.

    transformers looks that function up in its module, which serves other models, too: it stays as it is, and these
    layers get a forward that looks it up elsewhere.
    """
    forward = type(attentions[0]).forward
    rotate = torch.compile(forward.__globals__[ROTATION])
    own = FunctionType(forward.__code__, {**forward.__globals__, ROTATION: rotate}, closure=forward.__closure__)
    own.__defaults__, own.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    for attention in attentions:
        attention.forward = partial(own, attention)


def _compiled_norm(module: Any, norm: Callable[..., Tensor], x: Tensor) -> Tensor:
    # The weight is read here, as reading it runs ZeRO-3's code, which is not part of a graph.
    family = type(module).__name__
    if family.startswith("Gemma"):  # whose weight is what the scale is above 1
        return norm(x, 1.0 + module.weight.float(), module.eps, True)
    return norm(x, module.weight, module.variance_epsilon, family.startswith("Olmo"))


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, scales_wide: bool) -> Tensor:
    """Normalised in fp32; scaled there (OLMo, Gemma) or, as the Llama family has it, in the model's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * normed).to(x.dtype) if scales_wide else weight * normed.to(x.dtype)


def _gate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _whole_mlp(mlp: Any, gate: Gate, x: Tensor) -> Tensor:
    return mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x)))


def _tiled_mlp(chunk_size: int, mlp: Any, gate: Gate, x: Tensor) -> Tensor:
    """A gated MLP on ``chunk_size`` tokens at a time, keeping nothing but its input for the backward pass.

    DeepSpeed's TiledMLP and checkpointed chunks add the weights' gradients up in the model's dtype, once a chunk; here
    they add up in fp32 and each weight gets one gradient, so ZeRO reduces it once, and gathers the weights once for all
    chunks. The number of chunks needs no agreement between ranks.
    """
    # Read here, inside the MLP's own forward, so that ZeRO-3 gathers all of them for it, and again for its backward.
    weights = [getattr(mlp, name).weight for name in PROJECTIONS]
    biases = [getattr(mlp, name).bias for name in PROJECTIONS]
    return _TiledGatedMLP.apply(x, chunk_size, gate, *weights, *biases)


def _gated_mlp(x: Tensor, gate: Gate, parameters: list[Any]) -> Tensor:
    gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias = parameters
    return F.linear(gate(F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)), down_weight, down_bias)


class _TiledGatedMLP(torch.autograd.Function):
    """down(activation(gate(x)) * up(x)), a chunk of tokens at a time in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, chunk_size: int, gate: Gate, *parameters: Tensor | None) -> Tensor:
        ctx.chunk_size, ctx.gate = chunk_size, gate
        ctx.save_for_backward(x, *parameters)
        chunks = x.reshape(-1, x.shape[-1]).split(chunk_size)
        return torch.cat([_gated_mlp(chunk, gate, list(parameters)) for chunk in chunks]).view(x.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors  # type: ignore[attr-defined]
        chunk_size, gate = ctx.chunk_size, ctx.gate  # type: ignore[attr-defined]
        leaves = [None if p is None else p.detach().requires_grad_() for p in parameters]
        present = [i for i, p in enumerate(parameters) if p is not None]
        sums = {
            i: torch.zeros_like(parameters[i], dtype=torch.promote_types(parameters[i].dtype, torch.float32))
            for i in present
        }
        grad_x = []
        rows = (tensor.reshape(-1, x.shape[-1]).split(chunk_size) for tensor in (x, grad_output[0]))
        for chunk, grad in zip(*rows, strict=True):
            with torch.enable_grad():
                part = chunk.detach().requires_grad_()
                out = _gated_mlp(part, gate, leaves)
            grad_part, *gradients_here = torch.autograd.grad(out, [part, *(leaves[i] for i in present)], grad)
            grad_x.append(grad_part)
            for i, gradient in zip(present, gradients_here, strict=True):
                sums[i] += gradient
        gradients = [sums[i].to(p.dtype) if i in sums else None for i, p in enumerate(parameters)]
        return torch.cat(grad_x).view(x.shape), None, None, *gradients
