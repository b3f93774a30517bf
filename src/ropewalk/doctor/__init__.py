"""Looking at the machine before hours are spent on it: ``scripts/doctor.py``."""

from ropewalk.doctor.run import examine

__all__ = ["examine"]
