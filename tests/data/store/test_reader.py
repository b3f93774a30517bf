import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ropewalk.data import PackedSequence, PackedStore
from ropewalk.data.store.writer import Accounting, write_store


def sequence(tokens: list[int], ends: list[int]) -> PackedSequence:
    return PackedSequence(np.array(tokens, dtype=np.uint32), np.array(ends, dtype=np.int32))


LONG = [sequence([3, 4, 5, 6], [4]), sequence([7, 8, 9, 10], [4]), sequence([11, 12, 13, 14], [4])]
SHORT = [sequence([1, 2, 3, 0], [1, 3]), sequence([5, 6, 7, 8], [2, 4])]
ACCOUNTS = {"long": Accounting(13, moved={"short": 1}), "short": Accounting(9, dropped={"too short": 2})}


@pytest.fixture
def root(tmp_path: Path, fixture_tokenizer: Path) -> Path:
    """A store of five sequences of four tokens, two sequences to a shard."""
    root = tmp_path / "store"
    write_store(root, 4, {"long": LONG, "short": SHORT}, fixture_tokenizer, ACCOUNTS, shard_bytes=16)
    return root


def test_what_is_written_is_read(root):
    store = PackedStore(root)
    for domain, sequences in {"long": LONG, "short": SHORT}.items():
        for index, expected in enumerate(sequences):
            read = store.read(domain, index)
            np.testing.assert_array_equal(read.tokens, expected.tokens)
            np.testing.assert_array_equal(read.ends, expected.ends)
            assert (read.tokens.dtype, read.ends.dtype) == (np.uint32, np.int32)
    store.verify()


def test_manifest_by_hand(root, fixture_tokenizer):
    store = PackedStore(root)
    long, short = store.domains["long"], store.domains["short"]
    counted = [(d.sequences, d.documents, d.tokens, d.trained_tokens, d.padding) for d in (long, short)]
    assert counted == [(3, 3, 12, 9, 0), (2, 4, 7, 3, 1)]
    assert [(shard.file, shard.sequences, shard.bytes) for shard in long.shards] == [
        ("long/tokens-00000.bin", 2, 16),
        ("long/tokens-00001.bin", 1, 8),
    ]
    data = np.arange(3, 11, dtype="<u2").tobytes()  # 512 entries fit in 16 bits
    assert (root / "long/tokens-00000.bin").read_bytes() == data
    assert long.shards[0].sha256 == hashlib.sha256(data).hexdigest()
    assert np.load(root / "short/offsets.npy").tolist() == [0, 2, 4]
    assert np.load(root / "short/ends.npy").tolist() == [1, 3, 2, 4]
    assert store.sequence_length == 4
    assert (store.tokenizer["vocab_size"], store.tokenizer["bos_id"], store.tokenizer["eos_id"]) == (
        512,
        0,
        1,
    )
    assert store.accounting["long"] == {"tokens_in": 13, "moved": {"short": 1}, "dropped": {}}
    for file in fixture_tokenizer.iterdir():
        assert (store.tokenizer_path / file.name).read_bytes() == file.read_bytes()


def test_fingerprint_is_the_sha256_of_the_canonical_content(root):
    content = json.loads((root / "manifest.json").read_text())
    fingerprint = content.pop("fingerprint")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert PackedStore(root).fingerprint == fingerprint == hashlib.sha256(canonical.encode()).hexdigest()


def test_fingerprint_follows_the_tokens(tmp_path, fixture_tokenizer):
    account = {"a": Accounting(4)}
    one = write_store(tmp_path / "1", 4, {"a": LONG[:1]}, fixture_tokenizer, account)
    same = write_store(tmp_path / "2", 4, {"a": LONG[:1]}, fixture_tokenizer, account)
    other = write_store(tmp_path / "3", 4, {"a": LONG[1:2]}, fixture_tokenizer, account)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_trained_tokens_skip_the_first_of_each_piece(root):
    store = PackedStore(root)
    assert [store.trained_tokens("long", i) for i in range(3)] == [3, 3, 3]
    assert [store.trained_tokens("short", i) for i in range(2)] == [1, 2]


def test_trained_tokens_read_no_token(root):
    store = PackedStore(root)
    for shard in root.glob("*/tokens-*.bin"):
        shard.unlink()
    assert store.trained_tokens("short", 1) == 2


MASK = np.array([False, True, False, True])
MASKED = [replace(LONG[0], loss_mask=MASK), replace(SHORT[0], loss_mask=MASK), replace(SHORT[1], loss_mask=~MASK)]


@pytest.fixture
def masked(tmp_path, fixture_tokenizer):
    """A domain with loss masks beside one without."""
    accounts = {"chat": Accounting(11), "long": Accounting(12)}
    return write_store(tmp_path / "m", 4, {"chat": MASKED, "long": LONG}, fixture_tokenizer, accounts, shard_bytes=16)


