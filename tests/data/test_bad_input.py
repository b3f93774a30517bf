"""What is wrong with the input is named, or counted and left out: never dropped in silence, never in a batch."""

import gzip
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import documents_of
from transformers import LlamaConfig

from ropewalk.config.data import CorpusConfig, PrepareConfig, SourceConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.training.inputs import fit_tokenizer


@pytest.fixture
def store(store_64, tmp_path):
    """A copy that may be spoilt."""
    return Path(shutil.copytree(store_64.root, tmp_path / "store"))


def prepared(output: Path, tokenizer: Path, **settings) -> list[str]:
    """The lines that prepare says."""
    lines: list[str] = []
    corpus = CorpusConfig(name="bad", tokenizer=str(tokenizer), **settings)
    prepare(PrepareConfig(str(output), [64], workers=1, corpus=corpus), lines.append)
    return lines


def test_a_truncated_shard_is_named_at_opening(store):
    path = store / "long/tokens-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=rf"tokens-00000.bin has {size - 2} bytes, its manifest says {size}"):
        PackedStore(store)


@pytest.mark.parametrize("file", ["long/tokens-00000.bin", "short/offsets.npy", "tokenizer/tokenizer.json"])
def test_one_flipped_bit_is_found_by_verify(store, file):
    """As training does it with data.verify=true, before its first step."""
    PackedStore(store).verify()
    content = bytearray((store / file).read_bytes())
    content[len(content) // 2] ^= 1
    (store / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"corrupt|is not the tokenizer of this store"):
        PackedStore(store).verify()


@pytest.mark.parametrize(("file", "byte"), [("tokens-00000.bin", 130), ("ends.npy", -4), ("checks.npy", -1)])
def test_one_flipped_bit_gives_no_batch(store, file, byte):
    """Also without verify: what is read is compared with what was written, each time; other sequences are read."""
    content = bytearray((store / "short" / file).read_bytes())
    content[byte] ^= 1
    (store / "short" / file).write_bytes(content)
    spoilt = PackedStore(store)
    place = 1 if byte > 0 else spoilt.domains["short"].sequences - 1  # 128 bytes a sequence
    with pytest.raises(ValueError, match=rf"is corrupt: sequence {place} is not as it was written; copy or write"):
        spoilt.read("short", place)
    assert len(spoilt.read("short", 0).tokens) == 64


def test_a_store_that_is_being_written_is_no_store(fixture_corpus, fixture_tokenizer, tmp_path, monkeypatch):
    """Every file is there but the manifest, which comes last."""
    from ropewalk.data.store import writer

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "o", fixture_tokenizer, paths=[str(fixture_corpus)])
    assert (tmp_path / "o/packed-64/long/tokens-00000.bin").is_file()
    with pytest.raises(ValueError, match=r"has no manifest.json, so its writing never finished; make one with"):
        PackedStore(tmp_path / "o/packed-64")


def test_another_sequence_length_is_refused(store_64):
    with pytest.raises(ValueError, match=r"data.sequence_length=100, but .* holds sequences of 64 tokens"):
        Mixture(0, {}, store_64, sequence_length=100)


