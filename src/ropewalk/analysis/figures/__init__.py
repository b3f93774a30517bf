"""Figures that need a spectrum and no weights."""

from ropewalk.analysis.figures.draw import draw

__all__ = ["draw"]
