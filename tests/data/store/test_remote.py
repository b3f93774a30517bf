"""Stores behind a URL: the same sequences, a bounded cache, and no harm from other processes or broken files."""

import hashlib
import io
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers import tiny_run

from ropewalk.config.rules import validate_train
from ropewalk.config.train import DataConfig
from ropewalk.data import PackedSequence, PackedStore
from ropewalk.data.order.mixture import Mixture
from ropewalk.data.store.cache import DownloadCache
from ropewalk.data.store.manifest import MANIFEST
from ropewalk.data.store.remote import RemoteStore, open_stores
from ropewalk.data.store.writer import Accounting, write_store
from ropewalk.training.inputs import open_data

SCRIPT = Path(__file__).parent / "read_remote.py"
SHARD = 4 * 32 * 4  # bytes of four sequences of 32 uint32 tokens


@pytest.fixture(scope="module")
def local(tmp_path_factory, fixture_tokenizer) -> PackedStore:
    """Forty sequences of 32 tokens in ten files, or fewer where tokens are stored smaller."""
    random = np.random.default_rng(0)
    rows = [random.integers(0, 512, 32).astype(np.uint32) for _ in range(40)]
    sequences = [PackedSequence(row, np.array([5 + i % 20, 32], np.int32)) for i, row in enumerate(rows)]
    root = tmp_path_factory.mktemp("remote") / "store"
    return write_store(root, 32, {"a": sequences}, fixture_tokenizer, {"a": Accounting(40 * 32)}, shard_bytes=SHARD)


def largest(store: PackedStore) -> int:
    return max(shard.bytes for shard in store.domains["a"].shards)


def same(one: PackedStore, other: PackedStore, index: int) -> bool:
    a, b = one.read("a", index), other.read("a", index)
    return np.array_equal(a.tokens, b.tokens) and np.array_equal(a.ends, b.ends)


def to_memory(store: PackedStore, name: str) -> str:
    memory = fsspec.filesystem("memory")
    for path in store.root.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/{name}/{path.relative_to(store.root)}", path.read_bytes())
    return f"memory://{name}"


def token_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.bin"))


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_remote_store_is_the_store(local, tmp_path, where):
    url = f"file://{local.root}" if where == "file" else to_memory(local, "whole")
    store = RemoteStore(url, DownloadCache(tmp_path, 2**20))
    assert token_files(tmp_path) == []  # nothing is copied before it is read
    assert store.fingerprint == local.fingerprint
    assert all(same(store, local, index) for index in range(40))
    assert len(token_files(tmp_path)) == len(local.domains["a"].shards)
    assert store.trained_tokens("a", 3) == local.trained_tokens("a", 3)
    assert sorted(path.name for path in store.tokenizer_path.iterdir()) == sorted(
        path.name for path in local.tokenizer_path.iterdir()
    )
    store.verify()
    with pytest.raises(IndexError, match=r"sequence 40 is outside 0 \.\. 39"):
        store.read("a", 40)
    with pytest.raises(ValueError, match="no domain 'b'"):
        store.read("b", 0)


def test_what_is_cached_is_not_copied_again(local, tmp_path):
    url = to_memory(local, "once")
    RemoteStore(url, DownloadCache(tmp_path, 2**20)).verify()
    fsspec.filesystem("memory").rm("/once/a", recursive=True)
    again = RemoteStore(url, DownloadCache(tmp_path, 2**20))
    assert all(same(again, local, index) for index in range(40))


def test_the_cache_stays_within_its_bound_and_keeps_what_was_used_last(local, tmp_path):
    bound = 2 * largest(local)
    store = RemoteStore(f"file://{local.root}", DownloadCache(tmp_path, bound))
    shards = [Path(shard.file).name for shard in local.domains["a"].shards]
    per_shard = local.domains["a"].shards[0].sequences
    for number in (0, 1, 0, 2):
        assert same(store, local, number * per_shard)
        assert sum(path.stat().st_size for path in token_files(tmp_path)) <= bound
    assert [path.name for path in token_files(tmp_path)] == [shards[0], shards[2]]
    store.verify()  # all of them, two at a time


