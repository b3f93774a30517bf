"""Every engine gives the tokens of tokenizer.json; gigatoken's are checked, and a difference is not passed on."""

import base64
import random
import re
import shutil

import numpy as np
import pytest

import ropewalk.data.prepare.engines as module
from ropewalk.data.prepare.corpus import Document
from ropewalk.data.prepare.engines import (
    CheckedEngine,
    FastPathError,
    convert_llama3,
    has_ranks,
    open_engine,
    read_ranks,
)
from ropewalk.data.prepare.tokenizer import TokenizersEngine, encoded_documents, load_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory, fixture_corpus):
    """A small tokenizer of Llama 3's form: its pattern, ranks in tokenizer.model, every merge in tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    steps = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = steps
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [path.read_text() for path in sorted(fixture_corpus.iterdir())]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet,
                                                           show_progress=False))  # fmt: skip
    vocab = trained.get_vocab()
    # As transformers converts tiktoken's ranks: each token may come of any two others, the lowest ranks first.
    merges = [
        (rank, vocab[token[:i]], vocab[token[i:]], (token[:i], token[i:]))
        for token, rank in vocab.items() for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab
    ]  # fmt: skip
    whole = Tokenizer(models.BPE(vocab, [pair for *_, pair in sorted(merges)], ignore_merges=True))
    whole.pre_tokenizer, whole.decoder = steps, decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    whole.add_special_tokens(special)
    directory = tmp_path_factory.mktemp("llama3")
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token=special[0], eos_token=special[1])
    fast.save_pretrained(directory)
    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks = sorted((rank, bytes(bytes_of[c] for c in token)) for token, rank in vocab.items())
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks]
    (directory / "tokenizer.model").write_bytes(b"".join(lines))
    return directory


def test_llama3s_file_becomes_a_tokenizer(llama3, texts, tmp_path):
    """From the ranks alone: the same tokens, the special ones after them, and BOS before each text."""
    from transformers import AutoTokenizer

    shutil.copy(llama3 / "tokenizer.model", tmp_path)
    convert_llama3(tmp_path)
    same(load_tokenizer(str(tmp_path), "tokenizers").engine.encode_batch(texts),
         load_tokenizer(str(llama3), "tokenizers").engine.encode_batch(texts))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    first = len(read_ranks(tmp_path / "tokenizer.model"))
    # Meta's ids for 128,000 ranks: BOS 128000, EOS 128001, end of turn 128009, 256 special tokens in all.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (first, first + 1)
    assert tokenizer.convert_tokens_to_ids(["<|start_header_id|>", "<|eot_id|>"]) == [first + 6, first + 9]
    assert len(tokenizer) == first + 256
    assert tokenizer("Hi<|eot_id|>").input_ids[0] == first
    assert tokenizer("Hi<|eot_id|>").input_ids[-1] == first + 9
    with pytest.raises(ValueError, match=r"has no tokenizer.model of tiktoken's form; fetch it"):
        convert_llama3(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def texts(fixture_corpus):
    """Prose, and strings of all scripts at random, special tokens' texts among them."""
    rng = random.Random(0)
    alphabet = "aZ09 \n\r\t'.;_éßжд中文한🙂\u0301\u200d\u00a0\u3000"
    made = ["".join(rng.choices(alphabet, k=rng.randrange(200))) for _ in range(300)]
    prose = [path.read_text() for path in sorted(fixture_corpus.iterdir())]
    return [text.encode() for text in [*prose, *made, "a<|eot_id|>b<|end_of_text|>", "", " ", "\n" * 50]]


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.uint32
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("name", ["tiktoken", "gigatoken"])
def test_engines_agree(llama3, texts, name):
    reference = load_tokenizer(str(llama3), "tokenizers")
    encoder = load_tokenizer(str(llama3), name)
    assert encoder.engine.name == name
    expected = reference.engine.encode_batch(texts)
    same(encoder.engine.encode_batch(texts), expected)
    assert not any((tokens >= 900).any() for tokens in expected)  # no special token


def test_auto_takes_tiktoken_where_there_are_ranks(llama3, fixture_tokenizer):
    assert load_tokenizer(str(llama3)).engine.name == "tiktoken"
    assert load_tokenizer(str(fixture_tokenizer)).engine.name == "tokenizers"


