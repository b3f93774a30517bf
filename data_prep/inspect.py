"""What a packed store holds: ``python data_prep/inspect.py store=DIR [--verify]``."""

import os
import sys

# A script's folder is searched first, and the standard library's inspect must be found before the one beside this.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.realpath(__file__))]

from ropewalk.cli import entry
from ropewalk.config import InspectStoreConfig


@entry("inspect_store")
def main(config: InspectStoreConfig) -> None:
    """Print one store."""
    from ropewalk.data.store.describe import print_store

    print_store(config)


if __name__ == "__main__":
    main()