def test_a_deleted_files_space_is_let_go(local, tmp_path):
    """A map would hold the blocks of a deleted file: none is left once another was copied."""
    store = RemoteStore(f"file://{local.root}", DownloadCache(tmp_path, largest(local)))
    per_shard = local.domains["a"].shards[0].sequences
    for number in range(3):
        store.read("a", number * per_shard)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert not [line for line in maps if "tokens" in line and line.endswith("(deleted)")]


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_a_damaged_file_is_refused_and_not_kept(local, tmp_path, damage):
    url = to_memory(local, damage)
    shard = local.domains["a"].shards[1]
    data = bytearray((local.root / shard.file).read_bytes())
    if damage == "flip":
        data[77] ^= 1
    data = {"flip": data, "cut": data[:-1], "grow": data + b"\0"}[damage]
    fsspec.filesystem("memory").pipe_file(f"/{damage}/{shard.file}", bytes(data))
    store = RemoteStore(url, DownloadCache(tmp_path, 2**20))
    assert same(store, local, 0)
    reason = {"flip": "has SHA-256", "cut": f"has {shard.bytes - 1} bytes", "grow": "has more bytes"}[damage]
    with pytest.raises(ValueError, match=f"{shard.file} {reason}"):
        store.read("a", shard.sequences)
    assert [path.name for path in tmp_path.rglob("tokens*")] == [Path(local.domains["a"].shards[0].file).name]


def test_a_file_spoilt_in_the_cache_is_found_by_verify(local, tmp_path):
    store = RemoteStore(f"file://{local.root}", DownloadCache(tmp_path, 2**20))
    store.read("a", 0)
    path = token_files(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="was corrupt"):
        store.verify()
    fresh = RemoteStore(f"file://{local.root}", DownloadCache(tmp_path, 2**20))
    assert same(fresh, local, 0)


def test_what_is_no_store_is_refused(local, tmp_path):
    cache = DownloadCache(tmp_path / "cache", 2**20)
    with pytest.raises(ValueError, match=r"nowhere is not a packed store: it has no manifest.json"):
        RemoteStore(f"file://{tmp_path}/nowhere", cache)
    with pytest.raises(ValueError, match=r"nope://x cannot be read: .*; use s3://"):
        RemoteStore("nope://x", cache)
    url = to_memory(local, "altered")
    memory = fsspec.filesystem("memory")
    manifest = json.loads(memory.cat_file(f"/altered/{MANIFEST}"))
    manifest["domains"]["a"]["documents"] += 1
    memory.pipe_file(f"/altered/{MANIFEST}", json.dumps(manifest).encode())
    with pytest.raises(ValueError, match="was altered"):
        RemoteStore(url, cache)
    url = to_memory(local, "foreign")
    memory.pipe_file("/foreign/tokenizer/tokenizer.json", b"{}")
    with pytest.raises(ValueError, match="is not the tokenizer that its manifest names"):
        RemoteStore(url, cache)


def test_a_cache_smaller_than_a_file_is_refused(local, tmp_path):
    store = RemoteStore(f"file://{local.root}", DownloadCache(tmp_path, largest(local) - 1))
    with pytest.raises(ValueError, match=r"may hold \d+; raise data.cache_gib"):
        store.read("a", 0)


