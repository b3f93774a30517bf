"""The figures of the report, one module each."""

from ropewalk.report.figures.benchmarks import benchmark_figure
from ropewalk.report.figures.needle import needle_figure
from ropewalk.report.figures.position import position_figure
from ropewalk.report.figures.spectra import spectra_figure
from ropewalk.report.figures.style import Figure, Panel, Row, RunStyle, ScaleBar, run_styles, styles_of
from ropewalk.report.figures.throughput import throughput_figure
from ropewalk.report.figures.training import training_figure

__all__ = [
    "Figure",
    "Panel",
    "Row",
    "RunStyle",
    "ScaleBar",
    "benchmark_figure",
    "needle_figure",
    "position_figure",
    "run_styles",
    "spectra_figure",
    "styles_of",
    "throughput_figure",
    "training_figure",
]
