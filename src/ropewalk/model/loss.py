"""The loss: cross entropy from hidden states, one chunk of logits in memory at a time; the model whose output it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from ropewalk.data.order.batches import IGNORE_INDEX, VisionInputs
from ropewalk.model.attention import Documents
from ropewalk.model.vision import embed


def fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32: as it was added up where the device gives that (CUDA), else rounded to the inputs' dtype first."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class _TiledLinearCrossEntropy(torch.autograd.Function):
    """Both gradients are formed in forward, so backward needs neither the logits nor the gathered weight."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        token_losses: Tensor | None,
        z_loss: float,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        trained = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        for rows in trained.split(chunk_size):
            x, target = hidden[rows], labels[rows, None]
            logits = fp32_product(x, weight.T)
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            losses = normalizer - logits.gather(1, target)
            total += losses.sum()
            if z_loss:
                total += z_loss * normalizer.square().sum()
            if token_losses is not None:
                token_losses[rows] = losses.squeeze(1)
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = logits.sub_(normalizer).exp_()  # softmax, in the logits' own memory
                if z_loss:
                    grad_logits.mul_(1 + 2 * z_loss * normalizer)
                grad_logits.scatter_add_(1, target, torch.full_like(normalizer, -1.0))
                grad_logits = grad_logits.to(weight.dtype)
                grad_hidden[rows] = grad_logits @ weight
                grad_weight += fp32_product(grad_logits.T, x)
        if grad_hidden is not None and grad_weight is not None:
            ctx.dtype = weight.dtype
            ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        scale = grad_output[0]
        scaled = torch.empty_like(grad_weight, dtype=ctx.dtype)  # type: ignore[attr-defined]
        torch.mul(grad_weight, scale, out=scaled)  # rounded to the weight's dtype once, after scaling
        return grad_hidden * scale, scaled, None, None, None, None


def tiled_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int,
    token_losses: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over trained tokens of -log softmax(hidden @ weight.T)[label], and z_loss x logsumexp^2 of the logits.

    One function for every device, because it is the one that is exact here. torch's own chunked linear_cross_entropy
    returns a bf16 sum for bf16 inputs, three digits of a loss, and knows no z-loss; DeepSpeed's TiledFusedLogitsLoss
    loses the factor that the loss is scaled by after it on the head's gradient, so accumulation is wrong; Liger's
    kernel adds the head's gradient up in bf16 unless told otherwise and runs on CUDA alone. Here the sum and the head's
    gradient add up in fp32, and a factor put on the loss afterwards reaches both gradients. Rows without a label cost
    nothing.

    The z-loss is PaLM's (arXiv 2204.02311, section 5), which keeps the logits' scale from drifting.

    Args:
        hidden: (tokens, width), fp32 or bf16.
        weight: (vocabulary, width), of the same dtype.
        labels: int64 (tokens,); -100 is not trained on.
        chunk_size: tokens whose logits exist at once; memory is chunk_size x vocabulary fp32.
        token_losses: fp32 (tokens,), gets the cross entropy of each trained token, without z-loss, for metrics; the
            others stay as they are.
        z_loss: coefficient; 0 leaves it out.

    Returns:
        fp32 scalar; exactly 0 where no token is trained on.
    """
    return _TiledLinearCrossEntropy.apply(hidden, weight, labels, chunk_size, token_losses, z_loss)


class HeadLoss(nn.Module):
    """The output head with the loss: a module of its own, without parameters of its own.

    ZeRO-3 gathers a foreign parameter for as long as the module that reads it runs. In LossModel that would be the
    whole forward pass, and again the whole backward pass. A head of more than ``stage3_max_live_parameters`` elements,
    as Llama-3-70B's is, would leave no room to prefetch anything.
    """

    def __init__(self, lm: PreTrainedModel, chunk_size: int, z_loss: float) -> None:
        super().__init__()
        self.head = lm.get_output_embeddings  # not the module, which is a child of the model's
        self.chunk_size, self.z_loss = chunk_size, z_loss

    def forward(
        self, hidden: Tensor, labels: Tensor, token_losses: Tensor | None = None, logits_at: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states (tokens, width), or their logits; the rest as of :meth:`LossModel.forward`."""
        weight = self.head().weight
        if not torch.is_grad_enabled():
            weight = weight.detach()  # else the loss would form the head's gradient all the same
        if logits_at is not None:
            return fp32_product(hidden[logits_at], weight.T)
        return tiled_linear_cross_entropy(hidden, weight, labels, self.chunk_size, token_losses, self.z_loss)


class LossModel(nn.Module):
    """A causal language model whose forward is the summed loss, so that ZeRO-3 gathers the head inside it."""

    def __init__(self, lm: PreTrainedModel, chunk_size: int, z_loss: float = 0.0) -> None:
        super().__init__()
        self.lm = lm
        self.loss = HeadLoss(lm, chunk_size, z_loss)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        documents: Documents,
        token_losses: Tensor | None = None,
        logits_at: Tensor | None = None,
        vision: VisionInputs | None = None,
    ) -> Tensor:
        """Summed cross entropy of one packed row, and its z-loss if there is one; or some of its logits.

        Args:
            input_ids: int64 (1, tokens).
            position_ids: int64 (1, tokens), from 0 in each document.
            labels: int64 (1, tokens), already shifted; -100 is not trained on.
            documents: where each document begins and ends.
            token_losses: fp32 (tokens,), gets the loss of each trained token.
            logits_at: int64 (n,), positions in the row.
            vision: of a model of images and videos; its positions turn the pairs instead of ``position_ids``.

        Returns:
            fp32 scalar, nats; under ``logits_at`` fp32 (n, vocabulary) instead.
        """
        # use_cache=True would let packed documents see each other in stock attention.
        decoder = self.lm.get_decoder()
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if vision is not None:
            inputs = {"inputs_embeds": embed(self.lm, input_ids, vision), "position_ids": vision.positions}
        # documents go through the stock decoder to attention.document_attention, which the model's config names
        output = decoder(**inputs, use_cache=False, documents=documents)
        return self.loss(output.last_hidden_state[0], labels[0], token_losses, logits_at)
