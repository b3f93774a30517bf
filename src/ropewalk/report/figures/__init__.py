"""The figures of the report, one module each."""

from ropewalk.report.figures.needle import needle_figure
from ropewalk.report.figures.position import position_figure
from ropewalk.report.figures.spectra import spectra_figure
from ropewalk.report.figures.style import Figure, Panel, RunStyle, ScaleBar, run_styles
from ropewalk.report.figures.training import training_figure

__all__ = [
    "Figure",
    "Panel",
    "RunStyle",
    "ScaleBar",
    "needle_figure",
    "position_figure",
    "run_styles",
    "spectra_figure",
    "training_figure",
]
