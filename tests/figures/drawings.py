"""Spectra to draw, and what a drawing shows, read back from its artists."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from ropewalk.figures.figure import Figure, compose
from ropewalk.figures.style import house
from ropewalk.rope import RopeChain, Spectrum

ABF = {"method": "abf", "theta": 1e7}
YARN = {"method": "yarn", "factor": 4, "original_max_position_embeddings": 65536}
CHAINS: dict[str, list[dict]] = {
    "rope": [ABF],
    "hardclip20": [ABF, {"method": "hardclip", "clip": 20}],
    "cope20": [ABF, {"method": "cope", "clip": 20}],
    "cope20+yarn4": [ABF, {"method": "cope", "clip": 20}, YARN],
}
FACTS = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}
LENGTHS = {"train_length": 65536, "target_length": 262144}
ROPE = 1e7 ** (-np.arange(64) / 64)
COPE = ROPE * np.append(np.ones(44), (1 + np.cos(np.pi * np.arange(20) / 19)) / 2)


def sample_spectra() -> dict[str, Spectrum]:
    return {name: RopeChain(chain).spectrum(**FACTS) for name, chain in CHAINS.items()}


def axes_of(figure: Figure) -> list[Axes]:
    """The axes of a figure as files have it, in the order of its panels, without colour bars."""
    return [axes for axes in compose(figure).axes if axes.get_label() != "<colorbar>"]


def curve(axes: Axes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The one line called ``name``; not a faint one behind it, nor a ring or a mark."""
    (line,) = (one for one in axes.lines if one.get_label() == name and one.get_alpha() is None and not one.get_gid())
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def marked(axes: Axes, gid: str) -> tuple[float, float]:
    (line,) = (one for one in axes.lines if one.get_gid() == gid)
    return float(np.asarray(line.get_xdata())[0]), float(np.asarray(line.get_ydata())[0])


def has_mark(axes: Axes, gid: str) -> bool:
    return any(one.get_gid() == gid for one in axes.lines)


def covered_titles(drawing: Drawing) -> list[str]:
    """Titles of panels that some text or legend of theirs lies over."""
    canvas = FigureCanvasAgg(drawing)
    with house():
        canvas.draw()
    renderer, covered = canvas.get_renderer(), []
    for axes in drawing.axes:
        title = axes.title if axes.title.get_text() else axes._left_title
        box = title.get_window_extent(renderer)
        parts = [*axes.texts, *([axes.get_legend()] if axes.get_legend() else [])]
        if title.get_text() and any(box.overlaps(part.get_window_extent(renderer)) for part in parts):
            covered.append(title.get_text())
    return covered


def assert_words_are_whole(figure: Figure) -> None:
    """No text or panel leaves the drawing or lies over another."""
    drawing = compose(figure)
    canvas = FigureCanvasAgg(drawing)
    renderer, frame, rounding = canvas.get_renderer(), drawing.bbox, 1.5  # pixels
    with house():  # ticks follow from the style's font sizes whenever they are asked for
        canvas.draw()  # lays out
        boxes = [text.get_window_extent(renderer) for text in drawing.texts if text.get_text()]
        boxes += [one.get_window_extent(renderer) for one in drawing.legends]
        boxes += [axes.get_tightbbox(renderer) for axes in drawing.axes]
    for box in boxes:
        assert frame.x0 - rounding <= box.x0 <= box.x1 <= frame.x1 + rounding
        assert frame.y0 - rounding <= box.y0 <= box.y1 <= frame.y1 + rounding
    for i, first in enumerate(boxes):
        for second in boxes[i + 1 :]:
            width = min(first.x1, second.x1) - max(first.x0, second.x0)
            height = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert min(width, height) <= rounding
    assert covered_titles(drawing) == []
