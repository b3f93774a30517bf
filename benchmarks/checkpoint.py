"""Saving and loading a committed checkpoint against plain torch.save and torch.load of the same tensors.

python benchmarks/checkpoint.py [--width 512] [--rounds 5]

One rank, the demo's model made wider, ZeRO-3. Ours writes, makes durable, hashes and commits; loading hashes and
compares ("verify"), then reads and fills the engine ("load"), which torch.load alone does not. The plain form writes
and reads the same objects, once as torch.save leaves them, in the page cache, and once followed by fsync, which any
checkpoint that outlives a dead node needs. Rounds alternate. Limit with hashing: 1.5 for saving and loading together.
The last line of times is how long training stands still where the save goes on in the background.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from demo import demo_config, packed_batch

from ropewalk.config.groups import RopeConfig
from ropewalk.files import fsync_path
from ropewalk.model.load import training_config
from ropewalk.training.checkpoint.restore import load_checkpoint
from ropewalk.training.checkpoint.save import save_checkpoint, start_save, verify_checkpoint
from ropewalk.training.distributed import start_processes
from ropewalk.training.engine import start_engine
from ropewalk.training.guards import Guard
from ropewalk.training.inputs import StepBatch
from ropewalk.training.meter import Meter
from ropewalk.training.trainer import Trainer


def main() -> None:
    """Print bytes, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="channels of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where checkpoints are written; default: the temporary directory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ranks = start_processes("cpu")
    config = demo_config(
        f"model.architecture.hidden_size={given.width}", f"model.architecture.intermediate_size={4 * given.width}"
    )
    model_config = training_config(config.model, RopeConfig("rope"), 512)
    engine = start_engine(config, model_config, ranks)
    batch = StepBatch(0, [packed_batch(512, model_config.vocab_size, 0)], 500)
    Trainer(engine, ranks, iter([batch]), lambda step: 1e-3, Guard(config.guards), Meter(ranks.device)).take_step()
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        root = Path(name)
        for number in range(1, given.rounds + 1):
            time_round(engine, root, number, seconds)
            size = sum(path.stat().st_size for path in root.rglob("step-*/**/*") if path.is_file())
            shutil.rmtree(root / "checkpoints")
    load = os.getloadavg()[0]
    print(f"{size / 2**20:.0f} MiB, {given.rounds} alternating rounds; load average {load:.1f} at the end")
    for kind, of in (("medians", statistics.median), ("best", min)):
        print_ratios(kind, {name: of(times) for name, times in seconds.items()})


def print_ratios(kind: str, seconds: dict[str, float]) -> None:
    """Print times, and what ours are of the plain ones; the best of the rounds tell most beside other work."""
    print(f"{kind}:")
    for name, value in seconds.items():
        print(f"  {name:34} {value:7.3f} s")
    save, load = seconds["ours: save"], seconds["ours: verify"] + seconds["ours: load"]
    for form in ("torch.save", "torch.save and fsync"):
        plain, plain_load = seconds[form], seconds["torch.load"]
        print(
            f"  against {form}: save {save / plain:.2f}, load {load / plain_load:.2f}, "
            f"both {(save + load) / (plain + plain_load):.2f}"
        )


def time_round(engine, root: Path, number: int, seconds: dict[str, list[float]]) -> None:
    """One of each; every file is read from the page cache by all forms alike."""

    def timed(name, work):
        start = time.perf_counter()
        result = work()
        seconds[name].append(time.perf_counter() - start)
        return result

    checkpoint = timed("ours: save", lambda: save_checkpoint(engine, root, number, {}, {}))
    files = sorted(checkpoint.rglob("*.pt"))
    contents = [torch.load(path, weights_only=False) for path in files]
    plain = [root / f"plain-{i}.pt" for i in range(len(files))]

    def write() -> None:
        for content, path in zip(contents, plain, strict=True):
            torch.save(content, path)

    start = time.perf_counter()
    timed("torch.save", write)
    for path in plain:
        fsync_path(path)
    seconds["torch.save and fsync"].append(time.perf_counter() - start)
    timed("torch.load", lambda: [torch.load(path, weights_only=False) for path in plain])

    timed("ours: verify", lambda: verify_checkpoint(checkpoint))
    timed("ours: load", lambda: load_checkpoint(engine, checkpoint))
    started = timed(
        "training waits, in the background", lambda: start_save(engine, root, number + 100, {}, {}, in_background=True)
    )
    started.commit()


if __name__ == "__main__":
    main()
