"""Questions about facts in long text, many a sequence: what context recovers of an answer's NLL, and the order probe.

Every answer of a sequence is graded in one forward pass by teacher forcing. Recovery compares three contexts of the
same questions: the long text with all facts (full), each fact straight before its question (oracle), and no fact at
all (none). It is (NLL_none - NLL_full) / (NLL_none - NLL_oracle), a ratio of means. The order probe states a marker
several times with other values, and asks which of them the model answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from ropewalk.config.groups import AnswersConfig, NeedleConfig
from ropewalk.data.prepare import retrieval
from ropewalk.evaluation.bootstrap import Estimate, proportion, ratio
from ropewalk.evaluation.documents import Windows, beginning, encode
from ropewalk.evaluation.harness.needle_retrieval import distinct, grade, haystack, insert, question_and_answer
from ropewalk.evaluation.model_reader import Scorer
from ropewalk.evaluation.results import NOTHING_TO_RECOVER

ANSWERS, ORDER = "answers", "order"  # tasks
FULL, ORACLE, NONE = "full", "oracle", "none"  # contexts of an answer
SMALLEST_GAP = 0.5  # nats an answer token between none and oracle, below which there is nothing to recover
FIRST, LAST, OTHER = "first", "last", "other"
Turn = tuple[int, list[int], list[int]]  # number of the question, the tokens before its answer, and the answer's


@dataclass(frozen=True)
class Row:
    """One forward pass and the answers in it.

    Attributes:
        length: tokens of the context that it belongs to; of the pass itself, if the context is full.
        context: full, oracle, none, or order.
        sequence: number of the sequence whose questions it asks.
        ids: LongTensor (n,).
        numbers: of the questions, within the sequence.
        starts: position of the first token of each answer.
        answers: LongTensor (m,) for each, as fed.
        choices: of the order probe, the first tokens of a marker's first and last value, for each.
    """

    length: int
    context: str
    sequence: int
    ids: torch.Tensor
    numbers: tuple[int, ...]
    starts: tuple[int, ...]
    answers: tuple[torch.Tensor, ...]
    choices: tuple[tuple[int, int], ...] = ()


def build_answers(
    tokenizer: Any, windows: Windows, length: int, config: AnswersConfig, needle: NeedleConfig, seed: int, shortest: int
) -> list[Row]:
    """The passes of one context length: each sequence with its facts, and its questions with and without them.

    They depend on the arguments alone, so all arms and seeds that share a tokenizer answer the same questions.

    Args:
        tokenizer: of the checkpoint.
        windows: held-out text, each window at least ``length`` tokens.
        length: tokens of a sequence.
        config: number of answers, in all and in a sequence.
        needle: names and keys of the facts; without names a sequence has one fact and one question.
        seed: of names, keys, depths and text.
        shortest: tokens that a pass without the long text has at most, if one question fits: the shortest context
            evaluated, so that the oracle is never past what an arm was trained at.

    Returns:
        None where not one question fits half of ``length``.
    """
    rows: list[Row] = []
    begin, line, end = beginning(tokenizer), encode(tokenizer, "\n"), encode(tokenizer, ".\n")
    sequence = answers = 0
    while answers < config.count:
        rng = random.Random(f"answers/{seed}/{length}/{sequence}")
        facts: list[list[int]] = []
        turns: list[Turn] = []
        used = len(begin) + len(line)
        for name in _names(config, needle, rng):
            key = _key(needle, rng)
            fact = encode(tokenizer, f"\n{retrieval.fact(name, key)}\n")
            question, answer = question_and_answer(tokenizer, retrieval.question(name), key)
            tokens = len(fact) + len(question) + len(answer) + len(end)
            if used + tokens > length // 2:
                break
            used += tokens
            facts.append(fact)
            turns.append((len(turns), question, answer))
        if not turns:
            return []
        text = _text(windows, length - used, begin, [(rng.random(), fact) for fact in facts], rng) + line
        rows.append(_row(length, FULL, sequence, text, turns, end))
        with_facts = [(number, [*facts[number], *question], answer) for number, question, answer in turns]
        for context, short in ((ORACLE, with_facts), (NONE, turns)):
            rows += [_row(length, context, sequence, begin, part, end) for part in _parts(short, shortest, begin, end)]
        answers += len(turns)
        sequence += 1
    return rows


def build_order(
    tokenizer: Any, windows: Windows, length: int, config: AnswersConfig, needle: NeedleConfig, seed: int
) -> list[Row]:
    """The passes of the order probe at one context length: markers that are stated ``config.values`` times each.

    A marker's values differ in their first token, from which the answer is read. What is fed behind it is the first
    or the last value by the toss of a coin, so that earlier answers favour neither.

    Args and returns: as :func:`build_answers`.
    """
    rows: list[Row] = []
    begin, line, end = beginning(tokenizer), encode(tokenizer, "\n"), encode(tokenizer, ".\n")
    answers = 0
    while answers < config.count:
        rng = random.Random(f"order/{seed}/{length}/{len(rows)}")
        facts: list[tuple[float, list[int]]] = []
        turns: list[Turn] = []
        choices: list[tuple[int, int]] = []
        used = len(begin) + len(line)
        for name in _names(config, needle, rng):
            values: dict[int, tuple[str, list[int], list[int]]] = {}  # by first token, in the order stated
            for _ in range(100 * config.values):
                key = _key(needle, rng)
                question, answer = question_and_answer(tokenizer, retrieval.question(name), key)
                values.setdefault(answer[0], (key, question, answer))
                if len(values) == config.values:
                    break
            if len(values) < config.values:
                return []
            stated = [encode(tokenizer, f"\n{retrieval.fact(name, key)}\n") for key, _, _ in values.values()]
            firsts = list(values)
            _, question, answer = values[firsts[rng.choice((0, -1))]]
            tokens = sum(map(len, stated)) + len(question) + len(answer) + len(end)
            if used + tokens > length // 2:
                break
            used += tokens
            facts += zip(sorted(rng.random() for _ in stated), stated, strict=True)
            turns.append((len(turns), question, answer))
            choices.append((firsts[0], firsts[-1]))
        if not turns:
            return []
        text = _text(windows, length - used, begin, facts, rng) + line
        rows.append(replace(_row(length, ORDER, len(rows), text, turns, end), choices=tuple(choices)))
        answers += len(turns)
    return rows


def score_row(scorer: Scorer, row: Row) -> list[dict[str, Any]]:
    """One entry for each answer of a pass; exactly one call of the scorer."""
    kept = [1] * len(row.answers) if row.choices else [len(answer) for answer in row.answers]
    positions = [start - 1 + i for start, tokens in zip(row.starts, kept, strict=True) for i in range(tokens)]
    logits = scorer.logits_at(row.ids, torch.tensor(positions)).split(kept)
    entries = []
    for i, (number, of_answer) in enumerate(zip(row.numbers, logits, strict=True)):
        entry = {"context_length": row.length, "sequence": row.sequence, "number": number}
        if row.choices:
            entries.append(entry | _chosen(of_answer[0], *row.choices[i]))
        else:
            entries.append(entry | {"context": row.context} | vars(grade(of_answer, row.answers[i])))
    return entries


def _chosen(logits: torch.Tensor, first: int, last: int) -> dict[str, Any]:
    log_probabilities = logits.log_softmax(-1).double()
    answered = {first: FIRST, last: LAST}.get(int(log_probabilities.argmax()), OTHER)
    return {
        "answered": answered,
        "nll_first": -float(log_probabilities[first]),
        "nll_last": -float(log_probabilities[last]),
    }


def answer_samples(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of an answer in its three contexts as one, that of the full context by its plain names."""
    merged: dict[tuple[int, int, int], dict[str, Any]] = {}
    for entry in entries:
        sample = merged.setdefault((entry["context_length"], entry["sequence"], entry["number"]), {})
        if entry["context"] == FULL:
            sample |= {name: value for name, value in entry.items() if name != "context"}
        else:
            sample[f"nll_{entry['context']}"] = entry["nll"]
    return list(merged.values())


