"""The model in training as an evaluation asks for it: losses of a document, logits of an answer.

Both go through the engine and its LossModel, so ZeRO-3 gathers weights as it does in a step, and ranks that share rows
share a document.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ropewalk.data.batches import IGNORE_INDEX, Batch
from ropewalk.training.distributed import Ranks
from ropewalk.training.inputs import on_device
from ropewalk.training.parallel import shard


class EngineScorer:
    """Scores with the weights as they are. Every call is collective: all ranks make it, those of a group with the
    same tokens, whose number their group's size divides.
    """

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        """Args: the engine and this process among the others."""
        self.engine, self.ranks = engine, ranks
        self.vocabulary = engine.module.lm.config.vocab_size

    def __enter__(self) -> EngineScorer:
        self.engine.eval()
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.train()

    @torch.no_grad()
    def token_losses(self, ids: Tensor) -> NDArray[np.float32]:
        """Negative log-likelihood of ids[1:], float32 (n - 1,), nats. ids: int64 (n,)."""
        batch = self._mine(ids)
        losses = torch.zeros(batch.labels.shape[1], device=self.ranks.device)
        self.engine(**on_device(batch, self.ranks), token_losses=losses)
        if self.ranks.group is not None:
            parts = [torch.empty_like(losses) for _ in range(self.ranks.sequence)]
            dist.all_gather(parts, losses, group=self.ranks.group)
            losses = torch.cat(parts)
        return losses[:-1].cpu().numpy()

    @torch.no_grad()
    def score(self, prompt_ids: Tensor, answer_ids: Tensor) -> Tensor:
        """Teacher-forced logits of the answer, float32 (m, vocabulary) on the CPU.

        Args:
            prompt_ids: int64 (n,).
            answer_ids: int64 (m,). All of it is fed: the last token changes nothing before it, and the row keeps a
                length that divides.
        """
        batch = self._mine(torch.cat([prompt_ids, answer_ids]))
        tokens = batch.labels.shape[1]
        asked = torch.arange(len(answer_ids)) + len(prompt_ids) - 1 - (self.ranks.rank % self.ranks.sequence) * tokens
        here = (asked >= 0) & (asked < tokens)
        logits = self.engine(**on_device(batch, self.ranks), logits_at=asked[here].to(self.ranks.device))
        if self.ranks.group is not None:
            mine, logits = logits, torch.zeros(len(answer_ids), self.vocabulary, device=self.ranks.device)
            logits[here.to(self.ranks.device)] = mine
            dist.all_reduce(logits, group=self.ranks.group)
        return logits.cpu()

    def _mine(self, ids: Tensor) -> Batch:
        """One document as a row, or this rank's stretch of it."""
        whole = Batch(
            input_ids=ids[None],
            position_ids=torch.arange(len(ids))[None],
            labels=torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])])[None],
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            domain_ids=torch.zeros(1, dtype=torch.int32),
        )
        return shard(whole, self.ranks.rank % self.ranks.sequence, self.ranks.sequence)
