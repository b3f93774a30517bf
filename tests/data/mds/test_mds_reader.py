"""The MDS reader against what MosaicML's own reader gave back, and against files that are not as they should be."""

import json
import pickle
import shutil
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from ropewalk.data import open_mds
from ropewalk.data.mds.mds_columns import column_decoder

FIXTURES = Path(__file__).parents[2] / "fixtures" / "mds"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


def plain(value):
    """As make.py writes it: see there."""
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.name, "shape": list(value.shape), "hex": value.tobytes().hex()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(plain, value)]
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, np.generic):
        return {"dtype": value.dtype.name, "hex": value.tobytes().hex()}
    return repr(value)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "pickled"])
def test_every_value_is_what_the_official_reader_gives(name):
    dataset = open_mds(FIXTURES / name)
    assert len(dataset) == len(EXPECTED[name])
    for sample, expected in zip(dataset, EXPECTED[name], strict=True):
        assert {column: plain(value) for column, value in sample.items()} == expected
    for index in (3, 0, len(dataset) - 1, -2):  # at random
        assert {column: plain(value) for column, value in dataset[index].items()} == EXPECTED[name][index]


def test_pickled_integers_are_read_without_running_anything():
    dataset = open_mds(FIXTURES / "pickled")
    for sample, expected in zip(dataset, EXPECTED["pickled"], strict=True):
        assert plain(sample["input_ids"]) == expected["input_ids"]
        assert plain(sample["mask"]) == expected["mask"]
        ours, theirs = sample["indices"], expected["indices"]
        if not isinstance(ours, list) or not isinstance(ours[0], list):
            assert plain(ours) == theirs
        else:  # a numpy integer inside a list comes out as an int
            assert ours == [[0, 30], [30, 64]]


def test_it_is_a_sequence():
    dataset = open_mds(FIXTURES / "nested")
    assert len(dataset) == 14
    assert len(dataset.shards) > 2
    assert dataset.columns["input_ids"] == "ndarray:uint32"
    assert [sample["domain"] for sample in dataset[5:9]] == ["book", "arxiv", "arxiv", "book"]
    with pytest.raises(IndexError, match=r"sample 14 is outside 0 \.\. 13"):
        dataset[14]
    assert not dataset[0]["input_ids"].flags.writeable


def test_only_some_decompressed_shards_stay_in_memory():
    dataset = open_mds(FIXTURES / "zstd", decompressed_shards=1)
    assert len(dataset.shards) > 1
    for sample, expected in zip(dataset, EXPECTED["zstd"], strict=True):
        assert plain(sample["input_ids"]) == expected["input_ids"]
    assert len(dataset._open) == 1
    assert plain(dataset[0]["input_ids"]) == EXPECTED["zstd"][0]["input_ids"]


@pytest.fixture
def copied(tmp_path):
    def copy(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


def edit(directory, change):
    content = json.loads((directory / "index.json").read_text())
    change(content["shards"][0])
    (directory / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("name", "algorithm"), [("scalars", "sha1"), ("arrays", "blake2b"), ("gz", "sha1")])
def test_a_flipped_bit_is_seen_where_there_is_a_digest(copied, name, algorithm):
    directory = copied(name)
    file = next(iter(sorted(directory.glob("shard.00000.mds*"))))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"is corrupt: its {algorithm} is not the one in index\.json"):
        open_mds(directory)[0]
    if name != "gz":
        open_mds(directory, verify=False)[0]


def test_the_second_algorithm_is_checked_too(copied):
    directory = copied("scalars")
    edit(directory, lambda shard: shard["raw_data"]["hashes"].update(xxh64="0" * 16))
    with pytest.raises(ValueError, match="its xxh64 is not the one"):
        open_mds(directory)[0]


