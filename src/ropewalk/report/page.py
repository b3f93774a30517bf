"""The page: runs to tables and figures to one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ropewalk.config.evaluation import CompareConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.paper import read_published
from ropewalk.figures.evaluation_curves import benchmark_figure, position_figures, retrieval_figure
from ropewalk.figures.figure import Figure, Panel, check_formats, write_figure
from ropewalk.figures.needle_grid import needle_figures
from ropewalk.figures.page_svg import panel_svg
from ropewalk.figures.spectrum.attention_kernel import kernel_figure, semantic_figure
from ropewalk.figures.spectrum.spectra import coverage_figure, spectra_figure
from ropewalk.figures.style import Style
from ropewalk.figures.training_curves import throughput_figure, training_figures
from ropewalk.files import write_atomically
from ropewalk.report import figure_tables
from ropewalk.report.benchmarks import SUITES, Suite, benchmark_section, short_context_section
from ropewalk.report.noise.decisions import decision_section
from ropewalk.report.noise.noise_floor import noise_among
from ropewalk.report.overview import limits, opening_section, runs_section, training_summary
from ropewalk.report.published import published_section
from ropewalk.report.results_section import effective_section, is_at_chance, results_section
from ropewalk.report.runs import Run, load_runs, of_text, once, with_bases
from ropewalk.report.section import UNKNOWN_NOISE, Block, Cell, Section, as_text
from ropewalk.report.seeds import arms, one_run_each, styles_of
from ropewalk.report.vision_section import vision_section

TEMPLATES = Path(__file__).parent / "templates"
CAPTIONS = "captions.md"
MOST_RUNS = 12  # small panels and colours carry no more spectra
TIMES_TRAINED = 4  # target length of the spectra, where no evaluation went further


def compare(config: CompareConfig) -> Path:
    """Write the report of ``config.runs`` to ``config.output`` and print its results table.

    Returns:
        Path of the report.

    Raises:
        UserError: for a run directory that holds nothing, a baseline that is none of the runs, an output that is a
            directory, a format that figures do not have, or a threshold that is not a percentage.
    """
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"output={output} is a directory; name a file in it: output={output / 'report.html'}")
    check_files(config.figures, config.figure_formats)
    for name in ("effective_needle", "effective_ruler"):
        if not 0 < getattr(config, name) <= 100:
            raise UserError(f"{name}={getattr(config, name)} is not a percentage; give one above 0 and up to 100")
    runs = with_bases(load_runs(config.runs), config.base)
    baseline = find_baseline(runs, config.baseline)
    sections = sections_of(config, runs, baseline)
    page = page_html(config.title, runs, baseline, sections, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    if config.figures is not None:
        files = write_figures(sections, Path(config.figures), config.figure_formats)
        print(f"figures: {len(files)} files in {Path(config.figures).resolve()}", flush=True)
    if (summary := training_summary(runs)) is not None:
        print(f"{as_text(summary)}\n", flush=True)
    for section in sections:
        if section.on_terminal:
            print(f"{as_text(section)}\n", flush=True)
    figures = "" if config.figures else "; figures=DIR writes every figure as a file, for papers"
    print(f"report: {output.resolve()}\nnext: open it in a browser{figures}", flush=True)
    return output


def find_baseline(runs: list[Run], name: str | None) -> Run:
    """The run called ``name``; the first where it is None.

    Raises:
        UserError: where no run, or more than one, is called so.
    """
    if name is None:
        return runs[0]
    exact = [run for run in runs if run.name == name]
    named = exact or once([run for run in runs if run.is_called(name)])
    if len(named) != 1:
        names = ", ".join(run.name for run in runs)
        raise UserError(f"baseline={name} names {len(named)} of the runs, and must name one; use one of: {names}")
    return next(run for run in runs if run.is_same(named[0]) and (not exact or run is exact[0]))


def sections_of(config: CompareConfig, runs: list[Run], baseline: Run) -> list[Section]:
    """The sections after the opening, in their order; those that no run has anything for are left out."""
    styles, trained = styles_of(runs), once(runs)
    spectra = one_run_each(arms(trained))
    is_text = of_text(runs)
    sections = [
        decision_section(runs),
        results_section(runs, baseline) if is_text or any(run.left_out for run in runs) else None,
        noise_among(runs),
        effective_section(runs, config.effective_needle, config.effective_ruler),
        _training(trained, styles),
        _position(runs, baseline, styles) if is_text else None,
        _needle(runs, styles) if is_text else None,
        vision_section(runs),
        *(_benchmark(runs, suite, styles) for suite in SUITES),
        short_context_section(runs, baseline),
        published_section(runs, read_published(config.published, "published")) if config.published else None,
        _spectra(spectra, baseline, styles),
        _spectrum_effects(spectra, baseline, styles),
        _throughput(trained, styles),
        runs_section(runs, baseline),
    ]
    return [section for section in sections if section is not None]


def _training(runs: list[Run], styles: dict[str, Style]) -> Section:
    missing = [f"{run.name}: no metrics.jsonl, so no training curve." for run in runs if not len(run.metrics)]
    figures = training_figures(figure_tables.metrics_table(runs), styles)
    return Section("Training curves", figures=figures, missing=missing)


def _position(runs: list[Run], baseline: Run, styles: dict[str, Style]) -> Section:
    curves = figure_tables.curve_table(runs)
    differences, unpaired = figure_tables.difference_table(runs, baseline)
    lengths, drawn = figure_tables.trained_lengths(runs), set(curves["run"])
    missing = [f"{run.name}: no loss by position in its results." for run in runs if run.name not in drawn]
    figures = position_figures(curves, differences, lengths, styles, baseline.name, baseline.label)
    return Section("Loss by position", figures=figures, missing=missing + unpaired)


def _needle(runs: list[Run], styles: dict[str, Style]) -> Section:
    """The share found at each length, and grids above chance; those at chance, which show nothing, are folded away."""
    cells, pooled = figure_tables.needle_tables(runs)
    missing = [f"{run.name}: no needle grid in its results." for run in runs if run.name not in set(cells["run"])]
    chance = [run.name for run in runs if is_at_chance(run)]
    lengths = figure_tables.trained_lengths(runs) | figure_tables.trained_lengths(once(runs))
    by_length = retrieval_figure(figure_tables.retrieval_rows(runs), lengths, styles)
    shown, folded = (
        needle_figures(
            cells[cells["run"].isin(chance) == at_chance],
            pooled[pooled["run"].isin(chance) == at_chance],
            figure_tables.trained_lengths(runs),
        )
        for at_chance in (False, True)
    )
    shown = [*([by_length] if by_length else []), *shown]
    return Section(
        "Needle in a haystack", figures=shown, folded_figures=folded, folded_title="Grids at chance", missing=missing
    )


def _benchmark(runs: list[Run], suite: Suite, styles: dict[str, Style]) -> Section | None:
    section = benchmark_section(runs, suite)
    if section is not None:
        averages, tasks = figure_tables.average_table(runs, suite)
        figure = benchmark_figure(suite.title, averages, tasks, figure_tables.trained_lengths(runs), styles)
        section.figures.extend([figure] if figure else [])
    return section


def _spectra(runs: list[Run], baseline: Run, styles: dict[str, Style]) -> Section:
    spectra, marked = figure_tables.run_spectra(runs), figure_tables.marked_lengths(runs)
    missing = [f"{run.name}: no inv_freq in run.json, so no spectrum." for run in runs if run.inv_freq is None]
    length = baseline.trained_length or 1
    figures = (
        [spectra_figure(spectra, train_length=length, target_length=length, marked=marked, styles=styles)]
        if spectra
        else []
    )
    return Section("Spectra", figures=figures, missing=missing)


def _spectrum_effects(runs: list[Run], baseline: Run, styles: dict[str, Style]) -> Section | None:
    """Kernel, unseen phases and similarity of every run with a spectrum, to the longest length evaluated.

    The training length marked is the baseline's, or the longest of the runs if it has none; no section if no run
    knows one.
    """
    known = [run for run in runs if run.inv_freq is not None]
    known, left_out = known[:MOST_RUNS], known[MOST_RUNS:]
    lengths = [run.trained_length for run in [baseline, *runs] if run.trained_length]
    if not known or not lengths:
        return None
    train_length = baseline.trained_length or max(lengths)
    evaluated = [int(run.results["context_length"].max()) for run in known if len(run.results)]
    target_length = max([TIMES_TRAINED * train_length, *evaluated])
    spectra = figure_tables.run_spectra(known)
    figures = [
        draw(spectra, train_length=train_length, target_length=target_length, styles=styles)
        for draw in (kernel_figure, coverage_figure, semantic_figure)
    ]
    others = [
        f"{run.name} at {run.trained_length:,}" for run in known if run.trained_length not in (None, train_length)
    ]
    missing = [f"Trained at other than the {train_length:,} tokens marked: {', '.join(others)}."] if others else []
    missing += (
        [f"Not drawn, as more would be too small: {', '.join(run.name for run in left_out)}."] if left_out else []
    )
    return Section("What the spectra do", figures=figures, missing=missing)


def _throughput(runs: list[Run], styles: dict[str, Style]) -> Section:
    missing = [f"{run.name}: no metrics.jsonl, so no throughput." for run in runs if not len(run.metrics)]
    figure = throughput_figure(figure_tables.metrics_table(runs), styles)
    return Section("Throughput", figures=[figure] if figure else [], missing=missing)


def check_files(directory: str | None, formats: Sequence[str]) -> None:
    """Raise UserError where figures could not be written into ``directory``; before anything is drawn."""
    if directory is None:
        return
    check_formats("figure_formats", formats)
    if Path(directory).exists() and not Path(directory).is_dir():
        raise UserError(f"figures={directory} is a file; name a directory")


def write_figures(sections: Sequence[Section], directory: Path, formats: Sequence[str]) -> list[Path]:
    """Write each figure in every format, without words in it, and its words and numbers into captions.md.

    Two calls on the same runs write the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written, captions = [], []
    for name, figure in _named_figures(sections):
        written += write_figure(figure, directory, formats, words=False, name=name)
        captions.append(f"**{name}** {figure.title}. {figure.explanation}\n")
        if figure.numbers is not None:
            captions.append(_markdown(figure.numbers))
    write_atomically(directory / CAPTIONS, "\n".join(captions))
    return written


