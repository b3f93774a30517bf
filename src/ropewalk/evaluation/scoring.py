"""The narrow door to a model: losses of a window, logits of an answer. Never the logits of a whole window."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ropewalk.evaluation.prefill import Reader

LOGITS_CHUNK = 512  # positions whose logits exist at once: 0.26 GB at a vocabulary of 128k in float32


class Scorer(Protocol):
    """What the evaluations need of a model."""

    def token_losses(self, ids: torch.Tensor) -> NDArray[np.float32]:
        """Negative log-likelihood, nats, of ids[1:] given what stands before each; float32 (n - 1,)."""
        ...

    def score(self, prompt_ids: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
        """Logits of each answer token given all tokens before it; float32 (m, vocabulary)."""
        ...


class ModelScorer:
    """A transformers causal language model as a :class:`Scorer`.

    Losses are computed in float32; the logits come in the model's dtype, so a bfloat16 model rounds them.

    Args:
        model: in evaluation mode; its decoder gives hidden states, its output embeddings logits.
        chunk: positions whose logits exist at once.
        prefill_chunk: positions of one forward pass, the earlier ones in a cache; None: one pass for the whole window,
            as a model with other than stock attention needs it.
    """

    def __init__(self, model: Any, chunk: int = LOGITS_CHUNK, prefill_chunk: int | None = None) -> None:
        self.decoder = model.get_decoder()
        self.reader = Reader(model, prefill_chunk)
        self.device = model.device
        self.chunk = chunk

    @torch.inference_mode()
    def token_losses(self, ids: torch.Tensor) -> NDArray[np.float32]:
        """Negative log-likelihood of ids[1:]; float32 (n - 1,), nats. ids: LongTensor (n,)."""
        targets = ids[1:].to(self.device)
        hidden = self._hidden(ids[:-1])
        losses = [
            F.cross_entropy(self.reader.logits(states), wanted, reduction="none")
            for states, wanted in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        ]
        return torch.cat(losses).cpu().numpy()

    @torch.inference_mode()
    def score(self, prompt_ids: torch.Tensor, answer_ids: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits of the answer; float32 (m, vocabulary) on the CPU.

        Args:
            prompt_ids: LongTensor (n,).
            answer_ids: LongTensor (m,); the last is never fed, only predicted.
        """
        hidden = self._hidden(torch.cat([prompt_ids, answer_ids[:-1]]))
        return self.reader.logits(hidden[-answer_ids.numel() :]).cpu()

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        if self.reader.chunk is not None and ids.numel() > self.reader.chunk:
            return self.reader.read(ids, ids.numel())
        return self.decoder(input_ids=ids[None].to(self.device), use_cache=False).last_hidden_state[0]
