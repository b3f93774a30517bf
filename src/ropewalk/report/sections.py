"""What the page shows, in its order: tables, figures and images."""

from __future__ import annotations

from ropewalk.config.evaluation import CompareConfig
from ropewalk.evaluation.paper import read_published
from ropewalk.report.benchmarks import SUITES, benchmark_table
from ropewalk.report.effective import Thresholds, effective_table
from ropewalk.report.figures import (
    Figure,
    RunStyle,
    benchmark_figure,
    needle_figure,
    position_figure,
    spectra_figure,
    throughput_figure,
    training_figure,
)
from ropewalk.report.images import Images, spectrum_images
from ropewalk.report.published import published_table
from ropewalk.report.results_table import results_table
from ropewalk.report.runs import Run
from ropewalk.report.seeds import arms, one_run_each
from ropewalk.report.short_context import short_context_table
from ropewalk.report.table import Table

Section = Table | Figure | Images


def sections_of(config: CompareConfig, runs: list[Run], baseline: Run, styles: dict[str, RunStyle]) -> list[Section]:
    """What the page shows after its head; what no run has anything of is left out."""
    thresholds = Thresholds(config.effective_needle, config.effective_ruler)
    spectra = one_run_each(arms(runs))
    found: list[Section | None] = [
        results_table(runs, baseline),
        effective_table(runs, thresholds),
        training_figure(runs, styles),
        position_figure(runs, baseline, styles),
        needle_figure(runs),
        *(part for suite in SUITES for part in (benchmark_figure(runs, suite, styles), benchmark_table(runs, suite))),
        short_context_table(runs, baseline),
        published_table(runs, read_published(config.published, "published")) if config.published else None,
        spectra_figure(spectra, styles),
        spectrum_images(spectra, baseline),
        throughput_figure(runs, styles),
    ]
    return [section for section in found if section is not None]
