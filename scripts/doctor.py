"""Is this machine fit for a command? Each takes the overrides of the command itself.

``python scripts/doctor.py +experiment=cope20``, for train.py
``python scripts/doctor.py evaluate checkpoint=DIR output=DIR documents=DIR``
``python scripts/doctor.py prepare corpus=NAME 'sequence_lengths=[65536]'``
``python scripts/doctor.py compare 'runs=[DIR,DIR]'``

Every job script calls it before its ranks start. Exit code 1 where something must be fixed.
"""

import sys

from ropewalk.cli import entry, run_command
from ropewalk.config.data import PrepareConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig
from ropewalk.config.train import TrainConfig


@entry("train", reads_inputs=False)
def train(config: TrainConfig) -> None:
    """Look at the machine, the data and the file system for one run."""
    from ropewalk.cluster.doctor import examine

    sys.exit(examine(config) > 0)


@entry("evaluate", reads_inputs=False)
def evaluate(config: EvaluateConfig) -> None:
    """Look at what one evaluation needs."""
    from ropewalk.cluster.doctor import examine_evaluation

    sys.exit(examine_evaluation(config) > 0)


@entry("prepare", reads_inputs=False)
def prepare(config: PrepareConfig) -> None:
    """Look at what one preparation, or a stage of it, needs."""
    from ropewalk.cluster.doctor import examine_preparation

    sys.exit(examine_preparation(config) > 0)


@entry("compare", reads_inputs=False)
def compare(config: CompareConfig) -> None:
    """Look at what a comparison needs."""
    from ropewalk.cluster.doctor import examine_comparison

    sys.exit(examine_comparison(config) > 0)


if __name__ == "__main__":
    commands = {"train": train, "evaluate": evaluate, "prepare": prepare, "compare": compare}
    run_command(commands, default="train")
