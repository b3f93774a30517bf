"""Draw figures by name into files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ropewalk.analysis.figures.clips import clips_figure
from ropewalk.analysis.figures.decay import decay_figure
from ropewalk.analysis.figures.kernel import kernel_figure, semantic_figure
from ropewalk.analysis.figures.leakage import leakage_figure
from ropewalk.analysis.figures.phases import coverage_figure, phases_figure
from ropewalk.analysis.figures.response import read_responses
from ropewalk.analysis.figures.spectra import spectra_figure
from ropewalk.analysis.figures.style import NO_DATE, render
from ropewalk.analysis.figures.textbook import textbook_figure
from ropewalk.analysis.subjects import spectra_of
from ropewalk.config.analysis import FiguresConfig
from ropewalk.config.rules import one_of
from ropewalk.errors import UserError
from ropewalk.files import replace_atomically

FIGURES: dict[str, Callable[..., Figure]] = {
    "spectra": spectra_figure,
    "kernel": kernel_figure,
    "leakage": leakage_figure,
    "coverage": coverage_figure,
    "semantic": semantic_figure,
    "phases": phases_figure,
    "textbook": textbook_figure,
    "clips": clips_figure,
    "decay": decay_figure,
}
ALL = "figures"
MOST_METHODS = 12  # small panels and colours carry no more
SHORTEST, LONGEST = 64, 2**22  # tokens: below, no axis is left; above, the clip figure takes minutes


def draw(name: str, config: FiguresConfig) -> list[Path]:
    """Draw one figure, or all of them for ``figures``, as ``<output>/<name>.<format>``; print each path.

    Two calls with the same configuration write the same bytes.

    Args:
        name: a key of ``FIGURES``, or ``figures``.
        config: methods, model, lengths, formats and output.

    Returns:
        The files, in the order they were written.

    Raises:
        UserError: for a name, a format, a length or a method that is not known or possible, before anything is drawn.
    """
    one_of("figure", name, (*FIGURES, ALL))
    _validate(config)
    spectra = spectra_of(config)
    figures = dict(FIGURES)
    if config.results and name in ("clips", ALL):
        figures["clips"] = partial(clips_figure, responses=read_responses(config.results))
    output = _directory(config.output)
    written = []
    for chosen in FIGURES if name == ALL else (name,):
        figure = figures[chosen](spectra, train_length=config.train_length, target_length=config.target_length)
        for kind in config.formats:
            path = output / f"{chosen}.{kind}"
            content = render(figure, kind)
            replace_atomically(path, lambda partial_path, content=content: partial_path.write_bytes(content))  # type: ignore[misc]
            print(path)
            written.append(path)
    return written


def _validate(config: FiguresConfig) -> None:
    if not config.formats:
        raise UserError(f"formats=[] names no format; use some of: {', '.join(NO_DATE)}")
    for kind in config.formats:
        one_of("formats", kind, tuple(NO_DATE))
    count = len(config.methods)
    if not 1 <= count <= MOST_METHODS:
        raise UserError(f"methods has {count} entries; give 1 to {MOST_METHODS}, or draw twice")
    for name in ("train_length", "target_length"):
        length = getattr(config, name)
        if not SHORTEST <= length <= LONGEST:
            raise UserError(f"{name}={length} must be {SHORTEST} to {LONGEST:,} tokens; choose one between")
    if config.target_length <= config.train_length:
        raise UserError(
            f"target_length={config.target_length} must exceed train_length={config.train_length}: the figures are "
            "about what lies beyond training; raise one or lower the other"
        )


def _directory(output: str) -> Path:
    path = Path(output)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be made ({error.strerror}); name a writable directory") from error
    return path
