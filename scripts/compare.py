"""Compare runs in one HTML page: ``python scripts/compare.py runs=[outputs/a,outputs/b] baseline=a``."""

from ropewalk.cli import entry
from ropewalk.config.evaluation import CompareConfig
from ropewalk.runs.launch import release_warnings


@entry("compare")
def main(config: CompareConfig) -> None:
    """Write the report and print its results table; with track=true log evaluations into the runs' trackers."""
    release_warnings()  # nothing is to be saved, so a job's warning may end it
    from ropewalk.report import compare

    compare(config)
    if config.track:
        from ropewalk.report.tracked import track

        track(config)


if __name__ == "__main__":
    main()
