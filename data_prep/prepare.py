"""Raw documents to packed stores: ``python data_prep/prepare.py +corpus=demo sequence_lengths=[512,2048]``."""

from ropewalk.cli import entry
from ropewalk.config.data import PrepareConfig
from ropewalk.runs.launch import release_warnings


@entry("prepare")
def main(config: PrepareConfig) -> None:
    """Prepare one corpus."""
    release_warnings()  # nothing is to be saved: finished shards are on the disk, so a job's warning may end it
    from ropewalk.data.prepare.pipeline import prepare

    prepare(config)


if __name__ == "__main__":
    main()
