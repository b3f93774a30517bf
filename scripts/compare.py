"""Compare runs in one HTML page: ``python scripts/compare.py runs=[outputs/a,outputs/b] baseline=a``."""

from ropewalk.config import CompareConfig
from ropewalk.entry import entry


@entry("compare")
def main(config: CompareConfig) -> None:
    """Write the report and print its results table; with track=true log evaluations into the runs' trackers."""
    from ropewalk.report import compare

    compare(config)
    if config.track:
        from ropewalk.dashboard import track

        track(config)


if __name__ == "__main__":
    main()
