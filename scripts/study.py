"""Decisions of a study over seeds: ``python scripts/study.py plan=recipes/extrapolation_small/plan.yaml``."""

from ropewalk.cli import entry
from ropewalk.config.train import StudyConfig


@entry("study")
def main(config: StudyConfig) -> None:
    """Print the decisions and all numbers; with collect=true gather them from the runs first."""
    from ropewalk.report.noise.study import study

    study(config)


if __name__ == "__main__":
    main()