def test_loss_masks_are_kept_and_counted(masked):
    masked.verify()
    for index, expected in enumerate(MASKED):
        read = masked.read("chat", index)
        assert read.loss_mask.dtype == np.bool_
        assert read.loss_mask.tolist() == expected.loss_mask.tolist()
        assert read.tokens.tolist() == expected.tokens.tolist()
    # [3* 4 5* 6]: 4 and 6; [1* | 2 3*]: token 2 begins a piece; [5 6* | 7 8*]: both are masked, or begin a piece.
    assert [masked.trained_tokens("chat", i) for i in range(3)] == [2, 0, 0]
    assert [masked.read("chat", i).trained_tokens for i in range(3)] == [2, 0, 0]
    assert masked.domains["chat"].trained_tokens == 2
    assert (masked.has_loss_masks("chat"), masked.has_loss_masks("long")) == (True, False)
    assert masked.read("long", 0).loss_mask is None
    assert (masked.root / "chat/mask-00000.bin").read_bytes() == bytes([0b01010000, 0b01010000])


def test_verify_and_opening_see_damaged_masks(masked):
    path = masked.root / "chat/mask-00001.bin"
    path.write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"chat/mask-00001.bin is corrupt"):
        PackedStore(masked.root).verify()
    path.unlink()
    with pytest.raises(ValueError, match=r"mask-00001.bin is missing"):
        PackedStore(masked.root)


@pytest.mark.parametrize(("sequences", "shard_bytes", "message"), [
    ([MASKED[0], LONG[0]], 16, "sequence 1 of a/tokens-00000.bin and the first one do not both have a loss mask"),
    ([LONG[0], MASKED[0]], 16, "do not both have a loss mask; give it to all or none"),
    ([LONG[0], MASKED[0]], 8, "some sequences of a have loss masks, some have none; make two domains"),
    ([replace(LONG[0], loss_mask=MASK[:3])], 16, r"loss mask of bool \(3,\); give it bool \(4,\)"),
    ([replace(LONG[0], loss_mask=MASK.astype(np.uint8))], 16, "loss mask of uint8"),
])  # fmt: skip
def test_masks_that_do_not_fit_are_refused(tmp_path, fixture_tokenizer, sequences, shard_bytes, message):
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "s", 4, {"a": sequences}, fixture_tokenizer, {"a": Accounting(8)},
                    shard_bytes=shard_bytes)  # fmt: skip


def test_stores_of_version_1_are_read(root):
    """As this package wrote them first: 32-bit tokens, and a manifest without the keys of version 2."""
    content = json.loads((root / "manifest.json").read_text())
    for key in ("fingerprint", "token_dtype"):
        del content[key]
    content["version"] = 1
    for domain in content["domains"].values():
        del domain["checks"]
        for shard in domain["shards"]:
            assert shard.keys() == {"file", "bytes", "sha256", "sequences"}
            data = np.fromfile(root / shard["file"], "<u2").astype("<u4").tobytes()
            (root / shard["file"]).write_bytes(data)
            shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    content["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(content))
    store = PackedStore(root)
    store.verify()
    assert store.read("long", 2).tokens.tolist() == [11, 12, 13, 14]
    assert store.sources is None


def test_larger_vocabularies_take_32_bits(tmp_path, fixture_tokenizer):
    from ropewalk.data.store.manifest import token_dtype
    from ropewalk.data.store.writer import PartWriter

    assert [token_dtype(size).str for size in (512, 65536, 65537, 128256)] == ["<u2", "<u2", "<u4", "<u4"]
    part = PartWriter(tmp_path, "a", 4, 65537).write(0, [sequence([1, 2, 3, 65536], [4])])
    assert (tmp_path / part.shard.file).read_bytes() == np.array([1, 2, 3, 65536], "<u4").tobytes()


def test_what_does_not_exist_is_named(root):
    store = PackedStore(root)
    with pytest.raises(ValueError, match="has no domain 'medium'; it has: long, short"):
        store.read("medium", 0)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"sequence {index} is outside 0 \.\. 2"):
            store.read("long", index)


def test_an_unfinished_store_is_no_store_and_is_written_again(tmp_path, fixture_tokenizer):
    def killed():
        yield LONG[0]
        raise KeyboardInterrupt

    root = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        write_store(root, 4, {"long": LONG, "short": killed()}, fixture_tokenizer, ACCOUNTS, shard_bytes=8)
    assert not (root / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"has no manifest.json, so its writing never finished"):
        PackedStore(root)
    write_store(root, 4, {"long": LONG, "short": SHORT}, fixture_tokenizer, ACCOUNTS).verify()
    assert not (root / "long/tokens-00001.bin").exists()


