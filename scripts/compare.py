"""Compare runs in one HTML page: ``python scripts/compare.py runs=[outputs/a,outputs/b] baseline=a``."""

from ropewalk.config import CompareConfig
from ropewalk.entry import entry


@entry("compare")
def main(config: CompareConfig) -> None:
    """Write the report and print its results table."""
    from ropewalk.report import compare

    compare(config)


if __name__ == "__main__":
    main()
