"""Figures that need a spectrum and no weights."""

from __future__ import annotations

from collections.abc import Callable

from ropewalk.figures.figure import Figure
from ropewalk.figures.spectrum.attention_kernel import kernel_figure, semantic_figure
from ropewalk.figures.spectrum.axes_and_periods import axes_figure
from ropewalk.figures.spectrum.clip_leakage import leakage_figure
from ropewalk.figures.spectrum.clip_sweep import clips_figure
from ropewalk.figures.spectrum.fixed_spectra import decay_figure, textbook_figure
from ropewalk.figures.spectrum.spectra import coverage_figure, factors_figure, phases_figure, spectra_figure

# Name of a figure -> its function of (spectra, train_length=, target_length=).
SPECTRUM_FIGURES: dict[str, Callable[..., Figure]] = {
    "spectra": spectra_figure,
    "kernel": kernel_figure,
    "leakage": leakage_figure,
    "coverage": coverage_figure,
    "semantic": semantic_figure,
    "phases": phases_figure,
    "textbook": textbook_figure,
    "clips": clips_figure,
    "decay": decay_figure,
    "axes": axes_figure,
    "factors": factors_figure,
}

__all__ = ["SPECTRUM_FIGURES"]
