"""What a packed store holds: ``python data_prep/inspect_store.py store=DIR [--verify]``."""

from ropewalk.cli import entry
from ropewalk.config.data import InspectStoreConfig


@entry("inspect_store")
def main(config: InspectStoreConfig) -> None:
    """Print one store."""
    from ropewalk.data.store.describe import print_store

    print_store(config)


if __name__ == "__main__":
    main()
