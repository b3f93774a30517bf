"""The W&B workspace and report of a project: ``python scripts/dashboard.py project=NAME [--push]``."""

import sys

from ropewalk.cli import entry
from ropewalk.config.evaluation import DashboardConfig


@entry("dashboard")
def main(config: DashboardConfig) -> None:
    """Write both as JSON; with push=true save them to W&B."""
    from ropewalk.report.dashboard import dashboard

    dashboard(config)


if __name__ == "__main__":
    sys.argv[1:] = ["push=true" if argument == "--push" else argument for argument in sys.argv[1:]]
    main()
