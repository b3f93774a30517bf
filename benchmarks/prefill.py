"""Memory and time of reading one long prompt: ``python benchmarks/prefill.py MODEL_DIR TOKENS [CHUNK]``.

Reads TOKENS random tokens in chunks against a key/value cache, as evaluation does, and prints its seconds and
the peak of resident memory. CHUNK: as chunk_for says unless given; TOKENS for one pass.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from ropewalk.evaluation.prefill import Reader, chunk_for
from ropewalk.model import load_for_evaluation

GIB = 2**20  # of the KiB that getrusage counts


def main(directory: Path, tokens: int, chunk: int) -> None:
    """Read and print."""
    reader = Reader(load_for_evaluation(directory, length=tokens), chunk)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    states = reader.read(ids, 1)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{tokens} tokens in chunks of {chunk}: {seconds:.0f} s, {tokens / seconds:.0f} tokens/s, "
        f"peak resident {peak / GIB:.2f} GiB, of which {held / GIB:.2f} with the model loaded; "
        f"finite: {bool(torch.isfinite(states).all())}"
    )


if __name__ == "__main__":
    length = int(sys.argv[2])
    main(Path(sys.argv[1]), length, int(sys.argv[3]) if len(sys.argv) > 3 else chunk_for(length))
