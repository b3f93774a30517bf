"""Tokens carry the text: what a tokenizer's file holds beside its vocabulary, and the special tokens of an encode."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from ropewalk.config.data import CorpusConfig, PrepareConfig, SourceConfig
from ropewalk.data import PackedStore
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.data.prepare.tokenizer import load_tokenizer
from ropewalk.data.store.describe import describe
from ropewalk.data.store.tokenizer_files import adds_bos, adds_eos, encode, open_tokenizer

STATE = {
    "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|begin_of_text|>",
    },
}  # fmt: skip


@pytest.fixture
def changed(fixture_tokenizer, tmp_path):
    """A copy of the tokenizer, its tokenizer.json changed by a function."""

    def copy(change, name="tokenizer"):
        directory = tmp_path / name
        directory.mkdir()
        for file in fixture_tokenizer.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        content = json.loads((directory / "tokenizer.json").read_text())
        change(content)
        (directory / "tokenizer.json").write_text(json.dumps(content))
        return directory

    return copy


def state_of(directory):
    content = json.loads((directory / "tokenizer.json").read_text())
    return content["truncation"], content["padding"], content["model"]["dropout"]


def prepared(corpus, tokenizer, output, **settings):
    config = CorpusConfig(name="c", sources=[SourceConfig("text", str(corpus))], tokenizer=str(tokenizer), **settings)
    return prepare(PrepareConfig(str(output), [64], workers=1, corpus=config), lambda line: None)


def tokens_of(output):
    store = PackedStore(output / "packed-64")
    sequences = [store.read("text", index) for index in range(store.domains["text"].sequences)]
    return store, np.concatenate([sequence.tokens[: sequence.ends[-1]] for sequence in sequences])


def test_state_left_in_the_file_changes_no_token(changed, fixture_tokenizer, fixture_corpus, tmp_path, capsys):
    """Truncation, padding and dropout: the tokens of the tokenizer without them, and a store that hands none on."""
    dirty = changed(lambda content: (content.update(STATE), content["model"].update(dropout=0.3)))
    clean = prepared(fixture_corpus, fixture_tokenizer, tmp_path / "clean")
    output = prepared(fixture_corpus, dirty, tmp_path / "dirty")
    np.testing.assert_array_equal(tokens_of(output)[1], tokens_of(clean)[1])
    assert state_of(output / "packed-64/tokenizer") == (None, None, None)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert any("truncation, padding, dropout in tokenizer.json; switched off" in line for line in warnings)


@pytest.mark.parametrize("plain", [True, False])
def test_every_opener_switches_state_off(changed, fixture_tokenizer, plain):
    """Also of a tokenizer that transformers must build: one with a token that tokenizer.json lacks."""
    directory = changed(lambda content: (content.update(STATE), content["model"].update(dropout=0.9)))
    if not plain:
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {"512": {"content": "<|new|>", "special": True}}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    text = "Some text that is longer than sixteen tokens, and than thirty-two, whatever merges it has."
    expected = AutoTokenizer.from_pretrained(fixture_tokenizer).encode(text, add_special_tokens=False)
    assert len(expected) > 32
    assert open_tokenizer(directory).backend_tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert load_tokenizer(str(directory)).encode_texts([text])[0].tolist() == expected


def test_a_directory_without_a_vocabulary_is_refused(fixture_corpus, tmp_path):
    """transformers makes an empty Llama tokenizer of it."""
    directory = tmp_path / "t"
    directory.mkdir()
    with pytest.raises(ValueError, match=r"corpus.tokenizer=.*t cannot be opened: .*; name a directory"):
        prepared(fixture_corpus, directory, tmp_path / "o")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match=r"corpus.tokenizer=.*t loses 100.0% of the characters"):
        prepared(fixture_corpus, directory, tmp_path / "o")


def words_tokenizer(directory, words):
    """Words, and <unk> for every other."""
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_corpus_that_is_mostly_unknown_is_refused(tmp_path):
    """A vocabulary of words of another language: the sentence of the check comes back, the corpus does not."""
    known = [
        "The",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "1234567890",
        "lazy",
        "dogs",
        ";",
        "isn",
        "'",
        "t",
        "that",
        "so",
        "?",
    ]
    directory = words_tokenizer(tmp_path / "t", known)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("quick brown dogs\n" * 100 + "unbekannt\n" * 3)  # 27 of 1,427 characters
    with pytest.raises(ValueError, match=r"loses 1\.9% of the characters between text and tokens \(limit 1%"):
        prepared(tmp_path / "docs", directory, tmp_path / "o")
    (tmp_path / "docs/a.txt").write_text("quick brown dogs\n" * 100 + "unbekannt\n")
    assert prepared(tmp_path / "docs", directory, tmp_path / "o").is_dir()
    with pytest.raises(ValueError, match=r"loses .* of the characters"):
        open_tokenizer(words_tokenizer(tmp_path / "few", ["fox"]))


def post_processor(single):
    """A change of tokenizer.json that sets what the tokenizer's own encode adds."""

    def change(content):
        backend = Tokenizer.from_str(json.dumps(content))
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)]
        )
        content["post_processor"] = json.loads(backend.to_str())["post_processor"]

    return change


