"""Visuals in a store: what is read is what was written, every fault is found, and stores of text know nothing of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from visual_stores import LENGTH, SEQUENCES, make_store, sequence_of, visual_of

from ropewalk.config.data import ConvertConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.mds.convert import to_mds
from ropewalk.data.order.batches import read_batch
from ropewalk.data.store.cache import DownloadCache
from ropewalk.data.store.describe import describe
from ropewalk.data.store.reader import PackedSequence
from ropewalk.data.store.remote import RemoteStore
from ropewalk.data.store.writer import Accounting, write_store


def written(pixels=True, count=6):
    """The sequences that make_store writes, drawn again."""
    rng = np.random.default_rng(0)
    return [sequence_of(rng, SEQUENCES[number % len(SEQUENCES)], pixels) for number in range(count)]


def same(one, other):
    assert np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.loss_mask, other.loss_mask)
    assert len(one.visuals) == len(other.visuals)
    for a, b in zip(one.visuals, other.visuals, strict=True):
        assert vars(replace(a, content=None)) == vars(replace(b, content=None))
        assert a.content.dtype == b.content.dtype
        assert np.array_equal(a.content, b.content)


@pytest.mark.parametrize("pixels", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, fixture_tokenizer, pixels):
    """From a directory, and from a URL whose files are copied as they are read."""
    store = make_store(tmp_path / "store", fixture_tokenizer, pixels=pixels, count=6)
    store.verify()
    remote = RemoteStore(f"file://{store.root}", DownloadCache(tmp_path / "cache", 2**20))
    for index, sequence in enumerate(written(pixels)):
        same(store.read("visuals", index), sequence)
        same(remote.read("visuals", index), sequence)
        grids = [(visual.start, visual.frames, visual.height, visual.width) for visual in sequence.visuals]
        assert [tuple(row[:4]) for row in store.visual_index("visuals", index).tolist()] == grids
    assert len(store.visual_index("visuals")) == 2 * (3 + 1)  # of two sequences with three visuals and one


def test_visuals_move_with_their_rows(tmp_path, fixture_tokenizer):
    """Two rows joined to one training sequence: the second row's visuals start a row later."""
    store = make_store(tmp_path / "store", fixture_tokenizer, count=6)
    mixture = Mixture(0, {}, store, 1, sequence_length=2 * LENGTH)
    (ref,) = mixture.global_batch(0)
    expected = [
        visual.start + LENGTH * place for place, row in enumerate(ref.rows) for visual in written()[row].visuals
    ]
    batch = read_batch(mixture.store, [ref])
    assert [visual.start for visual in batch.visuals] == expected
    assert [key.row for key in batch.visual_keys] == [row for row in ref.rows for _ in written()[row].visuals]


@pytest.mark.parametrize(
    ("file", "place"), [("media-00000.bin", 5), ("visuals.npy", 128 + 8), ("visuals.npy", 128 + 46)]
)
def test_a_byte_that_changed_is_found(tmp_path, fixture_tokenizer, file, place):
    """A pixel; the frames of the first visual (the .npy header is 128 bytes); its offset, past the end of the file."""
    store = make_store(tmp_path / "store", fixture_tokenizer, count=3)
    path = store.root / "visuals" / file
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="sequence 0 is not as it was written"):
        PackedStore(store.root).read("visuals", 0)
    with pytest.raises(ValueError, match=file):
        PackedStore(store.root).verify()


def test_a_store_of_before_the_files_had_their_names_is_refused(tmp_path, fixture_tokenizer):
    manifest = make_store(tmp_path / "store", fixture_tokenizer).root / "manifest.json"
    content = json.loads(manifest.read_text())
    for name in ("clips", "clip_offsets"):
        content["domains"]["visuals"][name] = content["domains"]["visuals"].pop(name.replace("clip", "visual"))
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"visuals has clips.npy, which is visuals.npy now; make the store again"):
        PackedStore(manifest.parent)


def test_a_store_of_text_has_no_word_of_visuals(tmp_path, fixture_tokenizer):
    """So its manifest and fingerprint are what they were."""
    sequence = PackedSequence(np.arange(4, 12, dtype=np.uint32), np.array([8], np.int32))
    store = write_store(tmp_path / "s", 8, {"a": [sequence]}, fixture_tokenizer, {"a": Accounting(8)})
    (entry,) = json.loads((store.root / "manifest.json").read_text())["domains"].values()
    assert not entry.keys() & {"visuals", "visual_offsets"}
    assert "media" not in entry["shards"][0]
    assert sorted(path.name for path in (store.root / "a").iterdir()) == [
        "checks.npy", "ends.npy", "offsets.npy", "tokens-00000.bin",
    ]  # fmt: skip


def changed(**fields):
    """A sequence of one document with one visual of 2 x 1 x 2 tokens at 4, with some of it changed."""
    rng = np.random.default_rng(1)
    visual = visual_of(rng, 4, (2, 1, 2))
    mask = np.arange(16) < 12
    mask[4:8] = False
    sequence = PackedSequence(rng.integers(4, 500, 16).astype(np.uint32), np.array([12], np.int32), mask, (visual,))
    return replace(sequence, **{name: make(sequence, visual) for name, make in fields.items()})


@pytest.mark.parametrize(("fields", "message"), [
    ({"loss_mask": lambda s, c: np.ones(16, bool)}, "its placeholders would be trained"),
    ({"loss_mask": lambda s, c: None}, "its placeholders would be trained"),
    ({"ends": lambda s, c: np.array([6, 12], np.int32)}, r"takes the tokens 4 .. 7, which are not of one document"),
    ({"ends": lambda s, c: np.array([4], np.int32)}, "which are not of one document"),
    ({"visuals": lambda s, c: (c, replace(c, start=7))}, "visuals at 4 and 7, which overlap or are not in order"),
    ({"visuals": lambda s, c: (replace(c, start=-1),)}, "takes the tokens -1 .. 2, which are not of one document"),
    ({"visuals": lambda s, c: (replace(c, frames=0),)}, r"a grid of \(0, 1, 2\) tokens"),
    ({"visuals": lambda s, c: (replace(c, content=c.content[..., 0]),)}, "give it pixels, uint8"),
    ({"visuals": lambda s, c: (replace(c, content=np.zeros((3, 64), np.uint16)),)}, "or embeddings, uint16"),
])  # fmt: skip
def test_visuals_that_do_not_fit_are_refused(tmp_path, fixture_tokenizer, fields, message):
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "s", 16, {"a": [changed(**fields)]}, fixture_tokenizer, {"a": Accounting(12)})


def test_visuals_are_described_and_never_lost_on_the_way_to_mds(tmp_path, fixture_tokenizer):
    store = make_store(tmp_path / "store", fixture_tokenizer, count=3)
    lines = list(describe(store, None, 0))
    assert "  4 images and videos of 44 tokens" in lines  # 24 + 6 + 8 + 6
    assert [" ".join(line.split()) for line in lines if line.startswith("    visual ")] == [
        "visual [ 3, 27) 4 x 2 x 3 tokens, pixels 8 x 16 x 24 x 3",  # two frames and 8 x 8 pixels a token
        "visual [ 40, 46) 1 x 3 x 2 tokens, pixels 1 x 24 x 16 x 3",
        "visual [ 48, 56) 2 x 2 x 2 tokens, pixels 4 x 16 x 16 x 3",
    ]
    with pytest.raises(ValueError, match="visuals hold images or videos, which ProLong's columns have no place for"):
        to_mds(ConvertConfig(format="mds", store=str(store.root), output=str(tmp_path / "mds")))
    assert not (tmp_path / "mds").exists()
