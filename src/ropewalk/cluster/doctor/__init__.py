"""Looking at the machine before hours are spent on it: ``scripts/doctor.py``."""

from ropewalk.cluster.doctor.checkup import examine, examine_comparison, examine_evaluation, examine_preparation

__all__ = ["examine", "examine_comparison", "examine_evaluation", "examine_preparation"]