def test_ranks_of_another_tokenizer_are_refused(llama3, tmp_path):
    shutil.copytree(llama3, tmp_path / "t")
    path = tmp_path / "t/tokenizer.model"
    lines = path.read_bytes().splitlines()
    swapped = [line.split()[0] for line in lines]
    swapped[40:60] = swapped[40:60][::-1]
    path.write_bytes(b"".join(token + b" %d\n" % rank for rank, token in enumerate(swapped)))
    with pytest.raises(ValueError, match="tiktoken does not give the tokens of tokenizers for this tokenizer; set"):
        load_tokenizer(str(tmp_path / "t"))


def test_engines_that_cannot_be_used_are_named(fixture_tokenizer, tmp_path):
    backend = load_tokenizer(str(fixture_tokenizer)).tokenizer.backend_tokenizer
    with pytest.raises(ValueError, match=r"engine=tiktoken needs a directory with tokenizer.model"):
        open_engine("tiktoken", TokenizersEngine(backend), backend, fixture_tokenizer)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")  # a sentencepiece model, as Llama 2's
    assert not has_ranks(tmp_path)


class Wrong:
    """A fast engine with one fault: it forgets the last token of texts that have a certain word."""

    name = "wrong"

    def __init__(self, right, word):
        self._right, self._word = right, word

    def encode_batch(self, texts):
        encoded = self._right.encode_batch(texts)
        return [ids[:-1] if self._word in text else ids for ids, text in zip(encoded, texts, strict=True)]


@pytest.fixture(scope="module")
def right(fixture_tokenizer):
    return TokenizersEngine(load_tokenizer(str(fixture_tokenizer)).tokenizer.backend_tokenizer)


def encoded(engine, fixture_tokenizer, documents):
    """What a shard of these documents would hold."""
    encoder = load_tokenizer(str(fixture_tokenizer))
    encoder.engine = engine
    read = (Document(str(place), tuple(parts)) for place, parts in enumerate(documents))
    return [tokens.tolist() for tokens, _ in encoded_documents(read, encoder)]


class Watched:
    """A reference that remembers what it was asked."""

    name = "watched"

    def __init__(self, right):
        self._right, self.asked = right, []

    def encode_batch(self, texts):
        self.asked += texts
        return self._right.encode_batch(texts)


def test_one_document_in_a_thousand_is_compared(right, fixture_tokenizer):
    """Whole, whatever the order, and the first; a document of two parts counts once."""
    documents = [(f"number {i} ", f"and {i}\n") for i in range(10_000)]
    with pytest.raises(FastPathError, match=r"wrong differs from tokenizers at token \d+ of a text of \d+ bytes"):
        encoded(CheckedEngine(Wrong(right, b"number"), right), fixture_tokenizer, documents)
    watched = Watched(right)
    found = encoded(CheckedEngine(right, watched), fixture_tokenizer, documents)
    assert found == encoded(right, fixture_tokenizer, documents)
    assert 4 <= len(watched.asked) <= 48  # of 10 documents expected; beyond in fewer than one seed of a thousand
    assert watched.asked[:2] == [b"number 0 ", b"and 0\n"]
    chosen = {text.split()[1] for text in watched.asked}
    assert sorted(watched.asked) == sorted(
        b"%s %s%s" % (w, i, e) for i in chosen for w, e in ((b"number", b" "), (b"and", b"\n"))
    )
    again = Watched(right)
    encoded(CheckedEngine(right, again), fixture_tokenizer, [documents[0], *documents[:0:-1]])
    assert sorted(again.asked) == sorted(watched.asked)


