"""Raw documents to packed stores: ``python data_prep/prepare.py corpus=demo sequence_lengths=[512,2048]``."""

from ropewalk.config import PrepareConfig
from ropewalk.entry import entry


@entry("prepare")
def main(config: PrepareConfig) -> None:
    """Prepare one corpus."""
    from ropewalk.data.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    main()
