"""Analysis of a spectrum: advice, inspection, figures, and the geometry of real queries and keys."""

from ropewalk.analysis.advice import print_advice

__all__ = ["print_advice"]
