"""The needle (passkey) grid: one fact at a depth of held-out text, and the question about it at the end."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from ropewalk.config.groups import NeedleConfig
from ropewalk.data.prepare import retrieval
from ropewalk.errors import UserError
from ropewalk.evaluation.bootstrap import proportion, ratio
from ropewalk.evaluation.documents import Windows, beginning, encode
from ropewalk.evaluation.model_reader import Scorer

SHUFFLED = "_shuffled"


@dataclass(frozen=True)
class Prompt:
    """One question with its haystack.

    Attributes:
        length: tokens of prompt and answer together.
        depth: share of the filler that stands before the fact.
        ids: LongTensor (length - m,), the prompt.
        answer: LongTensor (m,), the key.
        control: LongTensor, the key of another prompt of the same length; the shuffled-answer control.
    """

    length: int
    depth: float
    ids: torch.Tensor
    answer: torch.Tensor
    control: torch.Tensor


def build_grid(tokenizer: Any, windows: Windows, length: int, config: NeedleConfig, seed: int) -> list[Prompt]:
    """The prompts of one context length, depth by depth.

    Each depends on (seed, length, depth, sample) and the windows alone, so runs that share a tokenizer and the lengths
    of their evaluation get the same questions.

    Args:
        tokenizer: of the checkpoint.
        windows: held-out text, each window at least ``length`` tokens.
        length: tokens of prompt and answer together.
        config: depths, samples, digits and distractors.
        seed: of keys, names and haystacks.

    Raises:
        UserError: facts and question leave no room for a haystack.
    """
    prompts = [
        _prompt(tokenizer, windows, config, (length, depth), random.Random(f"{seed}/{length}/{depth}/{sample}"))
        for depth in config.depths
        for sample in range(config.samples)
    ]
    controls = [prompt.answer for prompt in prompts[1:] + prompts[:1]]
    return [replace(prompt, control=control) for prompt, control in zip(prompts, controls, strict=True)]


@dataclass(frozen=True)
class Grade:
    """An answer against its logits.

    Attributes:
        exact: every answer token is the arg-max; NaN: some logits are not finite, and have none.
        correct: answer tokens that are the arg-max, or NaN.
        nll: summed negative log-likelihood of the answer, nats, or NaN.
        tokens: tokens of the answer.
    """

    exact: float
    correct: float
    nll: float
    tokens: int


def chance_levels(config: NeedleConfig) -> dict[str, float]:
    """Scores of uniform guesses among the keys: share of exact matches, and NLL of a whole key in nats.

    The first digit of a key is never 0, so there are 9 * 10^(digits - 1). Without names it is one of 62 words.

    The ``*_shuffled`` rows measure chance for this model: they score its logits against another prompt's key.
    """
    keys = retrieval.number_of_keys(config.digits) if config.names else len(retrieval.WORDS)
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
    if not logits.isfinite().all():
        return Grade(math.nan, math.nan, math.nan, common)
    log_probabilities = logits[:common].log_softmax(-1)
    wanted = answer[:common]
    correct = int((log_probabilities.argmax(-1) == wanted).sum())
    nll = -float(log_probabilities.gather(-1, wanted[:, None]).double().sum())
    return Grade(correct == len(logits) == len(answer), correct, nll, common)


def score_prompts(scorer: Scorer, prompts: Iterable[Prompt]) -> pd.DataFrame:
    """One row for each prompt: its cell, its grade, and the grade of the same logits on the control's answer.

    Args:
        scorer: the model.
        prompts: of :func:`build_grid`.
    """
    rows = []
    for prompt in prompts:
        logits = scorer.score(prompt.ids, prompt.answer)
        cell = {"context_length": prompt.length, "depth": prompt.depth}
        rows.append(cell | graded(logits, prompt.answer, prompt.control))
    return pd.DataFrame(rows)


def graded(logits: torch.Tensor, answer: torch.Tensor, control: torch.Tensor) -> dict[str, Any]:
    """The grade of logits on an answer, and on the control's under names that end in ``_shuffled``."""
    grades = (("", grade(logits, answer)), (SHUFFLED, grade(logits, control)))
    return {f"{name}{suffix}": value for suffix, made in grades for name, value in vars(made).items()}


