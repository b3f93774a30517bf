"""Needle prompts: a fact at a depth of held-out text, and the question about it at the end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ropewalk.config.groups import NeedleConfig
from ropewalk.data.prepare import retrieval
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import Windows, beginning, encode


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

    Each depends on (seed, length, depth, sample) and the windows alone, so runs that share a tokenizer and
    the lengths of their evaluation are asked the same questions.

    Args:
        tokenizer: of the checkpoint.
        windows: held-out text, each window at least ``length`` tokens.
        length: tokens of prompt and answer together.
        config: depths, samples, digits and distractors.
        seed: of keys, names and haystacks.

    Raises:
        UserError: where facts and question leave no room for a haystack.
    """
    prompts = [
        _prompt(tokenizer, windows, config, (length, depth), random.Random(f"{seed}/{length}/{depth}/{sample}"))
        for depth in config.depths
        for sample in range(config.samples)
    ]
    controls = [prompt.answer for prompt in prompts[1:] + prompts[:1]]
    return [replace(prompt, control=control) for prompt, control in zip(prompts, controls, strict=True)]


def _prompt(
    tokenizer: Any, windows: Windows, config: NeedleConfig, cell: tuple[int, float], rng: random.Random
) -> Prompt:
    length, depth = cell
    name, *other_names = _distinct(lambda: retrieval.random_name(rng), 1 + config.distractors)
    key, *other_keys = _distinct(lambda: retrieval.random_key(rng, config.digits), 1 + config.distractors)
    # Facts and question stand on lines of their own, as they do in the documents that training sees.
    question, answer = _question_and_answer(tokenizer, f"\n{retrieval.question(name)}", key)
    fact, *others = (
        encode(tokenizer, f"\n{retrieval.fact(*pair)}\n")
        for pair in zip([name, *other_names], [key, *other_keys], strict=True)
    )
    begin = beginning(tokenizer)
    room = length - sum(map(len, [begin, fact, question, answer, *others]))
    if room < 1:
        raise UserError(
            f"lengths={length} leaves no room for a haystack: facts, question and answer take "
            f"{length - room} tokens; evaluate at {2 * (length - room)} or more, or set fewer distractors"
        )
    filler = _filler(windows, room, len(begin), rng)
    inserts = [(round(depth * room), fact), *((rng.randint(0, room), other) for other in others)]
    ids = begin + _insert(filler, inserts) + question
    key_ids = torch.tensor(answer)
    return Prompt(length, depth, torch.tensor(ids), key_ids, key_ids)


def _question_and_answer(tokenizer: Any, question: str, key: str) -> tuple[list[int], list[int]]:
    """Question and key tokenized together, as training text is, and split where the key begins to show.

    Where a token spans the border (" 4" after "is"), it belongs to the answer.
    """
    alone, together = encode(tokenizer, question), encode(tokenizer, question + key)
    shared = 0
    while shared < min(len(alone), len(together)) and alone[shared] == together[shared]:
        shared += 1
    return together[:shared], together[shared:]


def _filler(windows: Windows, tokens: int, begin: int, rng: random.Random) -> list[int]:
    """A run of held-out tokens from a random place of a random window, without its first ``begin`` tokens."""
    window = windows.tokens[rng.choice(sorted(windows.tokens))]
    start = rng.randint(begin, windows.length - tokens)
    return window[start : start + tokens].tolist()


def _insert(filler: list[int], inserts: Sequence[tuple[int, list[int]]]) -> list[int]:
    """``filler`` with each piece put in before the filler token of its index."""
    pieces, previous = [], 0
    for index, piece in sorted(inserts, key=lambda insert: insert[0]):
        pieces += [*filler[previous:index], *piece]
        previous = index
    return pieces + filler[previous:]


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    """``count`` different draws, in the order drawn."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)
