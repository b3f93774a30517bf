"""Documents by datatrove, near duplicates taken out: ``python data_prep/gather.py reader=warc path=DIR output=DIR``."""

import os
import sys

# A script's folder is searched first, and the standard library's inspect must be found before the one beside this.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.realpath(__file__))]

from ropewalk.cli import entry
from ropewalk.config import GatherConfig


@entry("gather")
def main(config: GatherConfig) -> None:
    """Gather one source."""
    from ropewalk.data.prepare.datatrove import gather

    gather(config)


if __name__ == "__main__":
    main()
