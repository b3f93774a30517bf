"""MDS directories to a packed store and back: ``python data_prep/convert_mds.py +mds=prolong_64k root=DIR ...``."""

from ropewalk.config import ConvertConfig
from ropewalk.entry import entry


@entry("convert_mds")
def main(config: ConvertConfig) -> None:
    """Convert in one direction."""
    from ropewalk.data.convert import convert

    convert(config)


if __name__ == "__main__":
    main()
