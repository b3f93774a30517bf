"""The needle (passkey) grid: one fact at a depth of held-out text, asked for at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from ropewalk.config.groups import NeedleConfig
from ropewalk.data.prepare.retrieval import number_of_keys
from ropewalk.evaluation.bootstrap import proportion, ratio
from ropewalk.evaluation.prompts import Prompt
from ropewalk.evaluation.scoring import Scorer

SHUFFLED = "_shuffled"


@dataclass(frozen=True)
class Grade:
    """An answer against its logits.

    Attributes:
        exact: every answer token is the arg-max.
        correct: answer tokens that are the arg-max.
        nll: summed negative log-likelihood of the answer, nats.
        tokens: tokens of the answer.
    """

    exact: bool
    correct: int
    nll: float
    tokens: int


def chance_levels(config: NeedleConfig) -> dict[str, float]:
    """What uniform guesses among the keys score: share of exact matches, and NLL of a whole key in nats.

    The first digit of a key is never 0, so there are 9 * 10^(digits - 1).

    The ``*_shuffled`` rows measure chance for this model: they score its logits against another prompt's key.
    """
    keys = number_of_keys(config.digits)
    return {"exact_match": 1 / keys, "key_nll": math.log(keys)}


def grade(logits: torch.Tensor, answer: torch.Tensor) -> Grade:
    """Grade teacher-forced logits.

    Greedy decoding reproduces the answer if and only if each answer token is the arg-max given the true
    tokens before it: up to the first miss both see the same prefix. So one forward pass gives the exact match
    that decoding would.

    Args:
        logits: float32 (m', vocabulary); rows predict the tokens of the answer that the model was fed.
        answer: LongTensor (m,). For a control, m may differ from m': the common part is graded, and an exact
            match needs equal lengths.
    """
    common = min(len(logits), len(answer))
    log_probabilities = logits[:common].log_softmax(-1)
    wanted = answer[:common]
    correct = int((log_probabilities.argmax(-1) == wanted).sum())
    nll = -float(log_probabilities.gather(-1, wanted[:, None]).double().sum())
    return Grade(correct == len(logits) == len(answer), correct, nll, common)


def score_prompts(scorer: Scorer, prompts: Iterable[Prompt]) -> pd.DataFrame:
    """One row for each prompt: its cell, its grade, and the grade of the same logits on the control's answer.

    Args:
        scorer: the model, or a script in its place.
        prompts: of :func:`ropewalk.evaluation.prompts.build_grid`.
    """
    rows = []
    for prompt in prompts:
        logits = scorer.score(prompt.ids, prompt.answer)
        row: dict[str, Any] = {"context_length": prompt.length, "depth": prompt.depth}
        for suffix, answer in (("", prompt.answer), (SHUFFLED, prompt.control)):
            row |= {f"{name}{suffix}": value for name, value in vars(grade(logits, answer)).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def needle_rows(scores: pd.DataFrame, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the results table: each cell (``needle``), and all depths pooled (``needle_at_length``).

    Metrics: exact_match with Wilson's interval; answer_token_accuracy and answer_nll (nats per answer
    token) with a bootstrap over prompts; each again as ``*_shuffled``, the control.
    """
    for length, of_length in scores.groupby("context_length"):
        for depth, cell in of_length.groupby("depth"):
            yield from _metric_rows(cell, {"task": "needle", "context_length": length, "depth": depth}, seed)
        yield from _metric_rows(of_length, {"task": "needle_at_length", "context_length": length}, seed)


def _metric_rows(scores: pd.DataFrame, place: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    for suffix in ("", SHUFFLED):
        tokens = scores[f"tokens{suffix}"]
        estimates = {
            "exact_match": proportion(int(scores[f"exact{suffix}"].sum()), len(scores)),
            "answer_token_accuracy": ratio(scores[f"correct{suffix}"], tokens, seed),
            "answer_nll": ratio(scores[f"nll{suffix}"], tokens, seed),
        }
        for metric, estimate in estimates.items():
            yield {**place, "metric": f"{metric}{suffix}", **estimate.columns()}