@pytest.mark.parametrize("parts", [1, 8, 60])
def test_a_window_of_each_large_document_is_compared(right, fixture_tokenizer, monkeypatch, parts):
    """Also where no part of it is large; 200 bytes but for the characters that its edges cut."""
    monkeypatch.setattr(module, "LARGE_BYTES", 1000)
    monkeypatch.setattr(module, "WINDOW_BYTES", 200)
    documents = [["naïve fault, 東京. " * (60 // parts)] * parts, ["short fault"]]
    with pytest.raises(FastPathError, match=r"of a text of \d+ bytes"):
        encoded(CheckedEngine(Wrong(right, b"fault"), right), fixture_tokenizer, documents)
    watched = Watched(right)
    found = encoded(CheckedEngine(right, watched), fixture_tokenizer, documents)
    assert found == encoded(right, fixture_tokenizer, documents)
    window = b"".join(watched.asked)
    assert 196 <= len(window) <= 200
    assert window in "".join(documents[0]).encode()


def test_a_shard_that_differs_is_done_again_with_the_reference(
    fixture_corpus, fixture_tokenizer, tmp_path, monkeypatch, capsys, right
):
    """The whole shard, so that the bytes do not depend on when the difference was met."""
    from ropewalk.config.data import CorpusConfig, PrepareConfig
    from ropewalk.data import PackedStore
    from ropewalk.data.prepare import prepare_plan
    from ropewalk.data.prepare.pipeline import prepare

    lines = []

    def made(name):
        corpus = CorpusConfig(name="c", paths=[str(fixture_corpus)], tokenizer=str(fixture_tokenizer))
        config = PrepareConfig(str(tmp_path / name), [64], shard_mb=0.02, corpus=corpus)
        return PackedStore(prepare(config, lines.append) / "packed-64")

    expected = made("right")
    monkeypatch.setattr(module, "CHECKED_ONE_IN", 1)
    encoder = load_tokenizer(str(fixture_tokenizer))
    encoder.engine = CheckedEngine(Wrong(right, b"the"), right)
    monkeypatch.setattr(prepare_plan, "open_encoder", lambda *settings: encoder)
    assert made("checked").fingerprint == expected.fingerprint
    said = capsys.readouterr().err
    assert re.search(r"warning: shard \d+: wrong differs from tokenizers at token", said)
    assert "this shard and all others are done again with tokenizers" in said
    assert any(line.startswith("tokenized with tokenizers (") for line in lines)


def test_a_difference_in_the_last_shard_undoes_the_others(fixture_tokenizer, tmp_path, monkeypatch, right):
    """Its first document is compared; the shards before it, where nothing was seen, are not left to the engine.

    Here the last one is also the last to be done, as it is the smallest.
    """
    from ropewalk.config.data import CorpusConfig, PrepareConfig
    from ropewalk.data import PackedStore
    from ropewalk.data.prepare import prepare_plan
    from ropewalk.data.prepare.pipeline import prepare

    monkeypatch.setattr(module, "CHECKED_ONE_IN", 2**65)
    (tmp_path / "docs").mkdir()
    for number, (word, times) in enumerate((("one", 40), ("fault", 40), ("two", 100), ("fault", 70))):
        (tmp_path / f"docs/{number}.txt").write_text(f"{word} and more\n" * times)

    def made(name, stage="all"):
        corpus = CorpusConfig(
            name="c", paths=[str(tmp_path / "docs")], tokenizer=str(fixture_tokenizer), heldout_documents=0,
            retrieval_tokens=0,
        )  # fmt: skip
        config = PrepareConfig(str(tmp_path / name), [64], shard_mb=0.0012, workers=1, stage=stage, corpus=corpus)
        return prepare(config, lines.append) / "packed-64"

    lines: list[str] = []
    expected = PackedStore(made("right"))
    encoder = load_tokenizer(str(fixture_tokenizer))
    encoder.engine = CheckedEngine(Wrong(right, b"fault"), right)
    monkeypatch.setattr(prepare_plan, "open_encoder", lambda *settings: encoder)
    lines.clear()
    assert PackedStore(made("checked")).fingerprint == expected.fingerprint
    assert "wrong differed on a shard: what it tokenized is done again without it" in lines
    assert "tokenized with tokenizers (3 shards)" in lines
    for stage in ("plan", "tokenize"):
        made("apart", stage)
    with pytest.raises(ValueError, match="2 shards, the first 0, are not tokenized but by wrong, which differed"):
        made("apart", "pack")
    for stage in ("tokenize", "pack", "finish"):
        made("apart", stage)
    assert PackedStore(tmp_path / "apart/packed-64").fingerprint == expected.fingerprint


def test_a_pattern_that_is_not_alone_is_refused(fixture_tokenizer):
    backend = load_tokenizer(str(fixture_tokenizer)).tokenizer.backend_tokenizer
    with pytest.raises(ValueError, match=r"does not split text by one regular expression; set corpus.engine="):
        module._pattern(backend)


def test_a_saved_tokenizer_encodes_as_transformers_does(llama3, fixture_tokenizer, texts):
    for directory in (llama3, fixture_tokenizer):
        light, whole = load_tokenizer(directory, "tokenizers", saved=True), load_tokenizer(str(directory), "tokenizers")
        documents = [[text.decode()] for text in texts]
        same(light.encode_documents(documents), whole.encode_documents(documents))
