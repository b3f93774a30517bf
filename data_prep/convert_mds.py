"""MDS directories to a packed store and back: ``python data_prep/convert_mds.py +mds=prolong_64k root=DIR ...``."""

import os
import sys

# A script's folder is searched first, and the standard library's inspect must be found before the one beside this.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.realpath(__file__))]

from ropewalk.cli import entry
from ropewalk.config import ConvertConfig


@entry("convert_mds")
def main(config: ConvertConfig) -> None:
    """Convert in one direction."""
    from ropewalk.data.mds.convert import convert

    convert(config)


if __name__ == "__main__":
    main()
