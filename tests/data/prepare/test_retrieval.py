import random
import re

import numpy as np
import pytest

from ropewalk.data.prepare.retrieval import (
    ADJECTIVES,
    NOUNS,
    WORDS,
    fact,
    question,
    random_key,
    random_name,
    retrieval_documents,
)
from ropewalk.data.prepare.tokenizer import load_tokenizer

FACT = re.compile(r"^The pass key of ([a-z]+-[a-z]+) is (\d{5})\.$", re.MULTILINE)
ASKED = re.compile(r"^What is the pass key of ([a-z-]+)\? The pass key of \1 is (\d{5})\.$", re.MULTILINE)
ASKING = "What is the pass key of"


@pytest.fixture(scope="module")
def encoder(fixture_tokenizer):
    return load_tokenizer(str(fixture_tokenizer))


@pytest.fixture(scope="module")
def filler(fixture_corpus):
    return [path.read_text() for path in sorted(fixture_corpus.iterdir())]


def decode(encoder, ids) -> str:
    return encoder.tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def test_the_one_text_format():
    assert fact("amber-falcon", "48213") == "The pass key of amber-falcon is 48213."
    answered = question("amber-falcon") + "48213"
    assert answered == "What is the pass key of amber-falcon? The pass key of amber-falcon is 48213"


@pytest.mark.parametrize("rng", [random.Random(1), np.random.default_rng(1)], ids=["stdlib", "numpy"])
def test_names_and_keys(rng):
    keys = [random_key(rng, 3) for _ in range(3000)]
    assert all(re.fullmatch(r"[1-9]\d\d", key) for key in keys)
    assert len(set(keys)) > 850  # 900 (1 - e^(-3000/900)) = 868 expected of 900
    names = [random_name(rng) for _ in range(500)]
    assert all(name.split("-")[0] in ADJECTIVES and name.split("-")[1] in NOUNS for name in names)
    assert len(set(ADJECTIVES)) * len(set(NOUNS)) == len(ADJECTIVES) * len(NOUNS) > 10_000


@pytest.mark.parametrize("length", [256, 1024])
def test_documents_fit_and_can_be_answered(encoder, filler, length):
    documents, masks = zip(*retrieval_documents(encoder, filler, length, 20 * length, seed=3), strict=True)
    assert set(masks) == {None}
    sizes = [len(document) for document in documents]
    assert sum(sizes) >= 20 * length > sum(sizes[:-1])
    assert all(0.75 * length < size <= length for size in sizes)
    depths = []
    for document in documents:
        text = decode(encoder, document)
        body, closing = text[: text.index(ASKING)], text[text.index(ASKING) :]
        facts, asked = dict(FACT.findall(body)), ASKED.findall(closing)
        assert len(facts) == length // 96
        assert len(asked) == max(1, round(0.75 * (length // 96)))
        assert all(facts[name] == key for name, key in asked)
        assert closing.count("\n") == len(asked)
        assert document[0] == 0
        assert document[-1] == 1
        depths += [match.start() / len(body) for match in FACT.finditer(body)]
    assert min(depths) < 0.2
    assert max(depths) > 0.7


@pytest.mark.parametrize("length", [128, 512])
def test_the_answers_of_a_restated_key_alone_are_trained(encoder, filler, length):
    made = list(retrieval_documents(encoder, filler, length, 60 * length, seed=3, named=False))
    counts = []
    for document, mask in made:
        assert len(document) == len(mask) <= length
        text = decode(encoder, document)
        keys = re.findall(r"^The pass key is ([a-z]+)\.$", text, re.MULTILINE)
        assert len(set(keys)) == 1
        assert keys[0] in WORDS
        # The trained tokens are the key, once for each statement but the first, and nothing else.
        assert decode(encoder, document[mask]).replace(" ", "") == "".join(keys[1:])
        assert mask.argmax() > len(encoder.encode_texts([text[: text.index(keys[0])]])[0])
        counts.append(len(keys))
        assert len(keys) * len(encoder.encode_texts([fact(None, keys[0]) + "\n"])[0]) <= 2 / 3 * length + 1
    assert min(counts) == 2 < max(counts)


def test_the_prompt_ends_where_the_key_begins(encoder):
    """Prompt and key encoded apart are the tokens of both together: evaluation asks what was taught."""
    prompt, key = question("wise-otter"), "70314"
    apart, together = encoder.encode_texts([prompt, key]), encoder.encode_texts([prompt + key])
    assert [*apart[0], *apart[1]] == together[0].tolist()
    assert len(apart[1]) == 5


def test_documents_depend_on_seed_and_length_alone(encoder, filler):
    def made(length, seed):
        return [d.tolist() for d, _ in retrieval_documents(encoder, filler, length, 1000, seed)]

    assert made(256, 1) == made(256, 1)
    assert made(256, 1) != made(256, 2)


def test_a_length_without_room_is_refused(encoder, filler):
    with pytest.raises(ValueError, match=r"at least \d+ tokens here, more than sequence_length=32"):
        next(retrieval_documents(encoder, filler, 32, 100, 0))
