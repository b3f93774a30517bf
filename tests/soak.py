"""kill -9 real two-rank runs at random moments, restart them, and compare with the run that nobody killed.

python tests/soak.py --kills 20 [--seed N]

The killer is this process; the ranks know nothing of it. A third of the kills fall inside a save: after the directory
of a checkpoint has appeared and before its manifest has. One rank or both are hit; the survivor of a half kill follows
a moment later, as under srun --kill-on-bad-exit. The losses of every finished run must equal the uninterrupted ones bit
for bit (CPU, fp32).
"""

from __future__ import annotations

import argparse
import random
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ranks import RankProcesses, run_ranks, start_ranks, tiny_arguments

from ropewalk.config import CorpusConfig, PrepareConfig
from ropewalk.data import PackedStore
from ropewalk.data.prepare import prepare
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, verify_checkpoint

STEPS = 16
START_SECONDS = 1.5  # of a rank until its first step, about


@dataclass(frozen=True)
class Kill:
    """One kill: when it came, whom it hit, and whether a save was cut."""

    step: int
    victims: tuple[int, ...]
    inside_save: bool


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step that the run kept."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


def torn(run_dir: Path) -> set[tuple[Path, int]]:
    """Directories of checkpoints that are not committed, each with when it was made: a resumed run makes it anew."""
    found = set()
    for path in run_dir.glob("checkpoints/step-*"):
        with suppress(FileNotFoundError):  # a rank may be removing it
            if not (path / "manifest.json").exists():
                found.add((path, path.stat().st_ctime_ns))
    return found


class Soak:
    """Kills runs until enough have been killed; every run is brought to its end and compared."""

    def __init__(self, store: PackedStore, work: Path, seed: int, report: Callable[[str], None]) -> None:
        self.store, self.work, self.report = store, work, report
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self.runs = 0
        run_ranks(2, work / "logs", self.arguments(work / "straight"))
        self.expected = losses(work / "straight")
        assert len(self.expected) == STEPS
        rows = read_metrics(work / "straight")
        self.step_seconds = median(row["seconds"] for row in rows)
        self.save_seconds = median(row["seconds/checkpoint"] for row in rows if row["seconds/checkpoint"])
        told = f"{STEPS} steps of {self.step_seconds:.3f} s, every second one saved in {self.save_seconds:.3f} s"
        report(f"seed {seed}: {told}")

    def arguments(self, run_dir: Path) -> list[str]:
        """Of train.py: accumulation 2, a save every second step."""
        return tiny_arguments(self.store, run_dir, f"trainer.max_steps={STEPS}")

    def run(self, kills: int) -> None:
        """Go on until ``kills`` have happened, at least a third of them inside a save."""
        while len(self.kills) < kills or 3 * self.inside < kills:
            self.runs += 1
            run_dir = self.work / f"killed-{self.runs}"
            while len(self.kills) < kills or 3 * self.inside < kills:
                if not self._start_and_kill(run_dir):
                    break
            run_ranks(2, self.work / "logs", self.arguments(run_dir))
            assert losses(run_dir) == self.expected, f"{run_dir}: {losses(run_dir)} instead of {self.expected}"
            self.report(f"run {self.runs}: {STEPS} losses equal bit for bit")

    @property
    def inside(self) -> int:
        """Kills that have cut a save."""
        return sum(kill.inside_save for kill in self.kills)

    def _start_and_kill(self, run_dir: Path) -> bool:
        """One session, killed; False where it came to its end first."""
        torn_before, rows_before = torn(run_dir), len(losses(run_dir))
        victims = self.random.choice([(0,), (1,), (0, 1)])
        kind = "save" if 3 * self.inside <= len(self.kills) else self.random.choice(["start", "step"])
        with start_ranks(2, self.work / "logs", self.arguments(run_dir)) as ranks:
            if kind == "start":
                self._sleep(START_SECONDS)
            elif kind == "save" and self._wait(ranks, lambda: torn(run_dir) - torn_before):
                self._sleep(self.save_seconds)
            elif kind == "step" and self._wait(ranks, lambda: len(losses(run_dir)) != rows_before):
                self._sleep(6 * self.step_seconds)
            if not ranks.alive():
                return False
            ranks.send(signal.SIGKILL, *victims)
            self._sleep(0.3)
        found = find_checkpoint(run_dir)
        step = verify_checkpoint(found)["step"] if found else 0
        self.kills.append(Kill(step, victims, bool(torn(run_dir) - torn_before)))
        whom = " and ".join(f"rank {rank}" for rank in victims)
        cut = "a save was cut" if self.kills[-1].inside_save else "no save was cut"
        self.report(f"kill {len(self.kills)}, aimed at a {kind}: {whom}, step {step} stands; {cut}")
        return True

    def _sleep(self, at_most: float) -> None:
        time.sleep(self.random.uniform(0, at_most))

    @staticmethod
    def _wait(ranks: RankProcesses, condition: Callable[[], object]) -> bool:
        while ranks.alive():
            if condition():
                return True
            time.sleep(0.001)
        return False


def main() -> None:
    """Soak on the fixture corpus; what happened is kept where it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="of the moments; printed")
    arguments = parser.parse_args()
    fixtures, work = Path(__file__).parent / "fixtures", Path(tempfile.mkdtemp(prefix="soak-"))
    print(
        f"soak: seed {arguments.seed}, in {work}; first a run that nobody kills, then {arguments.kills} kills,", end=" "
    )
    print("more where fewer than a third of them cut a save", flush=True)
    try:
        corpus = CorpusConfig(name="fixture", paths=[str(fixtures / "corpus")], tokenizer=str(fixtures / "tokenizer"))
        config = PrepareConfig(output=f"{work}/data", sequence_lengths=[64], corpus=corpus)
        store = PackedStore(prepare(config, report=lambda line: None) / "packed-64")
        soak = Soak(store, work, arguments.seed, lambda line: print(line, flush=True))
        soak.run(arguments.kills)
    except BaseException:
        print(f"soak: FAILED with --seed {arguments.seed}; runs and logs are in {work}", flush=True)
        raise
    shutil.rmtree(work)
    told = f"{len(soak.kills)} kills, {soak.inside} of them cut a save, {soak.runs} runs"
    print(f"soak: passed: {told}, every loss and gradient norm equal bit for bit")


if __name__ == "__main__":
    main()
