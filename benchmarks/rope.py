"""How long a chain takes to build, and what importing ropewalk.rope costs over importing numpy.

python benchmarks/rope.py

Prints the median and the slowest of many builds at head_dim 128 (limit: 1 ms), and the medians of fresh interpreters
that import numpy, and numpy and ropewalk.rope (limit: 0.05 s more), taken in turns so that a busy machine disturbs both
alike.
"""

import statistics
import subprocess
import sys
import time

BUILDS = 300
IMPORTS = 15
CHAINS = (
    "abf(theta=1e7)",
    "abf(theta=1e7) > cope(clip=20)",
    "abf(theta=1e7) > cope(clip=auto, window=kaiser, taper_domain=frequency)",
    "abf(theta=1e7) > cope(clip=20) > yarn(factor=4, original_max_position_embeddings=65536)",
    "llama3()",
    "rope_id() > rope_id_yarn(factor=8)",
    "mrrope_pro(factor=8, original_max_position_embeddings=8192)",
    "resonance()",
)


def build_times(text: str) -> list[float]:
    """Seconds of each build: the chain from its steps, and its spectrum."""
    from ropewalk.rope import RopeChain

    steps = RopeChain.parse(text).to_list()
    inputs = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}
    times = []
    for _ in range(BUILDS):
        start = time.perf_counter()
        RopeChain(steps).spectrum(**inputs)
        times.append(time.perf_counter() - start)
    return times


def import_time(statement: str) -> float:
    """Seconds of ``statement`` in a fresh interpreter."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print both tables."""
    print(f"building a chain and its spectrum at head_dim 128, {BUILDS} times (limit 1 ms)")
    for text in CHAINS:
        times = build_times(text)
        print(f"  median {statistics.median(times) * 1e3:6.3f} ms  slowest {max(times) * 1e3:6.3f} ms  {text}")
    pairs = [(import_time("import numpy"), import_time("import numpy, ropewalk.rope")) for _ in range(IMPORTS)]
    numpy, both = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"importing, median of {IMPORTS} fresh interpreters each (limit 0.050 s more)")
    print(f"  numpy {numpy:.3f} s, with ropewalk.rope {both:.3f} s: {both - numpy:+.3f} s")


if __name__ == "__main__":
    main()
