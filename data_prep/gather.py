"""Documents by datatrove, near duplicates taken out: ``python data_prep/gather.py reader=warc path=DIR output=DIR``."""

from ropewalk.cli import entry
from ropewalk.config.data import GatherConfig


@entry("gather")
def main(config: GatherConfig) -> None:
    """Gather one source."""
    from ropewalk.data.prepare.datatrove import gather

    gather(config)


if __name__ == "__main__":
    main()
