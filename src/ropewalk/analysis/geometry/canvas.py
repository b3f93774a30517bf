"""What the geometry figures share: a sheet of panels, lines for lengths and sides of RoPE, saving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ropewalk.analysis.figures.style import GREY, PALETTE, canvas, finish, render, tokens

SIDES = {"before": "before RoPE", "after": "after RoPE"}
DASHES: dict[str, Any] = {"before": (0, (3, 1.6)), "after": "-"}
NARROWEST = 6.4  # inches; a heading needs room


class Sheet:
    """Panels in rows and columns under one sentence, made within the house style.

    Args:
        rows: of panels.
        columns: of panels.
        width: of a panel, inches.
        height: of a panel, inches.
        share_y: one scale for each row or for all panels, or each panel its own.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        width: float = 3.6,
        height: float = 2.1,
        share_y: Literal["none", "row", "all"] = "row",
    ) -> None:
        self.figure = canvas(max(width * columns, NARROWEST) + 0.6, height * rows + 0.2)
        self.panels: NDArray[Any] = self.figure.subplots(rows, columns, sharey=share_y, squeeze=False)

    def words(self, title: str, caption: str, legend: Iterable[Line2D] = ()) -> Sheet:
        """One sentence over the panels that says what to see, what is drawn under them; the figure grows by both."""
        finish(self.figure, title, caption, extra=legend)
        return self

    def save(self, output: Path, name: str, formats: Iterable[str]) -> list[Path]:
        """Write the figure in every format; returns the paths."""
        paths = {kind: output / f"{name}.{kind}" for kind in formats}
        for kind, path in paths.items():
            path.write_bytes(render(self.figure, kind))
        return list(paths.values())


def length_colors(lengths: Sequence[int]) -> dict[int, str]:
    """A colour for each length."""
    return {length: PALETTE[i % len(PALETTE)] for i, length in enumerate(lengths)}


def line(name: str, color: str, dash: Any = "-", marker: str = "") -> Line2D:
    """A legend entry."""
    return Line2D([], [], color=color, linestyle=dash, marker=marker, markersize=4, label=name)


def rope_legend(lengths: Sequence[int]) -> list[Line2D]:
    """Entries for lengths by colour and the sides of RoPE by dash."""
    colors = length_colors(lengths)
    entries = [line(f"{tokens(length)} tokens", colors[length]) for length in lengths]
    return [*entries, *(line(SIDES[rope], GREY, DASHES[rope]) for rope in ("after", "before"))]


def reference(panel: Axes, value: float, name: str) -> None:
    """A dotted line with its name under it, at the right."""
    panel.axhline(value, color=GREY, linestyle=":", linewidth=1.0)
    panel.annotate(
        name,
        (0.98, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )


def log_bins(values: NDArray[np.floating], exact: int = 32, bins: int = 72) -> tuple[NDArray[Any], NDArray[Any]]:
    """Positions and means of ``values``: the first ``exact`` one by one, then in bins of equal width on a log scale."""
    edges = np.unique(np.geomspace(exact, values.size, bins).astype(int)) if values.size > exact else np.array([])
    singles = np.arange(min(exact, values.size))
    starts, ends = edges[:-1], edges[1:]
    middles = np.sqrt(starts * (ends - 1.0)) if edges.size else np.array([])
    means = [values[start:end].mean() for start, end in zip(starts, ends, strict=True)]
    return np.concatenate([singles, middles]), np.concatenate([values[: singles.size], means])