def question_rows(task: str, samples: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows of the results table of ``answers`` or ``order``; none without a sample, as no question fits."""
    if not samples:
        return []
    return list((answer_rows if task == ANSWERS else order_rows)(samples, seed))


def answer_rows(samples: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the results table, task ``answers``; n counts answers, intervals resample whole sequences.

    Metrics: answer_nll, answer_nll_oracle and answer_nll_none (nats per answer token), exact_match with Wilson's
    interval, and recovery, a share; ``recovery_undefined`` without a value if oracle and none differ by less than
    ``SMALLEST_GAP``.
    """
    for length, of_length in pd.DataFrame(samples).groupby("context_length"):
        cell = {"task": ANSWERS, "context_length": length}
        columns = ["nll", "nll_oracle", "nll_none", "tokens"]
        sums = of_length.groupby("sequence")[columns].sum(skipna=False)
        n, full, oracle, none = len(of_length), sums["nll"], sums["nll_oracle"], sums["nll_none"]
        for metric, of_context in (("answer_nll", full), ("answer_nll_oracle", oracle), ("answer_nll_none", none)):
            yield cell | {"metric": metric, **_counted(ratio(of_context, sums["tokens"], seed), n)}
        yield cell | {"metric": "exact_match", **proportion(int(of_length["exact"].sum()), n).columns()}
        if (none - oracle).sum(skipna=False) / sums["tokens"].sum() >= SMALLEST_GAP:
            yield cell | {"metric": "recovery", **_counted(ratio(none - full, none - oracle, seed), n)}
        else:
            undefined = Estimate(math.nan, math.nan, math.nan, math.nan, 0)
            yield cell | {"metric": NOTHING_TO_RECOVER, **undefined.columns()}


def order_rows(samples: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the results table, task ``order``; n counts answers.

    Metrics: answers_first, answers_last and answers_other, shares with Wilson's interval, and first_less_last_nll:
    the NLL of the first value's first token less that of the last value's, nats; above 0, the last one is preferred.
    """
    for length, of_length in pd.DataFrame(samples).groupby("context_length"):
        cell, n = {"task": ORDER, "context_length": length}, len(of_length)
        for answered in (FIRST, LAST, OTHER):
            share = proportion(int((of_length["answered"] == answered).sum()), n)
            yield cell | {"metric": f"answers_{answered}", **share.columns()}
        difference = (of_length["nll_first"] - of_length["nll_last"]).groupby(of_length["sequence"])
        estimate = ratio(difference.sum(), difference.size(), seed)
        yield cell | {"metric": "first_less_last_nll", **_counted(estimate, n)}


def _names(config: AnswersConfig, needle: NeedleConfig, rng: random.Random) -> Sequence[str | None]:
    return distinct(partial(retrieval.random_name, rng), config.per_sequence) if needle.names else [None]


def _key(needle: NeedleConfig, rng: random.Random) -> str:
    return retrieval.random_key(rng, needle.digits) if needle.names else rng.choice(retrieval.WORDS)


def _counted(estimate: Estimate, n: int) -> dict[str, float]:
    return replace(estimate, n=n).columns()


def _text(
    windows: Windows, room: int, begin: list[int], facts: Iterable[tuple[float, list[int]]], rng: random.Random
) -> list[int]:
    """The beginning, and ``room`` tokens of held-out text with each fact at its depth, a share of it."""
    filler = haystack(windows, room, len(begin), rng)
    return begin + insert(filler, [(round(depth * room), fact) for depth, fact in facts])


def _row(length: int, context: str, sequence: int, text: list[int], turns: Sequence[Turn], end: list[int]) -> Row:
    ids, starts = list(text), []
    for _, question, answer in turns:
        ids += question
        starts.append(len(ids))
        ids += [*answer, *end]
    numbers, answers = tuple(turn[0] for turn in turns), tuple(torch.tensor(turn[2]) for turn in turns)
    return Row(length, context, sequence, torch.tensor(ids), numbers, tuple(starts), answers)


def _parts(turns: Sequence[Turn], most: int, begin: list[int], end: list[int]) -> Iterator[list[Turn]]:
    """The turns in order, as many at a time as fit ``most`` tokens, and one at least."""
    part: list[Turn] = []
    used = len(begin)
    for turn in turns:
        tokens = len(turn[1]) + len(turn[2]) + len(end)
        if part and used + tokens > most:
            yield part
            part, used = [], len(begin)
        part.append(turn)
        used += tokens
    yield part
