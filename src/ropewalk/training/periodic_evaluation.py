"""Evaluation while training: every so many steps, through the engine as it is; in_training.py has its content.

Losses and logits go through the engine and its LossModel, so ZeRO-3 gathers weights as it does in a step, and ranks
that share rows share a document.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ropewalk.config.train import TrainConfig
from ropewalk.data.order.batches import IGNORE_INDEX, Batch
from ropewalk.training.distributed import Ranks, log_once
from ropewalk.training.hooks import Hook, Step, StopFlag
from ropewalk.training.inputs import on_device, stretch
from ropewalk.training.run_logger import RunLogger


class Evaluation(Protocol):
    """The measures of an evaluation. Implemented by ropewalk.evaluation, which training does not import."""

    def __call__(self, scorer: EngineScorer, step: int) -> dict[str, float]:
        """Metrics, by name, of the model after ``step`` steps. Collective."""


class PeriodicEvaluation(Hook):
    """Evaluates every ``evaluation.every`` steps and after the last one of the run."""

    def __init__(
        self,
        evaluation: Evaluation | None,
        engine: Any,
        config: TrainConfig,
        *,
        logger: RunLogger,
        stop: StopFlag,
        last_step: int,
    ) -> None:
        """Evaluate nothing yet.

        Args:
            evaluation: the measures; None: nothing is ever evaluated.
            engine: the DeepSpeed engine.
            config: of the run.
            logger: gets the metrics, and leaves evaluations out of the steps' speed.
            stop: a run that is about to leave is not evaluated.
            last_step: the session ends after so many.
        """
        self.evaluation, self.engine, self.config = evaluation, engine, config
        self.logger, self.stop, self.last_step = logger, stop, last_step

    def after_step(self, step: Step) -> None:
        """Evaluate if it is time to. Collective."""
        every = self.config.evaluation.every
        if (
            self.evaluation is None
            or every is None
            or (step.number % every and step.number != self.config.trainer.max_steps)
        ):
            return
        if step.number < self.last_step and self.stop.is_up():
            log_once(f"step {step.number:>5} is not evaluated: the run has been told to leave")
            return
        with self.logger.clock_stopped("evaluation"), EngineScorer(self.engine, self.logger.ranks) as scorer:
            self.logger.log_evaluation(step.number, self.evaluation(scorer, step.number))


class EngineScorer:
    """Scores documents with the engine's present weights, in eval mode inside the context.

    Every call is collective: all ranks make it, those of a group with the same tokens, whose number their group's size
    divides.
    """

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        """Args: the engine and this process among the others."""
        self.engine, self.ranks = engine, ranks
        self.vocabulary = engine.module.lm.config.vocab_size
        self.passes = 0  # that are complete

    @property
    def is_shared(self) -> bool:
        """True if a rank that leaves a pass keeps others waiting in it: they gather weights, or share rows."""
        gathers_weights = self.engine.zero_optimization_stage() == 3
        return self.ranks.world_size > 1 and (gathers_weights or self.ranks.group is not None)

    def __enter__(self) -> EngineScorer:
        self.engine.eval()
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.train()

    @torch.no_grad()
    def token_losses(self, ids: Tensor) -> NDArray[np.float32]:
        """Negative log-likelihood of ids[1:], float32 (n - 1,), nats. ids: int64 (n,)."""
        batch = self._stretch(ids)
        losses = torch.zeros(batch.labels.shape[1], device=self.ranks.device)
        self.engine(**on_device(batch, self.ranks), token_losses=losses)
        if self.ranks.group is not None:
            parts = [torch.empty_like(losses) for _ in range(self.ranks.sequence)]
            dist.all_gather(parts, losses, group=self.ranks.group)
            losses = torch.cat(parts)
        self.passes += 1
        return losses[:-1].cpu().numpy()

    @torch.no_grad()
    def score(self, prompt_ids: Tensor, answer_ids: Tensor) -> Tensor:
        """Teacher-forced logits of the answer, float32 (m, vocabulary) on the CPU.

        Args:
            prompt_ids: int64 (n,).
            answer_ids: int64 (m,). All of it is fed: the last token changes nothing before it, and the row keeps a
                length that divides.
        """
        positions = torch.arange(len(answer_ids)) + len(prompt_ids) - 1
        return self.logits_at(torch.cat([prompt_ids, answer_ids]), positions)

    @torch.no_grad()
    def logits_at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits after the tokens at ``positions``, int64 (m,); float32 (m, vocabulary) on the CPU.

        Where ranks share a row, it is filled up behind its end, which changes nothing before.
        """
        count = len(positions)
        batch = self._stretch(torch.cat([ids, ids.new_zeros(-len(ids) % self.ranks.sequence)]))
        tokens = batch.labels.shape[1]
        positions = positions - self.ranks.sequence_rank * tokens  # in this rank's stretch of the row
        is_here = (positions >= 0) & (positions < tokens)
        logits = self.engine(**on_device(batch, self.ranks), logits_at=positions[is_here].to(self.ranks.device))
        if self.ranks.group is not None:
            share, logits = logits, torch.zeros(count, self.vocabulary, device=self.ranks.device)
            logits[is_here.to(self.ranks.device)] = share
            dist.all_reduce(logits, group=self.ranks.group)
        self.passes += 1
        return logits.cpu()

    def _stretch(self, ids: Tensor) -> Batch:
        """One document as a row, or this rank's stretch of it."""
        row = Batch(
            input_ids=ids[None],
            position_ids=torch.arange(len(ids))[None],
            labels=torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])])[None],
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            domain_ids=torch.zeros(1, dtype=torch.int32),
        )
        return stretch(row, self.ranks.sequence_rank, self.ranks.sequence)
