"""Reading and collating sequences of 65,536 tokens from page cache, on one core.

python benchmarks/batches.py [--sequences 800]

Random tokens in sequences of 20 documents, of a vocabulary of 128,256 (32 bits on disk) and of 32,000 (16 bits). The
same random order is read several times over; printed are medians, in Mtok/s, of

    copy      the bytes of mapped rows copied into one array: what nothing that hands out tokens can beat
    read      PackedStore.read: tokens and boundaries (goal: 300)
    collated  read_batch, one sequence to a batch: ids, positions and labels as int64 tensors, boundaries (goal: 50)
    order     tokens whose place Mixture.global_batch names, 64 sequences a step: the cost of the order itself
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ropewalk.data import Mixture, PackedSequence, PackedStore, SequenceRef
from ropewalk.data.order.batches import read_batch
from ropewalk.data.store.writer import Accounting, write_store

LENGTH = 65536
ROUNDS = 7


def make_store(root: Path, sequences: int, vocabulary: int) -> PackedStore:
    """A store of random sequences with a tokenizer of that many words."""
    tokenizer = root / "words"
    tokenizer.mkdir(parents=True)
    Tokenizer(WordLevel({str(i): i for i in range(vocabulary)}, "0")).save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({}))
    random = np.random.default_rng(0)

    def rows() -> PackedSequence:
        cuts = np.sort(random.choice(np.arange(1, LENGTH), 19, replace=False))
        tokens = random.integers(0, vocabulary, LENGTH, dtype=np.uint32)
        return PackedSequence(tokens, np.append(cuts, LENGTH).astype(np.int32))

    accounting = {"a": Accounting(sequences * LENGTH)}
    return write_store(root / "store", LENGTH, {"a": (rows() for _ in range(sequences))}, tokenizer, accounting)


def exhaust(items: Iterable[object]) -> None:
    """Make every item and keep none."""
    deque(items, maxlen=0)


def rate(work: Callable[[], object], tokens: int) -> float:
    """Median Mtok/s, after one round that warms the cache."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return tokens / statistics.median(seconds) / 1e6


def measure(store: PackedStore, sequences: int) -> list[float]:
    """The four rates."""
    order = np.random.default_rng(1).permutation(sequences).tolist()
    shard = store.domains["a"].shards[0]
    dtype = np.dtype(f"<u{shard.bytes // shard.sequences // LENGTH}")
    mapped = np.memmap(store.root / shard.file, dtype, mode="r", shape=(shard.sequences, LENGTH))
    room = np.empty(LENGTH, dtype)
    mixture, steps = Mixture(0, {}, store, 64), 100

    def copied() -> None:
        for index in order:
            np.copyto(room, mapped[index % shard.sequences])

    return [
        rate(copied, sequences * LENGTH),
        rate(lambda: exhaust(store.read("a", index) for index in order), sequences * LENGTH),
        rate(lambda: exhaust(read_batch(store, [SequenceRef("a", (i,))]) for i in order), sequences * LENGTH),
        rate(lambda: exhaust(mixture.global_batch(step) for step in range(steps)), steps * 64 * LENGTH),
    ]


def main() -> None:
    """Write two stores, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=800)
    sequences = parser.parse_args().sequences
    torch.set_num_threads(1)
    print(f"{'on disk':<10}{'copy':>10}{'read':>10}{'collated':>10}{'order':>12}   Mtok/s")
    for bits, vocabulary in ((32, 128_256), (16, 32_000)):
        with tempfile.TemporaryDirectory() as scratch:
            rates = measure(make_store(Path(scratch), sequences, vocabulary), sequences)
        print(f"{bits:>2} bits   {rates[0]:>10,.0f}{rates[1]:>10,.0f}{rates[2]:>10,.0f}{rates[3]:>12,.0f}")


if __name__ == "__main__":
    main()