def test_the_manifest_of_another_tokenizer_is_refused(store_64, fixture_corpus, tmp_path):
    """By a mixture of two stores, and by a model that brings a tokenizer."""
    corpus = CorpusConfig(name="other", paths=[str(fixture_corpus)], vocab_size=400)
    prepare(PrepareConfig(str(tmp_path / "o"), [64], workers=1, corpus=corpus), lambda line: None)
    other = PackedStore(tmp_path / "o/packed-64")
    with pytest.raises(ValueError, match="holds tokens of another tokenizer"):
        Mixture(0, {}, {"": store_64, "more": other})
    (tmp_path / "t.jinja").write_text("{{ messages }}")  # a chat template is no other tokenizer
    corpus.chat_template = str(tmp_path / "t.jinja")
    prepare(PrepareConfig(str(tmp_path / "t"), [64], workers=1, corpus=corpus), lambda line: None)
    with_template = PackedStore(tmp_path / "t/packed-64")
    assert with_template.tokenizer["sha256"] != other.tokenizer["sha256"]
    Mixture(0, {}, {"": other, "more": with_template})
    config = LlamaConfig(vocab_size=512)
    fit_tokenizer(config, store_64, str(store_64.tokenizer_path))
    with pytest.raises(
        ValueError, match=r"is not the model's .*they differ first at id \d+, token .*; prepare the data"
    ):
        fit_tokenizer(config, other, str(store_64.tokenizer_path))
    with pytest.raises(ValueError, match="has 512 tokens and the model embeds 400"):
        fit_tokenizer(LlamaConfig(vocab_size=400), store_64, None)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"books": 1.0}, "names the domain 'books', which the store does not have; use some of: long, short"),
        ({"long": 0.0, "short": 0.0}, "has no positive weight; give one to at least one of: long, short"),
    ],
)
def test_weights_of_no_domain_or_of_nothing_are_refused(store_64, weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture(0, weights, store_64)


def test_empty_documents_are_counted(fixture_tokenizer, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("")
    (tmp_path / "d/b.md").write_text(" \n\t")
    (tmp_path / "d/c.jsonl").write_text('{"text": ""}\n\n{"text": "One document."}\n\n')
    lines = prepared(tmp_path / "o", fixture_tokenizer, sources=[SourceConfig("web", str(tmp_path / "d"))])
    assert any(line.startswith("d: 1 documents, ") and line.endswith("skipped: 5 empty") for line in lines)
    (source,) = PackedStore(tmp_path / "o/packed-64").sources
    assert source["skipped"] == {"empty": 5}


def test_a_corpus_of_nothing_is_refused(fixture_tokenizer, tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="the corpus has no documents"):
        prepared(tmp_path / "o", fixture_tokenizer, sources=[SourceConfig("web", str(tmp_path / "d"))])
    (tmp_path / "d/a.txt").write_text(" ")
    with pytest.raises(ValueError, match="would hold no sequence of 64 tokens; give it documents"):
        prepared(tmp_path / "o", fixture_tokenizer, sources=[SourceConfig("web", str(tmp_path / "d"))])


def test_invalid_utf8_is_counted_whatever_the_file(tmp_path):
    """Of a row, not of the rows beside it; a byte order mark is no text."""
    bad, fine = b'{"text": "caf\xe9"}\n', b'{"text": "fine"}\n'
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d/b.jsonl").write_bytes(b"\xef\xbb\xbf" + fine + bad + fine)
    (tmp_path / "d/c.jsonl.gz").write_bytes(gzip.compress(bad + fine))
    column = pa.array([b"caf\xe9", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "d/d.parquet")
    documents, skipped = documents_of(CorpusConfig(sources=[SourceConfig("web", str(tmp_path / "d"))]))
    assert [document.text for document in documents] == ["fine"] * 4
    assert [document.name for document in documents] == [
        "d/b.jsonl:1",
        "d/b.jsonl:3",
        "d/c.jsonl.gz:2",
        "d/d.parquet:2",
    ]
    assert skipped == {"not UTF-8": 4}


def test_a_line_of_200_mb_is_counted(fixture_tokenizer, tmp_path):
    """In a file of text and in a row, real ones; what stands beside them is kept."""
    line = "a word and " * (200_000_000 // 11)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text(line)
    (tmp_path / "d/b.jsonl").write_text(json.dumps({"text": line}) + '\n{"text": "A line of its own."}\n')
    del line
    lines = prepared(tmp_path / "o", fixture_tokenizer, sources=[SourceConfig("web", str(tmp_path / "d"))])
    assert any("d: 1 documents" in said and said.endswith("skipped: 2 a line too long") for said in lines)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # kB
    shutil.rmtree(tmp_path)


def test_parquet_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(5000)]}), path, row_group_size=500, compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.parquet is not a whole parquet file .*; fetch it again"):
        documents_of(CorpusConfig(sources=[SourceConfig("web", str(path))]))
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2 : len(whole) // 2 + 400] = np.random.default_rng(0).bytes(400)
    path.write_bytes(spoilt)
    with pytest.raises(ValueError, match=r"a.parquet is damaged after row \d+ .*; fetch it again"):
        documents_of(CorpusConfig(sources=[SourceConfig("web", str(path))]))


def test_messages_that_no_tokenizer_takes_are_counted(tmp_path):
    def talk(content):
        return json.dumps({"messages": [{"role": "assistant", "content": content}]}) + "\n"

    (tmp_path / "a.jsonl").write_text(talk("x" + " " * 400_001) + talk("Hi") + "\n")
    documents, skipped = documents_of(CorpusConfig(sources=[SourceConfig("c", str(tmp_path / "a.jsonl"), chat=True)]))
    assert [document.messages[0]["content"] for document in documents] == ["Hi"]
    assert skipped == {"too many spaces in a row": 1, "empty": 1}
