"""Raw documents to packed stores: ``python data_prep/prepare.py +corpus=demo sequence_lengths=[512,2048]``."""

import os
import sys

# A script's folder is searched first, and the standard library's inspect must be found before the one beside this.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.realpath(__file__))]

from ropewalk.config import PrepareConfig
from ropewalk.entry import entry
from ropewalk.runs.launch import release_warnings


@entry("prepare")
def main(config: PrepareConfig) -> None:
    """Prepare one corpus."""
    release_warnings()  # nothing is to be saved: finished shards are on the disk, so a job's warning may end it
    from ropewalk.data.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    main()
