"""The whole preparation of a corpus against its tokenizer alone, two processes, gigatoken, and ProLong's datatools.

python benchmarks/prepare.py --tokenizer DIRECTORY [--megabytes 200] [--rounds 3] [--source DIRECTORY]
                             [--datatools PYTHON | --no-datatools]

scripts/fetch_llama3_tokenizer.sh fetches the tokenizer. The corpus is Python code, of this environment's site-packages
unless --source names another directory, as one document for each package. Everything runs in processes of its own, from
page cache, one thread each, in turns, several times: the tokenizer alone (tiktoken) on the same texts, prepare.py with
one process and with two, with gigatoken on one, and datatools' tokenize and pack on one, in an environment that is made
here with pip or named with --datatools. Printed are medians and ratios, of seconds and, since a machine with other work
gives seconds of no meaning, of seconds of processors. Goals: 0.8 of the bare tokenizer's rate, two processes 1.7 times
one, twice datatools, with gigatoken 8 times; and the largest memory of a process on all of the corpus beside a quarter
of it. Packing: one million log-normal documents (median 1,500 tokens, sigma 1.7) into 65,536 tokens (goals: 0.6 s, fill
0.999).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
from datatools import Datatools

from ropewalk.config.data import CorpusConfig, SourceConfig
from ropewalk.data.prepare.corpus import read_documents
from ropewalk.data.prepare.packing import cut, pack
from ropewalk.data.prepare.sources import corpus_sources, list_units
from ropewalk.data.prepare.token_files import Skipped

LENGTH = 65536
WAYS = (("one process", "auto", 1), ("two processes", "auto", 2), ("gigatoken", "gigatoken", 1))
RATIOS = (
    ("one process / bare tokenizer", "one process", "bare tokenizer", 0.8),
    ("two processes / one process", "two processes", "one process", "1.7, of seconds"),
    ("one process / datatools", "one process", "datatools", 2),
    ("gigatoken / datatools", "gigatoken", "datatools", 8),
)
BARE = """
import sys, time
from ropewalk.config.data import CorpusConfig, SourceConfig
from ropewalk.data.prepare.corpus import read_documents
from ropewalk.data.prepare.sources import corpus_sources, list_units
from ropewalk.data.prepare.token_files import Skipped
from ropewalk.data.prepare.tokenizer import batches, load_tokenizer
tokenizer, engine, source = sys.argv[1:]
engine_ = load_tokenizer(tokenizer, engine).engine
engine_.encode_batch([b"begin"])
seconds = cpu = size = 0
for place in corpus_sources(CorpusConfig(sources=[SourceConfig("code", source, "repositories")])):
    for unit in list_units(place, 10**9):
        for document in read_documents(unit, Skipped()):
            for batch in batches(document.parts):
                texts = [text.encode() for text in batch]
                size += sum(map(len, texts))
                start, used = time.perf_counter(), time.process_time()
                engine_.encode_batch(texts)
                seconds, cpu = seconds + time.perf_counter() - start, cpu + time.process_time() - used
print(seconds, cpu, size)
"""
PREPARE = """
import json, resource, sys, time
if __name__ == "__main__":
    from ropewalk.config.data import CorpusConfig, DomainConfig, PrepareConfig, SourceConfig
    from ropewalk.data.prepare.pipeline import prepare
    tokenizer, engine, source, output, workers = sys.argv[1:]
    corpus = CorpusConfig(name="code", sources=[SourceConfig("code", source, "repositories")], tokenizer=tokenizer,
                          engine=engine, domains={"code": DomainConfig("long", "short")})
    start = time.perf_counter()
    prepare(PrepareConfig(output, [65536], shard_mb=8.0, workers=int(workers), corpus=corpus), lambda line: None)
    seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(seconds, sum(u.ru_utime + u.ru_stime for u in used), max(u.ru_maxrss for u in used) / 1024)
