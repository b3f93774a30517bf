"""Random reads of 65,536-token sequences: ropewalk's MDS reader against MosaicML's own, on the same files.

python benchmarks/mds.py [--python OTHER_PYTHON] [--sequences 600]

The official package cannot be installed beside transformers 5, so it gets an environment of its own (made here with
pip, or named with --python). It writes the files; then both read the same random order in turns, several times, from
page cache. Printed, as the median of both: the rate of samples alone (the official reader has then copied the bytes,
ours has mapped them), and of samples whose tokens are also copied into a batch, which is what training does with them;
and their ratios (goal: at least 4 for samples). Nothing is faster than the copy itself, so its rate is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTH = 65536
ROUNDS = 5
OFFICIAL = "mosaicml-streaming==0.13.0"

WRITE = f"""
import sys, numpy as np
from streaming import MDSWriter
columns = {{"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "length": "int", "domain": "str"}}
random = np.random.default_rng(0)
with MDSWriter(out=sys.argv[1], columns=columns, hashes=["sha1"], size_limit=2**26) as writer:
    for i in range(int(sys.argv[2])):
        cuts = np.sort(random.choice(np.arange(1, {LENGTH}), 20, replace=False))
        ends = np.append(cuts, {LENGTH})
        indices = np.stack([np.append(0, cuts), ends], 1).astype(np.uint32)
        ids = random.integers(0, 128256, {LENGTH}).astype(np.uint32)
        writer.write({{"input_ids": ids, "indices": indices, "length": {LENGTH}, "domain": "book"}})
"""

READ = f"""
import sys, time, numpy as np
{{opening}}
order = np.random.default_rng(int(sys.argv[2])).permutation(len(dataset)).tolist()
row = np.empty({LENGTH}, np.uint32)
for i in range(len(dataset)):
    dataset[i]  # everything is in page cache, and every digest checked, before the clock starts
ids = [dataset[i]["input_ids"] for i in order]
rates = []
start = time.perf_counter()
for i in order:
    sample = dataset[i]
    sample["indices"][-1, 1]
rates.append(len(order) / (time.perf_counter() - start))
start = time.perf_counter()
for i in order:
    row[:] = dataset[i]["input_ids"]
rates.append(len(order) / (time.perf_counter() - start))
start = time.perf_counter()
for i in range(len(order)):
    row[:] = ids[i]
rates.append(len(order) / (time.perf_counter() - start))
print(*rates)
"""
OPENINGS = {
    "official": "from streaming import LocalDataset; dataset = LocalDataset(local=sys.argv[1])",
    "ropewalk": "from ropewalk.data import open_mds; dataset = open_mds(sys.argv[1])",
}


def run(python: str, code: str, *arguments: str) -> str:
    """The last line that ``code`` prints in a process of that interpreter."""
    done = subprocess.run([python, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def official_python(directory: Path) -> str:
    """An interpreter that has the official package."""
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    python = directory / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", OFFICIAL], check=True)
    return str(python)


def main() -> None:
    """Write, read in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="an interpreter that has mosaicml-streaming; none: an environment is made")
    parser.add_argument("--sequences", type=int, default=600)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        other = arguments.python or official_python(Path(scratch) / "venv")
        data = str(Path(scratch) / "mds")
        run(other, WRITE, data, str(arguments.sequences))
        rates: dict[str, list[list[float]]] = {name: [] for name in OPENINGS}
        for turn in range(ROUNDS):
            for name, opening in OPENINGS.items():
                python = other if name == "official" else sys.executable
                said = run(python, READ.format(opening=opening), data, str(turn))
                rates[name].append([float(rate) for rate in said.split()])
    medians = {name: [statistics.median(c) for c in zip(*found, strict=True)] for name, found in rates.items()}
    for place, what in enumerate(("samples", "samples, tokens copied")):
        official, ours = (medians[name][place] for name in ("official", "ropewalk"))
        print(
            f"{what:<23} official {official:8,.0f}/s  ropewalk {ours:8,.0f}/s ({ours * LENGTH / 1e9:.1f} Gtok/s)  "
            f"ratio {ours / official:.1f}"
        )
    print(f"{'the copy alone':<23} {medians['ropewalk'][2]:8,.0f}/s")


if __name__ == "__main__":
    main()