@pytest.mark.parametrize("name", ["zstd", "gz", "br", "snappy", "bz2"])
def test_what_cannot_be_decompressed_is_named(copied, name):
    directory = copied(name)
    file = next(iter(sorted(directory.glob("shard.00000.mds.*"))))
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(ValueError, match=rf"is corrupt: it is no {name}|has \d+ bytes"):
        open_mds(directory, verify=False)[0]


def test_a_torn_or_missing_shard_is_named(copied):
    directory = copied("prolong")
    file = directory / "shard.00000.mds"
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    with pytest.raises(ValueError, match=rf"has {len(data) - 4} bytes, its index\.json says {len(data)}"):
        open_mds(directory)[0]
    file.write_bytes(data[:8] + bytes(4) + data[12:])
    with pytest.raises(ValueError, match="is torn: its sample offsets"):
        open_mds(directory)[0]
    file.unlink()
    with pytest.raises(ValueError, match=r"shard\.00000\.mds is missing"):
        open_mds(directory)[0]


@pytest.mark.parametrize(("change", "message"), [
    (lambda shard: shard.update(version=1), "version 1; mds version 2 is read"),
    (lambda shard: shard.update(format="json"), "format 'json'"),
    (lambda shard: shard.update(samples=6), r"holds 7 samples, its index\.json says 6"),
    (lambda shard: shard["raw_data"].update(basename="../../prolong/shard.00000.mds"), "leads out of"),
    (lambda shard: shard.pop("raw_data"), "is torn or no MDS index"),
    (lambda shard: shard["column_encodings"].__setitem__(0, "jpeg"), "'jpeg' is not read here; known: bytes, str"),
    (lambda shard: shard["column_encodings"].__setitem__(0, "ndarray:complex64"), r"not ndarray\[:dtype\[:shape\]\]"),
])  # fmt: skip
def test_an_index_that_promises_otherwise_is_refused(copied, change, message):
    directory = copied("prolong")
    edit(directory, change)
    with pytest.raises(ValueError, match=message):
        open_mds(directory)[0]


def test_a_directory_without_an_index_names_those_below(tmp_path):
    with pytest.raises(ValueError, match=r"has no index\.json.*name the directory that holds it"):
        open_mds(tmp_path)
    shutil.copytree(FIXTURES / "prolong", tmp_path / "book-65536")
    with pytest.raises(ValueError, match=r"open one of: book-65536"):
        open_mds(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is torn or no MDS index"):
        open_mds(tmp_path)


class Harmful:
    def __reduce__(self):
        return (print, ("this would have run",))


@pytest.mark.parametrize(("value", "message"), [
    (Harmful(), r"names (__builtin__|builtins)\.print; only lists, tuples, ints and numpy integer arrays"),
    (Decimal(1), r"names decimal\.Decimal"),
    ({"a": 1}, "holds a dict"), (1.5, "holds a float"), ("text", "holds a str"), ([1, [2, None]], "holds a NoneType"),
    (np.array([1.5]), "dtype 'f8'"), (np.array([Harmful()], dtype=object), "dtype 'O8'"),
    (np.zeros(2, dtype=[("a", "i4")]), r"dtype 'V4'"), (np.array(["x"]), "dtype 'U1'"),
])  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_pickles_are_refused_by_name(value, message, protocol, capsys):
    with pytest.raises(ValueError, match=message):
        column_decoder("pkl")(memoryview(pickle.dumps(value, protocol)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [
    np.arange(6, dtype=np.uint8).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array([1, 2], ">i4"),
    np.arange(3, dtype=np.uint64),
])  # fmt: skip
def test_integer_arrays_of_every_protocol_are_read(value, protocol):
    found = column_decoder("pkl")(memoryview(pickle.dumps(value, protocol)))
    np.testing.assert_array_equal(found, value)
    assert found.dtype == pickle.loads(pickle.dumps(value, protocol)).dtype


def test_an_array_with_the_wrong_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="8 bytes of values are not the"):
        column_decoder("ndarray:uint32:3")(memoryview(bytes(8)))
