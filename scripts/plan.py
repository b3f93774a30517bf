"""What a training run needs before it is submitted: ``python scripts/plan.py +experiment=cope20 nodes=4``."""

import sys

from ropewalk.cli import entry
from ropewalk.config.train import PlanConfig


@entry("plan")
def main(config: PlanConfig) -> None:
    """Plan one run; exit code 1 where it does not fit, unless advisory=true or print=ENTRY asks for one value."""
    from ropewalk.cluster.planner import print_plan

    if not print_plan(config):
        sys.exit(1)


if __name__ == "__main__":
    main()