OWN = {"adds": "<|begin_of_text|> $A", "adds none": "$A", "adds both": "<|begin_of_text|> $A <|end_of_text|>"}


@pytest.mark.parametrize(
    ("own", "bos", "begins"),
    [
        ("adds", "auto", True), ("adds none", "auto", False), ("adds none", "always", True), ("adds", "never", False),
        ("adds both", "auto", True), ("adds", "false", False), ("adds none", "true", True),
    ],
)  # fmt: skip
def test_documents_begin_with_bos_where_the_tokenizers_own_encode_does(changed, tmp_path, own, bos, begins):
    """SmolLM2's BOS is a marker of chats that it never puts before a text. Stock encode follows the data."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.txt").write_text("A hack.\n")
    directory = changed(post_processor(OWN[own]))
    assert adds_bos(open_tokenizer(directory)) == (own != "adds none")
    output = prepared(tmp_path / "docs", directory, tmp_path / "o", bos=bos)
    store, tokens = tokens_of(output)
    stock = AutoTokenizer.from_pretrained(store.tokenizer_path)
    text = stock.encode("A hack.\n", add_special_tokens=False)
    assert tokens.tolist() == [*([0] if begins else []), *text, 1]
    assert stock.encode("A hack.\n") == [*([0] if begins else []), *text]
    assert store.special_tokens == {"bos": begins, "eos": True, "eos_left_off": 0}


def test_an_eos_of_the_tokenizers_own_that_documents_do_not_end_with_is_counted(changed, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in "abc":
        (tmp_path / "docs" / f"{name}.txt").write_text(f"A hack of {name}.\n")
    directory, lines = changed(post_processor(OWN["adds both"])), []
    corpus = CorpusConfig(name="c", paths=[str(tmp_path / "docs")], tokenizer=str(directory), eos=False)
    output = prepare(PrepareConfig(str(tmp_path / "o"), [64], workers=1, corpus=corpus), lines.append)
    store = PackedStore(output / "packed-64")
    assert store.special_tokens == {"bos": True, "eos": False, "eos_left_off": 3}
    assert "the tokenizer's own EOS is left off 3 documents" in lines
    assert "documents: begin with BOS, end without EOS, own EOS left off 3 times" in describe(store, None, 0)
    manifest = json.loads((store.root / "manifest.json").read_text())
    del manifest["special_tokens"]  # as before it was recorded: the same store, of the same fingerprint
    (store.root / "manifest.json").write_text(json.dumps(manifest))
    older = PackedStore(store.root)
    assert (older.special_tokens, older.fingerprint) == ({}, store.fingerprint)
    older.verify()


def test_bos_that_cannot_be_is_refused(changed, tmp_path):
    directory = changed(post_processor("$A"))
    with pytest.raises(ValueError, match=r"corpus.bos=maybe is not known; use one of: auto, always, never"):
        prepared(tmp_path, directory, tmp_path / "o", bos="maybe")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    with pytest.raises(
        ValueError, match=r"puts no BOS before a text, so nothing separates documents; set corpus.bos=al"
    ):
        load_tokenizer(str(directory))


def test_a_prompt_never_ends_in_eos(changed, capsys):
    directory = changed(post_processor(OWN["adds both"]))
    tokenizer = open_tokenizer(directory)
    assert "puts EOS after every text; no prompt here ends with it" in capsys.readouterr().err
    assert adds_eos(tokenizer)
    assert tokenizer.encode("a hack")[-1] == 1
    own = tokenizer.encode("a hack", add_special_tokens=False)
    assert encode(tokenizer, "a hack", bos=True) == [0, *own]
    assert encode(tokenizer, "a hack", bos=False) == own
