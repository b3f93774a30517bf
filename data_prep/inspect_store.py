"""What a packed store holds: ``python data_prep/inspect_store.py store=DIR [verify=true]``."""

# Not called inspect.py: a script's directory is searched first, and the standard library imports its own inspect.

from ropewalk.config import InspectStoreConfig
from ropewalk.entry import entry


@entry("inspect_store")
def main(config: InspectStoreConfig) -> None:
    """Print one store."""
    from ropewalk.data.describe import print_store

    print_store(config)


if __name__ == "__main__":
    main()
