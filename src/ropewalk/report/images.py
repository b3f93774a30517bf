"""What the runs' spectra do, as images: the attention kernel, unseen phases, and how far similarity carries."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure

from ropewalk.analysis.figures.report import figures_for_report
from ropewalk.analysis.figures.style import render
from ropewalk.report.runs import Run
from ropewalk.rope import Spectrum
from ropewalk.rope.spectrum import base_of

MOST_RUNS = 12  # small panels and colours carry no more
NAMES = ("kernel", "coverage", "semantic")
TIMES_TRAINED = 4  # target length, where no evaluation went further


@dataclass(frozen=True)
class Image:
    """A figure without words of its own.

    Attributes:
        name: as a file is called.
        title: what is seen, with its numbers.
        caption: how it is drawn.
        figure: of matplotlib.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    @cached_property
    def source(self) -> str:
        """``data:`` address of the PNG."""
        png = render(self.figure, "png", crop=True)
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@dataclass(frozen=True)
class Images:
    """A section of the report that is images."""

    title: str
    images: list[Image]


def spectrum_images(runs: list[Run], baseline: Run) -> Images | None:
    """Kernel, coverage and semantic advantage of every run with a spectrum, to the longest length evaluated.

    The training length marked is the baseline's, or the longest of the runs where it has none; nothing where none of
    them knows it. The captions name the runs trained at another length, and those past ``MOST_RUNS``, which are not
    drawn.
    """
    known = [run for run in runs if run.inv_freq is not None]
    known, left_out = known[:MOST_RUNS], known[MOST_RUNS:]
    lengths = [run.trained_length for run in [baseline, *runs] if run.trained_length]
    if not known or not lengths:
        return None
    train_length = baseline.trained_length or max(lengths)
    evaluated = [int(run.results["context_length"].max()) for run in known if len(run.results)]
    target_length = max([TIMES_TRAINED * train_length, *evaluated])
    more = _of_other_lengths(known, train_length)
    more += f" Not drawn, for want of room: {', '.join(run.name for run in left_out)}." if left_out else ""
    pages = figures_for_report({run.name: _spectrum(run) for run in known}, train_length, target_length)
    # The first is the page's own figure of the spectra.
    return Images(
        "What the spectra do",
        [
            Image(name, title, caption + more, figure)
            for name, (title, caption, figure) in zip(NAMES, pages[1:], strict=True)
        ],
    )


def _of_other_lengths(runs: list[Run], marked: int) -> str:
    others = [f"{run.name} at {run.trained_length:,}" for run in runs if run.trained_length not in (None, marked)]
    return f" Trained at other than the {marked:,} tokens marked: {', '.join(others)}." if others else ""


def _spectrum(run: Run) -> Spectrum:
    """The run's spectrum; its base is read off the ratio of the first two frequencies, as for any RoPE vector."""
    inv_freq = run.inv_freq
    assert inv_freq is not None
    theta = base_of(inv_freq) or 1e4
    settings = run.evaluation.get("settings") or [{}]
    scaling = run.record.get("attention_scaling", settings[0].get("attention_scaling", 1.0))
    trained = run.trained_length or 1
    return Spectrum(inv_freq, theta, run.pretrained_length or trained, trained, attention_scaling=float(scaling))
