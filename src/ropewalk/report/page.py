"""The page: runs in, one self-contained HTML file out."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ropewalk.config.evaluation import CompareConfig
from ropewalk.errors import UserError
from ropewalk.files import write_atomically
from ropewalk.report import runs_table, summary
from ropewalk.report.base import with_bases
from ropewalk.report.figures import RunStyle, styles_of
from ropewalk.report.files import check_files, write_figures
from ropewalk.report.runs import Run, load_runs
from ropewalk.report.sections import Section, sections_of
from ropewalk.report.seeds import arms
from ropewalk.report.table import Table, as_text

TEMPLATES = Path(__file__).parent / "templates"


def compare(config: CompareConfig) -> Path:
    """Write the report of ``config.runs`` to ``config.output`` and print its results table.

    Returns:
        Path of the report.

    Raises:
        UserError: for a run directory that holds nothing, a baseline that is none of the runs, an output that is a
            directory, a format that figures do not have, or a threshold that is no percentage.
    """
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"output={output} is a directory; name a file in it: output={output / 'report.html'}")
    check_files(config.figures, config.figure_formats)
    for name in ("effective_needle", "effective_ruler"):
        if not 0 < getattr(config, name) <= 100:
            raise UserError(f"{name}={getattr(config, name)} is no percentage; give one above 0 and up to 100")
    runs = with_bases(load_runs(config.runs), config.base)
    baseline = find_baseline(runs, config.baseline)
    styles = styles_of(arms(runs))
    sections = sections_of(config, runs, baseline, styles)
    page = render(config.title, runs, baseline, styles, sections)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    if config.figures is not None:
        files = write_figures(sections, styles, Path(config.figures), config.figure_formats)
        print(f"figures: {len(files)} files in {Path(config.figures).resolve()}", flush=True)
    for table in sections:
        if isinstance(table, Table) and table.on_terminal:
            print(f"{as_text(table)}\n", flush=True)
    print(f"report: {output.resolve()}", flush=True)
    return output


def find_baseline(runs: list[Run], name: str | None) -> Run:
    """The run called ``name``; the first where it is None.

    Raises:
        UserError: where no run, or more than one, is called so.
    """
    if name is None:
        return runs[0]
    found = [run for run in runs if run.is_called(name)]
    if len(found) != 1:
        names = ", ".join(run.name for run in runs)
        raise UserError(f"baseline={name} names {len(found)} of the runs, and must name one; use one of: {names}")
    return found[0]


def render(title: str, runs: list[Run], baseline: Run, styles: dict[str, RunStyle], sections: list[Section]) -> str:
    """The page as HTML text; everything that comes from data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count(1)
    environment.globals["next_number"] = lambda: next(numbers)
    environment.filters["figure_json"] = figure_json
    return environment.get_template("report.html").render(
        title=title,
        runs=runs,
        styles=styles,
        findings=summary.findings(runs, baseline),
        limits=summary.limits(runs, baseline),
        sections=sections,
        facts=runs_table.facts(runs),
        differences=runs_table.differences(runs, baseline),
        without_config=[run.name for run in runs if not run.config],
        baseline=baseline,
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        javascript=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        plotly_javascript=Markup(get_plotlyjs()),
    )


def figure_json(plot: go.Figure) -> Markup:
    """A plot as JSON for a script element, which no text in it can end: plotly escapes <, > and /."""
    return Markup(plot.to_json())
