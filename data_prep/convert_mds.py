"""MDS directories to a packed store and back: ``python data_prep/convert_mds.py +mds=prolong_64k root=DIR ...``."""

from ropewalk.cli import entry
from ropewalk.config.data import ConvertConfig


@entry("convert_mds")
def main(config: ConvertConfig) -> None:
    """Convert in one direction."""
    from ropewalk.data.mds.convert import convert

    convert(config)


if __name__ == "__main__":
    main()