def test_directories_that_are_no_store_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a packed store: no such directory; make one with"):
        PackedStore(tmp_path / "missing")
    (tmp_path / "manifest.json").write_text('{"format": "ropewalk-checkpoint"}')
    with pytest.raises(ValueError, match="is not the manifest of a packed store"):
        PackedStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "ropewalk-pac')
    with pytest.raises(ValueError, match="is torn"):
        PackedStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "ropewalk-packed", "version": 1}')
    with pytest.raises(ValueError, match="lacks or mistypes 'domains'"):
        PackedStore(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is torn"):
        PackedStore(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=3), "has version 3, this code reads 1 and 2"),
        (
            lambda content: content.update(sequence_length=8),
            "was altered: its fingerprint is not that of its content",
        ),
        (lambda content: content.update(domains=[]), "lacks or mistypes 'list' object has no attribute 'items'"),
    ],
)
def test_altered_manifests_are_refused(root, change, message):
    content = json.loads((root / "manifest.json").read_text())
    change(content)
    (root / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        PackedStore(root)


@pytest.mark.parametrize("file", ["../outside.bin", "/etc/hostname", "long/../../outside.bin"])
def test_paths_are_not_followed_outside(root, file):
    content = json.loads((root / "manifest.json").read_text())
    del content["fingerprint"]
    content["domains"]["long"]["shards"][0]["file"] = file
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    content["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a path in the store"):
        PackedStore(root)


def test_links_are_not_followed_outside(root):
    shard = root / "long/tokens-00000.bin"
    shutil.move(shard, root.parent / "elsewhere.bin")
    shard.symlink_to(root.parent / "elsewhere.bin")
    with pytest.raises(ValueError, match="leads out of"):
        PackedStore(root)


def test_missing_and_short_files_are_named_at_opening(root):
    shard = root / "long/tokens-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tokens-00001.bin has 4 bytes, its manifest says 8"):
        PackedStore(root)
    shard.unlink()
    with pytest.raises(ValueError, match=r"tokens-00001.bin is missing, its manifest says 8"):
        PackedStore(root)


@pytest.mark.parametrize("file", ["long/tokens-00001.bin", "short/ends.npy", "short/offsets.npy"])
def test_verify_names_the_corrupt_file(root, file):
    data = bytearray((root / file).read_bytes())
    data[0 if file.endswith(".bin") else -1] ^= 1
    (root / file).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file} is corrupt"):
        PackedStore(root).verify()


def test_verify_sees_another_tokenizer(root):
    with (root / "tokenizer/tokenizer_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="is not the tokenizer of this store"):
        PackedStore(root).verify()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (sequence([1, 2, 3], [3]), r"sequence 0 of a/tokens-00000.bin has the shape \(3,\); give it \(4,\)"),
        (sequence([1, 2, 3, 4], []), "must increase from 1 to at most 4"),
        (sequence([1, 2, 3, 4], [0, 4]), "must increase from 1 to at most 4"),
        (sequence([1, 2, 3, 4], [3, 3]), "must increase from 1 to at most 4"),
        (sequence([1, 2, 3, 4], [5]), "must increase from 1 to at most 4"),
        (sequence([1, 2, 512, 4], [4]), "has token 512, the tokenizer has 512"),
        (sequence([1, 2, 3, 4], [3]), "4 tokens came into a, but 3 were packed, 0 moved and 0 dropped"),
    ],
)
def test_bad_sequences_are_refused(tmp_path, fixture_tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "s", 4, {"a": [bad]}, fixture_tokenizer, {"a": Accounting(4)})
    assert not (tmp_path / "s/manifest.json").exists()


def test_bad_stores_are_refused(root, tmp_path, fixture_tokenizer):
    with pytest.raises(ValueError, match="is a packed store already"):
        write_store(root, 4, {"long": LONG}, fixture_tokenizer, {"long": Accounting(12)})
    with pytest.raises(ValueError, match=r"would hold no sequence of 4 tokens"):
        write_store(tmp_path / "s", 4, {"a": []}, fixture_tokenizer, {"a": Accounting(0)})
    with pytest.raises(ValueError, match=r"domain name '\.\./a' cannot be used"):
        write_store(tmp_path / "s", 4, {"../a": LONG}, fixture_tokenizer, {"../a": Accounting(12)})
    with pytest.raises(ValueError, match=r"accounting is of \[\], the domains are \['a'\]"):
        write_store(tmp_path / "s", 4, {"a": LONG}, fixture_tokenizer, {})
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        write_store(tmp_path / "s", 4, {"a": LONG}, tmp_path, {"a": Accounting(12)})


def test_importing_the_package_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, ropewalk.data; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