def test_two_processes_share_a_cache_that_holds_a_fraction(local, tmp_path):
    """Each reads all in an order of its own while the other deletes; a third is killed among them."""
    bound = 3 * largest(local)
    base = [sys.executable, str(SCRIPT), f"file://{local.root}", str(tmp_path), str(bound)]
    started = [
        subprocess.Popen([*base, str(seed), str(local.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    while not token_files(tmp_path) and started[2].poll() is None:
        time.sleep(0.002)
    started[2].send_signal(signal.SIGKILL)
    for process in started[:2]:
        out, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        # a look at the files is not one moment: a file deleted and its successor may both be seen
        assert int(out) <= bound + 2 * largest(local)
    started[2].communicate()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin*")) <= bound


def test_one_download_serves_two_that_want_it(tmp_path):
    """The second, a cache of its own as another process has, finds the lock held, waits, and finds the file."""
    content = b"x" * 1000
    digest = hashlib.sha256(content).hexdigest()
    begun, opened = threading.Event(), []

    def fetch() -> bool:
        return DownloadCache(tmp_path, 2000).fetch("s/d/f.bin", 1000, digest, "there", slowly)

    def slowly():
        opened.append(1)
        begun.set()
        time.sleep(0.05)
        return io.BytesIO(content)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetch)
        assert begun.wait(10)
        second = pool.submit(fetch)
        assert [first.result(10), second.result(10)] == [True, False]
    assert len(opened) == 1


def test_an_abandoned_download_gives_its_room_back(tmp_path):
    cache = DownloadCache(tmp_path, 1000)
    (tmp_path / "s/d").mkdir(parents=True)
    (tmp_path / "s/d/old.bin.partial").write_bytes(b"x" * 900)
    content = b"y" * 800
    digest = hashlib.sha256(content).hexdigest()
    assert cache.fetch("s/d/new.bin", 800, digest, "there", lambda: io.BytesIO(content))
    assert [path.name for path in (tmp_path / "s/d").iterdir()] == ["new.bin"]
    (tmp_path / "s/d/new.bin.partial").write_bytes(b"x" * 900)  # of the very file that is wanted
    (tmp_path / "s/d/new.bin").unlink()
    assert cache.fetch("s/d/new.bin", 800, digest, "there", lambda: io.BytesIO(content))


class TestConfiguration:
    def test_a_run_reads_a_remote_store_and_more_stores(self, store_64, store_256, tmp_path):
        data = DataConfig(
            store=f"file://{store_256.root}",
            sequence_length=256,
            mixture={"long": 0.5, "rows/short": 0.5},
            stores={"rows": str(store_64.root)},
            curriculum={10: {"long": 1.0}},
            length_weights={0: 1.0, 200: 3.0},
            verify=True,
            cache_dir=str(tmp_path),
            cache_gib=1.0,
        )
        config = tiny_run(store_256, tmp_path / "run")
        config.data = data
        validate_train(config, 1)
        store, mixture = open_data(config)
        plain = Mixture(
            config.trainer.seed, data.mixture, {"": store_256, "rows": store_64}, config.trainer.global_batch_size,
            curriculum=data.curriculum, length_weights=data.length_weights,
        )  # fmt: skip
        assert store.fingerprint == store_256.fingerprint
        assert mixture.contract() == plain.contract()
        assert mixture.global_batch(3) == plain.global_batch(3)
        assert {len(ref.rows) for step in range(9) for ref in mixture.global_batch(step)} == {1, 4}

    def test_a_url_needs_a_place_to_copy_to(self, store_64, tmp_path):
        config = tiny_run(store_64, tmp_path)
        config.data.store = "s3://bucket/store"
        with pytest.raises(ValueError, match=r"data.store=s3://bucket/store is a URL and data.cache_dir is null; set"):
            validate_train(config, 1)

    @pytest.mark.parametrize(("changes", "message"), [
        ({"stores": {"x/y": "."}}, r"data.stores has the names \['x/y'\]"),
        ({"cache_gib": 0.0}, r"data.cache_gib=0\.0 must be positive"),
    ])  # fmt: skip
    def test_bad_settings_are_refused(self, store_64, tmp_path, changes, message):
        config = tiny_run(store_64, tmp_path)
        for name, value in changes.items():
            setattr(config.data, name, value)
        with pytest.raises(ValueError, match=message):
            validate_train(config, 1)

    def test_a_store_that_is_not_there_is_refused(self, store_64):
        config = DataConfig(store=str(store_64.root), sequence_length=64, stores={"x": "nowhere"})
        with pytest.raises(ValueError, match=r"data\.stores\.x=nowhere is not a directory"):
            open_stores(config)

    def test_the_main_store_has_the_training_length(self, store_64):
        config = DataConfig(store=str(store_64.root), sequence_length=128)
        with pytest.raises(ValueError, match=r"data.sequence_length=128, but .* holds sequences of 64"):
            open_stores(config)