def _named_figures(sections: Sequence[Section]) -> Iterator[tuple[str, Figure]]:
    """Every figure by its file name, numbered where that is taken."""
    taken: set[str] = set()
    for section in sections:
        for figure in (*section.figures, *section.folded_figures):
            name = next(n for i in count(1) if (n := figure.name if i == 1 else f"{figure.name}_{i}") not in taken)
            taken.add(name)
            yield name, figure


def _markdown(numbers: pd.DataFrame) -> str:
    rows = [["", *map(str, numbers.columns)], ["---"] * (1 + len(numbers.columns))]
    rows += [[str(cell) for cell in row] for row in numbers.itertuples(name=None)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows) + "\n"


def page_html(title: str, runs: list[Run], baseline: Run, sections: list[Section], output: Path) -> str:
    """The page at ``output`` as HTML text; everything that comes from data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count(1)

    def svg(panel: Panel, figure: Figure) -> Markup:
        return Markup(panel_svg(figure, panel, f"p{next(numbers)}"))

    environment.filters |= {"svg": svg, "blocks": numbers_blocks}
    return environment.get_template("report.html").render(
        title=title,
        opening=opening_section(runs, baseline),
        limits=limits(runs, baseline),
        sections=sections,
        links={name: link_to(run, output) for run in runs for name in (run.name, run.label, f"{run.name} (base)")},
        unknown_noise=UNKNOWN_NOISE,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        javascript=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    )


def link_to(run: Run, output: Path) -> str:
    """The run's directory as seen from the report; "": it is not on this disk."""
    return quote(os.path.relpath(run.directory, output.parent)) + "/" if run.directory.is_dir() else ""


def numbers_blocks(numbers: pd.DataFrame) -> list[Block]:
    """A figure's numbers as the page shows tables."""
    return [Block("", [(str(row[0]), [Cell(str(cell)) for cell in row[1:]]) for row in numbers.itertuples(name=None)])]
