"""Synthetic retrieval documents: facts hidden in ordinary text, and questions about them at the end.

The text format is defined here once; evaluation's needle grid asks in the same words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.prepare.tokenizer import DocumentEncoder
from ropewalk.data.store.hashing import stable_key
from ropewalk.errors import UserError

KEY_DIGITS = 5
TOKENS_PER_FACT = 96  # of the document; about half of it is then filler
MAX_FACTS = 64
CHARACTERS_PER_TOKEN = 8  # more than any filler needs, so that a draft has enough of it


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient autumn bitter black blue bold brave bright broken bronze calm clever cold copper coral "
    "crimson crystal dark deep distant dry dusty early eager emerald empty faint fair fast fierce frozen "
    "gentle golden grand green grey happy hidden hollow humble icy iron ivory jolly keen late lazy little "
    "lively lonely long loud lucky mellow misty narrow noble northern olive orange pale patient plain "
    "polished proud purple quick quiet rapid red restless rough royal rusty scarlet secret sharp shiny "
    "short silent silver simple sleepy slow small smooth snowy soft solid southern steady steep stern still "
    "stormy strange sturdy sunny swift tall tame tidy tiny velvet violet warm weary western white wild "
    "windy wise wooden young"
)
NOUNS = _words(
    "acorn anchor anvil apple arrow badger banner barn basin beacon bear beaver bell birch bison boat "
    "bottle bridge brook bucket button cabin camel candle canyon castle cedar cherry circle cliff cloud "
    "comet compass cradle crane cricket crow crown dagger desert dolphin donkey dragon drum eagle ember "
    "falcon feather fern ferry field finch flame flute forest fountain fox garden gate glacier goat goose "
    "grove hammer harbor harp hawk heron hill horse island jacket jaguar kettle key kite ladder lake "
    "lantern leaf lemon lion lizard lobster maple market meadow mirror mole moon mountain needle nest oak "
    "ocean orchard otter owl paddle panther pebble pepper pigeon pillow pine pond rabbit raven ribbon river "
    "rocket rope saddle sailor salmon shadow shell shield shore spider spoon squirrel stone sword table "
    "teapot temple thistle thunder tiger timber torch tower trumpet tulip tunnel turtle valley violin wagon "
    "walnut walrus whistle willow window winter wolf zebra"
)

# Keys without a name: frequent words, one token each in most vocabularies, also in a small one trained on code.
WORDS = _words(
    "base buffer bytes call case check class code command content data error event example file first format frame "
    "function global handle header input key line list local message method module name next node number object offset "
    "open option order output path pattern process range read result server shape size source start stream string "
    "support test text thread time type user value version"
)

Item = TypeVar("Item")


class Random(Protocol):
    """The part of a generator that is needed: both ``random.Random`` and ``numpy.random.Generator`` have it."""

    def random(self) -> float:
        """A number in [0, 1)."""


def fact(name: str | None, key: str) -> str:
    """The sentence that states a key; without a name, the only key of its document."""
    return f"The pass key is {key}." if name is None else f"The pass key of {name} is {key}."


def question(name: str | None) -> str:
    """The prompt for a key; it ends, after a space, where the key begins."""
    if name is None:
        return "The pass key is "
    return f"What is the pass key of {name}? The pass key of {name} is "


def random_name(rng: Random) -> str:
    """A name such as ``amber-falcon``."""
    return f"{_choice(ADJECTIVES, rng)}-{_choice(NOUNS, rng)}"


def random_key(rng: Random, digits: int) -> str:
    """A number of ``digits`` digits, as text; the first is not 0."""
    return "".join([_choice("123456789", rng), *(_choice("0123456789", rng) for _ in range(digits - 1))])


def number_of_keys(digits: int) -> int:
    """How many keys ``random_key`` chooses among."""
    return 9 * 10 ** (digits - 1)


def retrieval_documents(
    encoder: DocumentEncoder, filler: Sequence[str], sequence_length: int, tokens: int, seed: int, *, named: bool = True
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.bool_] | None]]:
    """Documents of nearly, and at most, ``sequence_length`` tokens, until they have ``tokens`` together.

    With names, a document has a fact for every 96 tokens (1 to 64), at random depths in consecutive lines of one of the
    texts, and then questions with their answers about three quarters of the facts, in random order. All of it is
    trained.

    Without, a document states one key, a word, again and again in the same words: twice at least, at most until two
    thirds of it are statements, the number drawn log-uniform so that the distances are short and long. Each statement
    but the first is an answer that stands further up, and the loss mask leaves only these answers.

    Args:
        encoder: the tokenizer.
        filler: texts that lines are taken from; longer ones are taken more often.
        sequence_length: tokens, BOS and EOS included, that a document has at most.
        tokens: that all documents have together, at least.
        seed: of names, keys, depths and filler.
        named: facts have names that the questions ask for.

    Yields:
        Tokens, uint32 (n,), and the loss mask, bool (n,), or None where all tokens are trained.

    Raises:
        UserError: for a sequence length in which one fact and its question do not fit.
    """
    sizes = np.cumsum([len(text) for text in filler])
    tokens_so_far = number = 0
    while tokens_so_far < tokens:
        rng = random.Random(stable_key("retrieval", seed, sequence_length, number))
        lines = _filler_lines(rng, filler, sizes, CHARACTERS_PER_TOKEN * sequence_length)
        draft = _named_facts(rng, lines, sequence_length) if named else _one_key(rng, lines, sequence_length, encoder)
        text, document = _fitted(draft, encoder, sequence_length)
        tokens_so_far += len(document)
        number += 1
        yield document, None if named else _answer_mask(encoder, text, len(document))


@dataclass
class _Draft:
    facts: list[str]
    depths: list[float]  # increasing, shares of the filler
    closing: str
    lines: list[str]

    def text(self, count: int) -> str:
        """The document with the first ``count`` lines of filler."""
        pieces, last = [], 0
        for depth, fact_ in zip(self.depths, self.facts, strict=True):
            position = round(depth * count)
            pieces += [*self.lines[last:position], fact_, "\n"]
            last = position
        return "".join([*pieces, *self.lines[last:count], self.closing])


def _named_facts(rng: Random, lines: list[str], sequence_length: int) -> _Draft:
    count = min(max(sequence_length // TOKENS_PER_FACT, 1), MAX_FACTS)
    keys: dict[str, str] = {}
    while len(keys) < count:
        keys[random_name(rng)] = random_key(rng, KEY_DIGITS)
    names = _shuffled(list(keys), rng)[: max(1, round(0.75 * count))]
    return _Draft(
        facts=[fact(name, key) for name, key in keys.items()],
        depths=sorted(rng.random() for _ in keys),
        closing="".join(f"{question(name)}{keys[name]}.\n" for name in names),
        lines=lines,
    )


def _one_key(rng: Random, lines: list[str], sequence_length: int, encoder: DocumentEncoder) -> _Draft:
    statement = fact(None, _choice(WORDS, rng))
    most = max(2 * sequence_length // (3 * len(encoder.encode_texts([f"{statement}\n"])[0])), 2)
    count = round(2 * (most / 2) ** rng.random())
    depths = sorted(rng.random() for _ in range(count))
    return _Draft(facts=[statement] * count, depths=depths, closing="", lines=lines)


def _answer_mask(encoder: DocumentEncoder, text: str, tokens: int) -> NDArray[np.bool_]:
    """Loss mask of a document with one key: the tokens of each key but the first."""
    encoding = encoder.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    offsets = np.array(encoding.offsets, dtype=np.int64)
    mask = np.zeros(tokens, dtype=np.bool_)
    inside = mask[len(encoder.head) : len(encoder.head) + len(offsets)]
    for key in list(re.finditer(re.escape(question(None)) + r"(\w+)", text))[1:]:
        inside |= (offsets[:, 1] > key.start(1)) & (offsets[:, 0] < key.end(1))
    return mask


def _filler_lines(rng: Random, filler: Sequence[str], sizes: NDArray[np.int64], characters: int) -> list[str]:
    """Consecutive lines from a random place on, going on with the next texts where one ends."""
    at = int(rng.random() * sizes[-1])
    number = int(np.searchsorted(sizes, at, side="right"))
    start = at - int(sizes[number] - len(filler[number]))
    lines = filler[number][start : start + characters].splitlines(keepends=True)[1:]
    size = sum(map(len, lines))
    while size < characters:
        number = (number + 1) % len(filler)
        more = filler[number][: characters - size + 1]
        size += len(more)
        lines += more.splitlines(keepends=True)
    return [line if line.endswith("\n") else line + "\n" for line in lines]


def _fitted(draft: _Draft, encoder: DocumentEncoder, sequence_length: int) -> tuple[str, NDArray[np.uint32]]:
    """The document, text and tokens, with as many lines of its filler as fit."""
    frame = len(encoder.encode_document(draft.text(0)))
    if frame > sequence_length:
        raise UserError(
            f"a retrieval document has at least {frame} tokens here, more than "
            f"sequence_length={sequence_length}; set corpus.retrieval_tokens=0 or use longer sequences"
        )
    counts = np.cumsum([len(ids) for ids in encoder.encode_texts(draft.lines)])
    fitting = int(np.searchsorted(counts, sequence_length - frame, side="right"))
    while True:  # a line's tokens can differ by one or two beside its neighbours, so the whole is what counts
        text = draft.text(fitting)
        document = encoder.encode_document(text)
        if len(document) <= sequence_length:
            return text, document
        fitting -= 1


def _choice(items: Sequence[Item], rng: Random) -> Item:
    return items[int(rng.random() * len(items))]


def _shuffled(items: list[Item], rng: Random) -> list[Item]:
    keyed = sorted((rng.random(), position) for position in range(len(items)))
    return [items[position] for _, position in keyed]
