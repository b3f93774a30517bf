"""Positions of tokens in text, images and videos: time, height and width of each token, by rule.

A rule places one grid, and says where what follows it begins. Text takes one position a token, on all three axes. All
numbers are float64: they may be fractional and negative, and bfloat16 would round them (1000.75 to 1000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ropewalk.errors import UserError
from ropewalk.rope.pair_axes import Rule
from ropewalk.rope.spectrum import FloatArray


@dataclass(frozen=True)
class Grid:
    """Tokens of one image or video, frame by frame, row by row.

    Attributes:
        frames: that the language model sees, after the tower has merged patches; 1: an image.
        height: rows of a frame, in tokens.
        width: columns of a frame, in tokens.
        time_step: positions from one frame to the next. ``diagonal``: the temporal scale. ``mrope`` and ``mrope_v5``:
            1, or the tokens a second times the seconds a frame of Qwen2.5-VL. ``index`` does not read it.
    """

    frames: int
    height: int
    width: int
    time_step: float = 1.0

    def __post_init__(self) -> None:
        sizes = (self.frames, self.height, self.width)
        if min(sizes) < 1 or not 0 <= self.time_step < math.inf:
            raise UserError(
                f"a grid of frames, height and width {sizes}, {self.time_step} positions a frame; give it one token or "
                "more along each, and a time step that is not negative"
            )

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return self.frames * self.height * self.width

    @property
    def indices(self) -> FloatArray:
        """Frame, row and column of each token, float64 (3, tokens), counted from 0."""
        return np.indices((self.frames, self.height, self.width), dtype=np.float64).reshape(3, -1)


Segment = int | Grid  # text of so many tokens, or a grid
Placed = tuple[FloatArray, float]  # positions of a grid, float64 (3, tokens), and of the token after it


def mrope(start: float, grid: Grid) -> Placed:
    """M-RoPE as released (Qwen2-VL, arXiv 2409.12191, section 2.1): what follows begins one past the largest position.

    t = p + floor(s k), h = p + i, w = p + j; s is 1 but for Qwen2.5-VL's videos (arXiv 2502.13923, section 2.1.2),
    where transformers 4.57.3 drops the fraction of the seconds a frame.
    """
    positions = _from_corner(start, grid)
    return positions, float(positions.max()) + 1


def mrope_v5(start: float, grid: Grid) -> Placed:
    """M-RoPE in transformers 5: the same grid, and what follows begins at p + max(height, width).

    A video of more frames than rows and columns then reaches past the beginning of the text behind it
    (``Qwen2VLModel.get_rope_index`` of 5.23.0).
    """
    return _from_corner(start, grid), start + max(grid.height, grid.width)


def diagonal(start: float, grid: Grid) -> Placed:
    """VideoRoPE (arXiv 2502.05173) and HoPE (arXiv 2505.20444): frames centred on a diagonal through the text.

    t = p + s k, h = t + i - floor((H - 1) / 2), w = t + j - floor((W - 1) / 2); what follows begins one past the last
    frame's t, as the published code has it. s is the temporal scale.
    """
    frame, row, column = grid.indices
    time = start + grid.time_step * frame
    height, width = (grid.height - 1) // 2, (grid.width - 1) // 2
    return np.stack([time, time + row - height, time + column - width]), float(time[-1]) + 1


def index(start: float, grid: Grid) -> Placed:
    """One dimension: each token takes the next position on all three axes, as in text."""
    return _along(start, grid.tokens), start + grid.tokens


RULES: dict[Rule, Callable[[float, Grid], Placed]] = {
    "mrope": mrope,
    "mrope_v5": mrope_v5,
    "diagonal": diagonal,
    "index": index,
}


def token_positions(rule: Rule, segments: Iterable[Segment]) -> Placed:
    """Positions of every token of a document, and of the one that would come next.

    Args:
        rule: a name in RULES.
        segments: the document's parts in order: tokens of a stretch of text, or a Grid.

    Returns:
        float64 (3, tokens): time, height, width, from 0; and the position at which text would go on.
    """
    parts, start = [np.empty((3, 0))], 0.0
    for segment in segments:
        if isinstance(segment, Grid):
            positions, following = RULES[rule](start, segment)
        else:
            positions, following = _along(start, segment), start + segment
        parts.append(positions)
        start = following
    return np.concatenate(parts, axis=1), start


def _along(start: float, tokens: int) -> FloatArray:
    return np.tile(start + np.arange(tokens, dtype=np.float64), (3, 1))


def _from_corner(start: float, grid: Grid) -> FloatArray:
    frame, row, column = grid.indices
    return start + np.stack([np.floor(grid.time_step * frame), row, column])
