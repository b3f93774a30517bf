"""The figures that the report shows beside its runs."""

from __future__ import annotations

from ropewalk.analysis.figures.kernel import kernel_figure, semantic_figure
from ropewalk.analysis.figures.phases import coverage_figure
from ropewalk.analysis.figures.spectra import spectra_figure
from ropewalk.analysis.figures.style import render, take_words
from ropewalk.rope import Spectrum

IN_REPORT = (spectra_figure, kernel_figure, coverage_figure, semantic_figure)


def figures_for_report(
    spectra: dict[str, Spectrum], train_length: int, target_length: int
) -> list[tuple[str, str, bytes]]:
    """Spectra, kernel, coverage and semantic advantage as images without words of their own.

    Args:
        spectra: run or method name -> spectrum; one at least.
        train_length: tokens.
        target_length: tokens, above ``train_length``.

    Returns:
        Title, caption and PNG of each, in that order; title and caption are plain text, neither is in the image.
    """
    pages = []
    for draw in IN_REPORT:
        figure = draw(spectra, train_length=train_length, target_length=target_length)
        title, caption = take_words(figure)
        pages.append((title, caption, render(figure, "png", crop=True)))
    return pages
