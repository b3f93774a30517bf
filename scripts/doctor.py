"""Is this machine fit for a run? ``python scripts/doctor.py +experiment=cope20``, with the overrides of train.py.

Every job script calls it before its ranks start. Exit code 1 where something must be mended.
"""

import sys

from ropewalk.config import TrainConfig
from ropewalk.entry import entry


@entry("train")
def main(config: TrainConfig) -> None:
    """Look at the machine, the data and the file system for one run."""
    from ropewalk.doctor import examine

    if examine(config):
        sys.exit(1)


if __name__ == "__main__":
    main()
