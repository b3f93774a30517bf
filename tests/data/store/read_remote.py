"""Run by test_remote.py in processes of their own: read every sequence of a store behind a URL, several times over.

read_remote.py URL CACHE_DIRECTORY CACHE_BYTES SEED LOCAL_STORE
"""

import sys
from pathlib import Path

import numpy as np

from ropewalk.data import PackedStore
from ropewalk.data.store.cache import DownloadCache
from ropewalk.data.store.remote import RemoteStore


def main(url: str, directory: str, size: str, seed: str, local: str) -> None:
    """Compare each sequence with the store's own; print how much the token files in the cache took at most."""
    store, truth = RemoteStore(url, DownloadCache(directory, int(size))), PackedStore(local)
    random, most = np.random.default_rng(int(seed)), 0
    for _ in range(6):
        for index in random.permutation(truth.domains["a"].sequences).tolist():
            expected, found = truth.read("a", index), store.read("a", index)
            assert np.array_equal(found.tokens, expected.tokens), index
            assert np.array_equal(found.ends, expected.ends), index
            held = 0
            for path in Path(directory).rglob("*.bin*"):
                try:
                    held += path.stat().st_size
                except FileNotFoundError:  # deleted by the other process
                    continue
            most = max(most, held)
    print(most, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
