"""Memory of reading one long prompt: ``python benchmarks/prefill.py MODEL_DIR TOKENS [--last]``.

Reads TOKENS random tokens in chunks against a key/value cache, as evaluation does, and prints the peak of resident
memory after each chunk. ``--last`` fills the cache with zeros and reads the last chunk alone: the one that takes the
most memory, in a fraction of the time.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from ropewalk.evaluation.model_reader import ModelReader, chunk_for
from ropewalk.model.load import load_for_evaluation

GIB = 2**20  # of the KiB that getrusage counts


def peak() -> float:
    """Peak resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB


def main(directory: Path, tokens: int, last_alone: bool) -> None:
    """Read and print."""
    reader = ModelReader(load_for_evaluation(directory, length=tokens))
    held, chunk, cache = peak(), chunk_for(tokens), reader.new_cache()
    ids = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(0))
    if last_alone:
        config, before = reader.model.config, tokens - chunk
        shape = (1, config.num_key_value_heads, before, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(torch.zeros(shape), torch.zeros(shape), layer)
        ids = ids[before:]
    reader.chunk, started = chunk, time.perf_counter()
    for piece in ids.split(chunk):
        states = reader.read(piece, 1, cache)
        seconds = time.perf_counter() - started
        print(f"{cache.get_seq_length():,} tokens in {seconds:.0f} s, peak resident {peak():.2f} GiB", flush=True)
    print(
        f"{tokens} tokens in chunks of {chunk}{', the last alone' if last_alone else ''}: peak resident {peak():.2f} "
        f"GiB, {held:.2f} of it with the model loaded; {cache.get_seq_length()} tokens in the cache, states finite: "
        f"{bool(torch.isfinite(states).all())}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--last" in sys.argv)