def needle_rows(scores: pd.DataFrame, seed: int, task: str = "needle") -> Iterator[dict[str, Any]]:
    """Rows of the results table: each cell (``needle``), and all depths pooled (``needle_at_length``).

    Metrics: exact_match with Wilson's interval; answer_token_accuracy and answer_nll (nats per answer
    token) with a bootstrap over prompts; each again as ``*_shuffled``, the control.
    """
    for length, of_length in scores.groupby("context_length"):
        for depth, cell in of_length.groupby("depth"):
            yield from _metric_rows(cell, {"task": task, "context_length": length, "depth": depth}, seed)
        yield from _metric_rows(of_length, {"task": f"{task}_at_length", "context_length": length}, seed)


def _metric_rows(scores: pd.DataFrame, cell: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    for suffix in ("", SHUFFLED):
        tokens = scores[f"tokens{suffix}"]
        estimates = {
            "exact_match": proportion(scores[f"exact{suffix}"].sum(skipna=False), len(scores)),
            "answer_token_accuracy": ratio(scores[f"correct{suffix}"], tokens, seed),
            "answer_nll": ratio(scores[f"nll{suffix}"], tokens, seed),
        }
        for metric, estimate in estimates.items():
            yield {**cell, "metric": f"{metric}{suffix}", **estimate.columns()}


def _prompt(
    tokenizer: Any, windows: Windows, config: NeedleConfig, cell: tuple[int, float], rng: random.Random
) -> Prompt:
    length, depth = cell
    names: list[str | None] = [None]
    if config.names:
        names = [*distinct(lambda: retrieval.random_name(rng), 1 + config.distractors)]
        keys = distinct(lambda: retrieval.random_key(rng, config.digits), len(names))
    else:
        keys = [rng.choice(retrieval.WORDS)]
    # Facts and question stand on lines of their own, as they do in the documents that training sees.
    question, answer = question_and_answer(tokenizer, f"\n{retrieval.question(names[0])}", keys[0])
    fact, *others = (encode(tokenizer, f"\n{retrieval.fact(*pair)}\n") for pair in zip(names, keys, strict=True))
    begin = beginning(tokenizer)
    room = length - sum(map(len, [begin, fact, question, answer, *others]))
    if room < 1:
        raise UserError(
            f"lengths={length} leaves no room for a haystack: facts, question and answer take "
            f"{length - room} tokens; evaluate at {2 * (length - room)} or more, or set fewer distractors"
        )
    filler = haystack(windows, room, len(begin), rng)
    inserts = [(round(depth * room), fact), *((rng.randint(0, room), other) for other in others)]
    ids = begin + insert(filler, inserts) + question
    key_ids = torch.tensor(answer)
    return Prompt(length, depth, torch.tensor(ids), key_ids, key_ids)


def question_and_answer(tokenizer: Any, question: str, key: str) -> tuple[list[int], list[int]]:
    """Question and key tokenized together, as training text is, and split where the key begins to show.

    If a token spans the border (" 4" after "is"), it belongs to the answer.
    """
    alone, together = encode(tokenizer, question), encode(tokenizer, question + key)
    shared = 0
    while shared < min(len(alone), len(together)) and alone[shared] == together[shared]:
        shared += 1
    return together[:shared], together[shared:]


def haystack(windows: Windows, tokens: int, begin: int, rng: random.Random) -> list[int]:
    """A run of held-out tokens from a random position of a random window, without its first ``begin`` tokens."""
    window = windows.tokens[rng.choice(sorted(windows.tokens))]
    start = rng.randint(begin, windows.length - tokens)
    return window[start : start + tokens].tolist()


def insert(filler: list[int], inserts: Sequence[tuple[int, list[int]]]) -> list[int]:
    """``filler`` with each piece put in before the filler token of its index."""
    pieces, previous = [], 0
    for index, piece in sorted(inserts, key=lambda insert: insert[0]):
        pieces += [*filler[previous:index], *piece]
        previous = index
    return pieces + filler[previous:]


def distinct(draw: Callable[[], str], count: int) -> list[str]:
    """``count`` different draws, in the order drawn."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)
