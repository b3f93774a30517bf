"""The figures that the report shows beside its runs."""

from __future__ import annotations

from matplotlib.figure import Figure

from ropewalk.analysis.figures.kernel import kernel_figure, semantic_figure
from ropewalk.analysis.figures.phases import coverage_figure
from ropewalk.analysis.figures.spectra import spectra_figure
from ropewalk.analysis.figures.style import take_words
from ropewalk.rope import Spectrum

IN_REPORT = (spectra_figure, kernel_figure, coverage_figure, semantic_figure)


def figures_for_report(
    spectra: dict[str, Spectrum], train_length: int, target_length: int
) -> list[tuple[str, str, Figure]]:
    """Spectra, kernel, coverage and semantic advantage without words of their own.

    Args:
        spectra: run or method name -> spectrum; one at least.
        train_length: tokens.
        target_length: tokens, above ``train_length``.

    Returns:
        Title, caption and figure of each, in that order; title and caption are plain text, neither is in the figure.
    """
    pages = []
    for draw in IN_REPORT:
        figure = draw(spectra, train_length=train_length, target_length=target_length)
        title, caption = take_words(figure)
        pages.append((title, caption, figure))
    return pages
