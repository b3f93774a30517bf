"""MDS to a packed store and back: every token and boundary, whatever the processes and however often it was killed."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import composed

from ropewalk.data import PackedStore, open_mds
from ropewalk.data.mds.convert import convert, packed_sequence
from ropewalk.data.mds.mds_writer import write_mds
from ropewalk.data.store.writer import PartWriter

FIXTURES = Path(__file__).parents[2] / "fixtures" / "mds"
LENGTH = 64


def samples(domain, count, seed):
    """Sequences of 64 tokens below 512, cut at random; the last is short."""
    random = np.random.default_rng(seed)
    for i in range(count):
        length = LENGTH if i < count - 1 else LENGTH - 9
        ends = np.append(np.sort(random.choice(np.arange(1, length), 3, replace=False)), length)
        indices = np.stack([np.append(0, ends[:-1]), ends], 1)
        ids = random.integers(0, 512, length).astype(np.uint32)
        yield {"input_ids": ids, "indices": indices, "length": length, "domain": domain}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.data.mds.mds_writer.SHARD_BYTES", 2000)  # several shards
    for seed, name in enumerate(("books", "arxiv")):
        write_mds(tmp_path / "mds" / name, samples(name, 17 - 4 * seed, seed))
    return tmp_path / "mds"


def configured(sources, output, tokenizer, *overrides):
    return composed("convert_mds", f"root={sources}", "++sources={books: books, arxiv: arxiv}", f"output={output}",
                    "sequence_length=64", f"tokenizer={tokenizer}", "workers=1", *overrides)  # fmt: skip


def test_every_token_and_boundary_arrives(sources, tmp_path, fixture_tokenizer):
    store = PackedStore(convert(configured(sources, tmp_path / "store", fixture_tokenizer)))
    store.verify()
    assert len(open_mds(sources / "books").shards) > 2
    for seed, (name, count) in enumerate({"books": 17, "arxiv": 13}.items()):
        expected = list(samples(name, count, seed))
        info = store.domains[name]
        assert info.sequences == count
        assert info.tokens == sum(sample["length"] for sample in expected)
        assert info.padding == 9
        for index, sample in enumerate(expected):
            found = store.read(name, index)
            assert found.ends.tolist() == sample["indices"][:, 1].tolist()
            assert found.tokens[: sample["length"]].tolist() == sample["input_ids"].tolist()
            assert not found.tokens[sample["length"] :].any()
        assert store.accounting[name] == {"tokens_in": info.tokens, "moved": {}, "dropped": {}}
    assert not list((tmp_path / "store").rglob("part-*")) + list((tmp_path / "store").glob("converting*"))


def test_bytes_do_not_depend_on_processes_or_kills(sources, tmp_path, fixture_tokenizer, monkeypatch, capsys):
    one = PackedStore(convert(configured(sources, tmp_path / "one", fixture_tokenizer)))
    many = PackedStore(convert(configured(sources, tmp_path / "many", fixture_tokenizer, "workers=3")))
    assert one.fingerprint == many.fingerprint
    killed = configured(sources, tmp_path / "killed", fixture_tokenizer)
    with monkeypatch.context() as patch:  # dies when all parts are there and the index is written

        def dies(self, parts):
            raise KeyboardInterrupt

        patch.setattr(PartWriter, "assemble", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(killed)
    records = sorted((tmp_path / "killed").rglob("part-*.json"))
    records[0].unlink()  # one was never finished
    (tmp_path / "killed" / "arxiv" / "tokens-00001.bin").write_bytes(b"torn")  # another was torn afterwards
    capsys.readouterr()
    assert PackedStore(convert(killed)).fingerprint == one.fingerprint
    assert f"2 shards to convert, {len(records) - 2} finished before" in capsys.readouterr().out
    convert(killed)
    assert "holds this store already" in capsys.readouterr().out


def test_there_and_back(sources, tmp_path, fixture_tokenizer, capsys):
    convert(configured(sources, tmp_path / "store", fixture_tokenizer))
    back = composed("convert_mds", "format=mds", f"store={tmp_path / 'store'}", f"output={tmp_path / 'back'}")
    convert(back)
    for name in ("books", "arxiv"):
        for ours, theirs in zip(open_mds(tmp_path / "back" / name), open_mds(sources / name), strict=True):
            assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
            assert ours["indices"].tolist() == theirs["indices"].tolist()
            assert (ours["length"], ours["domain"]) == (theirs["length"], theirs["domain"])
    capsys.readouterr()
    convert(back)
    assert capsys.readouterr().out.count("is finished already") == 2


def test_samples_are_written_as_the_official_writer_writes_them(tmp_path):
    official = open_mds(FIXTURES / "prolong")
    write_mds(tmp_path / "ours", iter(official))
    ours = open_mds(tmp_path / "ours")
    assert ours.columns == official.columns
    assert _sample_bytes(ours) == _sample_bytes(official)
    index, theirs = (json.loads((d.root / "index.json").read_text())["shards"][0] for d in (ours, official))
    assert index.keys() == theirs.keys()
    for key in ("column_encodings", "column_names", "column_sizes", "samples", "version", "format"):
        assert index[key] == theirs[key]


def _sample_bytes(dataset):
    data = bytes(dataset.shards[0].load())
    count = int.from_bytes(data[:4], "little")
    offsets = np.frombuffer(data, "<u4", count + 1, 4)
    return [data[a:b] for a, b in pairwise(offsets)]


def test_loss_masks_go_there_and_back(tmp_path, fixture_tokenizer):
    random = np.random.default_rng(2)
    masked = [{**s, "mask": random.integers(0, 2, s["length"]).astype(np.uint8)} for s in samples("chat", 11, 2)]
    write_mds(tmp_path / "chat", masked)
    ours = composed("convert_mds", f"root={tmp_path}", "++sources={chat: chat}", f"output={tmp_path / 'store'}",
                    "sequence_length=72", f"tokenizer={fixture_tokenizer}", "workers=1")  # fmt: skip
    store = PackedStore(convert(ours))
    store.verify()
    for index, sample in enumerate(masked):
        found = store.read("chat", index)
        length = len(sample["input_ids"])
        assert found.loss_mask[:length].tolist() == sample["mask"].astype(bool).tolist()
        assert not found.loss_mask[length:].any()
        starts = [start for start, _ in sample["indices"]]
        assert store.trained_tokens("chat", index) == sum(sample["mask"]) - sum(sample["mask"][starts])
    convert(composed("convert_mds", "format=mds", f"store={tmp_path / 'store'}", f"output={tmp_path / 'back'}"))
    for back, sample in zip(open_mds(tmp_path / "back" / "chat"), masked, strict=True):
        assert back["mask"].tolist() == sample["mask"].tolist()
        assert back["mask"].dtype == np.uint8


def test_the_official_writers_masks_are_read():
    """Its fixture: every second token is masked out, from the second on; the pieces end at 30 and 64."""
    sequence = packed_sequence(open_mds(FIXTURES / "pickled")[0], 72)
    assert sequence.loss_mask.tolist() == [place % 2 == 0 and place < 64 for place in range(72)]
    assert sequence.trained_tokens == 32 - 2


@pytest.mark.parametrize(("sample", "message"), [
    ({"input_ids": np.arange(65)}, r"shape \(65,\) must be one row of 1 to 64 integers"),
    ({"input_ids": np.zeros((2, 3), int)}, r"shape \(2, 3\)"), ({"input_ids": np.zeros(3)}, "integers"),
    ({"input_ids": np.array([1, -2])}, "token -2 is negative"),
    ({"input_ids": np.arange(4), "length": 5}, "length=5, but there are 4"),
    ({"input_ids": np.arange(4), "indices": [[0, 2]]}, "do not follow each other from token 0 to 4"),
    ({"input_ids": np.arange(4), "indices": [[0, 2], [3, 4]]}, "do not follow"),
    ({"input_ids": np.arange(4), "indices": [[0, 2], [2, 2], [2, 4]]}, "do not follow"),
    ({"input_ids": np.arange(4), "indices": []}, "do not follow"),
    ({"input_ids": np.arange(4), "mask": np.ones(3)}, r"mask of shape \(3,\) must have an entry for each of the 4"),
])  # fmt: skip
def test_a_sample_that_does_not_fit_is_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        packed_sequence(sample, LENGTH)


def test_without_boundaries_a_sequence_is_one_piece():
    assert packed_sequence({"input_ids": np.arange(40)}, LENGTH).ends.tolist() == [40]


def test_mistakes_are_named_before_anything_is_written(sources, tmp_path, fixture_tokenizer):
    def refused(message, *overrides):
        with pytest.raises(ValueError, match=message):
            convert(configured(sources, tmp_path / "store", fixture_tokenizer, *overrides))
        assert not (tmp_path / "store").exists()

    refused("tokenizer is not set", "tokenizer=null")
    refused("sources is empty", "~sources")
    refused("has no index", "sources.books=nowhere")
    refused("format=zip is not known", "format=zip")
    shutil.copytree(FIXTURES / "scalars", sources / "other")
    refused("has no column input_ids", "++sources.other=other")


def test_tokens_of_another_tokenizer_are_named_with_their_place(sources, tmp_path, fixture_tokenizer):
    shutil.copytree(FIXTURES / "prolong", sources / "llama3")
    config = configured(sources, tmp_path / "store", fixture_tokenizer, "++sources.llama3=llama3")
    with pytest.raises(ValueError, match=r"sources\.llama3: sequence 0 of llama3/.* has token \d+, the tokeniz"):
        convert(config)
    with pytest.raises(ValueError, match="holds the beginning of another conversion"):
        convert(configured(sources, tmp_path / "store", fixture_tokenizer))
