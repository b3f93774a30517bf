"""json_kv: the value of one key among random UUID pairs, in HELMET's form; sized by pairs, or by tokens.

There are six depths; keys and values are random UUIDs, the pairs one JSON object with a line each (as in Lost in the
Middle, arXiv 2307.03172). The authors' own pairs are not known, so a number on these is of the same task, not the same
inputs.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Pair = tuple[str, str]
DEPTHS = 6  # the dep6 of HELMET's file names
DEMOS = 3  # worked examples that a row carries; HELMET takes as many as its shots
SHOTS = 2  # worked examples in a prompt, as in HELMET's Recall
SPARE_PAIRS = 64  # that pairs of a prompt may be swapped for
COUNTS = 8  # of the whole prompt, at most; two suffice where a line has the same tokens in the text as by itself


def json_kv(pairs: int, samples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of the task as HELMET's data.py reads them: context, question, answer, demos, num_kvs, depth.

    Args:
        pairs: in each JSON object.
        samples: rows; depth by depth in turn.
        seed: of all.
    """
    for index in range(samples):
        rng = random.Random(f"{seed}/{pairs}/{index}")
        entries = [_pair(rng) for _ in range(pairs)]
        depth = _depth(index)
        position = round(depth * (pairs - 1))
        others = [entries[i] for i in rng.sample([i for i in range(pairs) if i != position], min(DEMOS, pairs - 1))]
        key, value = entries[position]
        yield {
            "context": _context(entries),
            "question": key,
            "answer": value,
            "demos": [list(pair) for pair in others],
            "num_kvs": pairs,
            "depth": depth,
        }


def key_value_prompt(count: Callable[[str], int], room: int, index: int, key: str) -> tuple[str, list[str], int]:
    """A prompt of ``room`` tokens, what it asks for, and its tokens.

    Pairs are drawn until the next does not fit; then some are swapped for others of a few tokens more, until nothing is
    missing. Each pair's line is counted once, by itself; the whole prompt is counted to correct for what lines take
    more or less in the text. It is below ``room`` by less than a pair if the tokenizer gives all UUIDs about the same
    tokens (bytes), and above it only if the smallest prompt is.

    Args:
        count: tokens of a text, a beginning-of-sequence token included if the model gets one.
        room: tokens of the prompt.
        index: of the sample, which says at which of the depths the asked pair stands.
        key: of the random pairs.
    """
    rng, empty = random.Random(key), count("")
    asked, *demos = (_pair(rng) for _ in range(1 + SHOTS))
    prompt = _prompt([asked, *demos], asked, demos)
    best = prompt, count(prompt)
    budget = room - best[1]
    drawn: list[tuple[Pair, int]] = []

    def draw() -> None:
        pair = _pair(rng)
        drawn.append((pair, count(_line(pair)) - empty))

    for _ in range(COUNTS if budget > 0 else 0):
        chosen, missing = _filled(drawn, draw, budget)
        prompt = _prompt(_placed(chosen, asked, demos, _depth(index), random.Random(f"{key}/places")), asked, demos)
        tokens = count(prompt)
        if best[1] < tokens <= room:
            best = prompt, tokens
        if room - tokens == missing:  # lines counted by themselves add up: no other choice of them is nearer
            break
        budget += room - tokens - missing
    return best[0], [asked[1]], best[1]


def _filled(drawn: list[tuple[Pair, int]], draw: Callable[[], None], budget: int) -> tuple[list[Pair], int]:
    """Pairs of ``budget`` tokens, from ``drawn``, which grows as needed; and the tokens that are missing to it."""
    number, missing = 0, budget
    while True:
        while len(drawn) < number + SPARE_PAIRS:
            draw()
        if drawn[number][1] > missing:
            break
        missing -= drawn[number][1]
        number += 1
    chosen, spares = drawn[:number], drawn[number : number + SPARE_PAIRS]
    while missing:
        swaps = {
            more[1] - less[1]: (i, j)
            for i, less in enumerate(chosen[-SPARE_PAIRS:], max(0, number - SPARE_PAIRS))
            for j, more in enumerate(spares)
            if 0 < more[1] - less[1] <= missing
        }
        if not swaps:
            break
        gained = max(swaps)
        i, j = swaps[gained]
        chosen[i], spares[j] = spares[j], chosen[i]
        missing -= gained
    return [pair for pair, _ in chosen], missing


def _placed(others: Sequence[Pair], asked: Pair, demos: Sequence[Pair], depth: float, rng: random.Random) -> list[Pair]:
    """All pairs: the demonstrated ones anywhere, the asked one at ``depth`` (0: first, 1: last)."""
    entries = list(others)
    for pair in demos:
        entries.insert(rng.randrange(len(entries) + 1), pair)
    entries.insert(round(depth * len(entries)), asked)
    return entries


def _prompt(entries: Sequence[Pair], asked: Pair, demos: Sequence[Pair]) -> str:
    questions = [f"Key: {key}\nCorresponding value: {value}\n\n" for key, value in demos]
    return (
        f"{_context(entries)}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n"
        f"{''.join(questions)}Key: {asked[0]}\nCorresponding value:"
    )


def _context(entries: Sequence[Pair]) -> str:
    return "JSON data:\n" + json.dumps(dict(entries)).replace('", "', '",\n "')


def _line(pair: Pair) -> str:
    return f' "{pair[0]}": "{pair[1]}",\n'


def _depth(index: int) -> float:
    return index % DEPTHS / (DEPTHS - 1)


def _pair(rng: random.Random) -> Pair:
    return _uuid(rng), _uuid(rng)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