"""


def copied(source: Path, target: Path, megabytes: float) -> int:
    """Copy packages of Python code until they have so many megabytes; the size in bytes."""
    size = 0
    for package in sorted(source.iterdir()):
        files = sorted(package.rglob("*.py")) if package.is_dir() else [package] * (package.suffix == ".py")
        for path in files:
            if size >= megabytes * 1e6:
                return size
            to = target / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
            size += path.stat().st_size
    return size


def run(code: str, *arguments: str) -> list[float]:
    """The numbers that a script prints in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # a file, since processes are started anew from it
        script.write(code)
        script.flush()
        done = subprocess.run(
            [sys.executable, script.name, *arguments], env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [float(number) for number in done.stdout.split()]


def prepared(scratch: Path, tokenizer: str, engine: str, source: Path, workers: int) -> list[float]:
    """Seconds, seconds of processors, and megabytes of the largest process."""
    output = scratch / "out"
    shutil.rmtree(output, ignore_errors=True)
    return run(PREPARE, tokenizer, engine, str(source), str(output), str(workers))


def packing() -> None:
    """Best fit of a million documents."""
    lengths = np.maximum(np.random.default_rng(0).lognormal(np.log(1500), 1.7, 1_000_000), 1).astype(np.int64)
    pack(cut(lengths[:1000], LENGTH)[1].length, LENGTH)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        whole, rest = cut(lengths, LENGTH)
        bins = pack(rest.length, LENGTH)
        seconds.append(time.perf_counter() - start)
    sequences = len(whole.length) + len(bins.offsets) - 1
    fill = lengths.sum() / (sequences * LENGTH)
    cut_that_fit = int(np.sum((rest.start > 0) & (lengths[rest.document] <= LENGTH)))
    print(
        f"packing of 1,000,000 documents: {statistics.median(seconds):.2f} s (goal 0.6), fill {fill:.6f} (goal 0.999),"
    )
    print(f"  {sequences:,} sequences, {cut_that_fit} documents cut that fit")


def documents_of(source: Path, target: Path) -> None:
    """The documents as datatools reads them."""
    corpus = CorpusConfig(sources=[SourceConfig("code", str(source), "repositories")])
    with target.open("w", encoding="utf-8") as file:
        for place in corpus_sources(corpus):
            for unit in list_units(place, 10**9):
                for document in read_documents(unit, Skipped()):
                    file.write(json.dumps({"text": document.text}) + "\n")


def main() -> None:
    """Copy, time in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_paths()["purelib"]))
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datatools", metavar="PYTHON")
    parser.add_argument("--no-datatools", action="store_true")
    arguments = parser.parse_args()
    packing()
    tokenizer = str(Path(arguments.tokenizer).resolve())
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        rival = None if arguments.no_datatools else Datatools(scratch, arguments.datatools, Path(tokenizer))
        size = copied(arguments.source, scratch / "all/code", arguments.megabytes)
        copied(arguments.source, scratch / "quarter/code", arguments.megabytes / 4)
        source = scratch / "all/code"
        documents_of(source, scratch / "documents.jsonl")
        found: dict[str, list[tuple[float, float]]] = {}

        def note(name: str, seconds: float, used: float) -> None:
            found.setdefault(name, []).append((seconds, used))
            print(f"{name}: {seconds:.1f} s, {used:.1f} s of processors", file=sys.stderr, flush=True)

        memory = 0.0
        for _ in range(arguments.rounds):
            seconds, used, encoded = run(BARE, tokenizer, "auto", str(source))
            note("bare tokenizer", seconds, used)
            for name, engine, workers in WAYS:
                seconds, used, largest = prepared(scratch, tokenizer, engine, source, workers)
                note(name, seconds, used)
                memory = max(memory, largest) if name == "one process" else memory
            if rival is not None:
                note("datatools", *rival.prepare(scratch / "documents.jsonl", LENGTH))
        stored = json.loads((scratch / "out/packed-65536/manifest.json").read_text())["domains"]
        quarter = prepared(scratch, tokenizer, "auto", scratch / "quarter/code", 1)[2]
    tokens = sum(domain["tokens"] for domain in stored.values())
    print(f"{size / 1e6:.0f} MB of code, {tokens / 1e6:.1f} Mtok, medians of {arguments.rounds}:")
    medians = {name: [statistics.median(kind) for kind in zip(*times, strict=True)] for name, times in found.items()}
    for name, (seconds, used) in medians.items():
        print(f"  {name:<15} {seconds:7.1f} s, {encoded / seconds / 1e6:7.2f} MB/s, {used:7.1f} s of processors")
    for what, over, under, goal in RATIOS:
        if under in medians:
            ratios = [medians[under][kind] / medians[over][kind] for kind in (0, 1)]
            print(f"{what:<32} {ratios[0]:5.2f} of seconds, {ratios[1]:5.2f} of processors (goal {goal})")
    print(f"memory, all / a quarter          {memory / quarter:5.2f} ({memory:.0f} and {quarter:.0f} MB)")


if __name__ == "__main__":
    main()
