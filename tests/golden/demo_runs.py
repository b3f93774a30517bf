"""The demo's experiments, cut after a few steps, on the fixture corpus: the runs behind demo.json.

python tests/golden/demo_runs.py           run all of them and compare with demo.json
python tests/golden/demo_runs.py --write   run all of them and write demo.json anew

Model, schedule, batch and arms are the experiments' own; the corpus is the committed one, since the demo's real text is
the running Python's standard library and differs from version to version.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.compare import first_difference
from ranks import run_ranks

from ropewalk.config.data import CorpusConfig, PrepareConfig
from ropewalk.data.prepare.pipeline import prepare
from ropewalk.export import resolve_checkpoint
from ropewalk.runs.metrics_file import read_metrics

GOLDEN = Path(__file__).parent / "demo.json"
FIXTURES = Path(__file__).parents[1] / "fixtures"
PRETRAIN = "demo/pretrain"
ARMS = ("demo/rope", "demo/hardclip", "demo/cope")
STEPS = {PRETRAIN: 4, **dict.fromkeys(ARMS, 3)}
LENGTH = {PRETRAIN: 128, **dict.fromkeys(ARMS, 512)}
BATCH = {PRETRAIN: 32, **dict.fromkeys(ARMS, 16)}  # sequences a step: the experiments' own


class DemoRuns:
    """Runs experiments one by one in a directory; every arm starts from the export of the one-rank pretraining."""

    def __init__(self, work: Path) -> None:
        corpus = CorpusConfig(name="fixture", paths=[str(FIXTURES / "corpus")], tokenizer=str(FIXTURES / "tokenizer"))
        config = PrepareConfig(output=str(work / "data"), sequence_lengths=[128, 512], corpus=corpus)
        self.work, self.data = work, prepare(config, report=lambda line: None)
        self.base: Path | None = None

    def losses(self, experiment: str, ranks: int) -> list[float]:
        """The loss of each step of one experiment on so many ranks."""
        run_dir = self.work / experiment / str(ranks)
        arguments = [
            f"+experiment={experiment}", "tracker=none", f"run_dir={run_dir}", "~data.mixture.retrieval",
            f"data.store={self.data}/packed-{LENGTH[experiment]}", f"trainer.stop_after={STEPS[experiment]}",
            f"trainer.micro_batch_size={BATCH[experiment] // ranks}",
        ]  # fmt: skip
        if experiment in ARMS:
            arguments.append(f"model.path={self.base or self._make_base()}")
        run_ranks(ranks, run_dir / "logs", arguments, seconds=1200)
        return [row["loss"] for row in read_metrics(run_dir)]

    def _make_base(self) -> Path:
        run_dir = self.work / PRETRAIN / "1"
        if not run_dir.exists():
            self.losses(PRETRAIN, 1)
        self.base = resolve_checkpoint(run_dir)
        return self.base


def main() -> int:
    """Run everything; write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    is_writing = parser.parse_args().write
    with tempfile.TemporaryDirectory() as work:
        runs = DemoRuns(Path(work))
        found = {name: {str(ranks): runs.losses(name, ranks) for ranks in (1, 2)} for name in STEPS}
    if is_writing:
        made = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
        GOLDEN.write_text(json.dumps({"made_with": made, "losses": found}, indent=1) + "\n")
        return 0
    golden = json.loads(GOLDEN.read_text())["losses"]
    differing = 0
    for name, by_ranks in found.items():
        for ranks, losses in by_ranks.items():
            told = first_difference(golden[name][ranks], losses)
            differing += told is not None
            print(f"{name} on {ranks} ranks: {told or 'agrees'}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
