"""Axes of the rotary pairs: which coordinate of a token (time, height or width) each pair turns with.

Text has one position a token, an image or a video three. A layout hands out the pairs; a stock engine reads it from
``mrope_section``. How the coordinates themselves are counted is the business of :mod:`ropewalk.rope.video_positions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ropewalk.errors import UserError
from ropewalk.rope.values import wrong

IntArray = NDArray[np.int64]
Layout = Literal["bands", "alternating", "interleaved"]
Rule = Literal["mrope", "mrope_v5", "diagonal", "index"]
TIME, HEIGHT, WIDTH = 0, 1, 2

# model_type of a stock class -> the section that it takes where its config names none. Their text configs are the same
# with "_text" after it.
READ_BANDS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24)}
READ_INTERLEAVED = {"qwen3_vl": (24, 20, 20), "qwen3_vl_moe": (24, 20, 20)}


@dataclass(frozen=True)
class PairAxes:
    """The axis that each rotary pair reads, and the rule by which images and videos are given positions.

    Attributes:
        layout: ``bands``: time on the fastest pairs, then height, then width (M-RoPE, Qwen2-VL). ``alternating``:
            height and width in turn on the fastest pairs, time on the slowest (VideoRoPE, HoPE). ``interleaved``: time,
            height, width in turn, and time for the rest (Qwen3-VL).
        section: pairs that read time, height and width; they add up to d/2.
        positions: see :data:`ropewalk.rope.video_positions.RULES`.
        temporal_scales: positions from one frame to the next under ``diagonal``; of several, training draws one for
            each video.
    """

    layout: Layout
    section: tuple[int, int, int]
    positions: Rule
    temporal_scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        _check_section(self.layout, self.section)
        _check_scales(self.positions, self.temporal_scales)

    def __str__(self) -> str:
        time, height, width = self.section
        counts = f"{time} pairs read time, {height} height, {width} width"
        return f"{self.layout}: {counts}; positions {self.positions}"

    @property
    def of_pairs(self) -> IntArray:
        """int64 (d/2,), 0 for time, 1 for height, 2 for width, the fastest pair first."""
        return _axis_of_pairs(self.layout, self.section)

    def is_read_by(self, model_type: str) -> bool:
        """True if transformers' class for the model type gives the pairs these axes; others ignore them in silence."""
        return _kind(model_type) in (READ_INTERLEAVED if self.layout == "interleaved" else READ_BANDS)

    def stock_keys(self) -> dict[str, Any]:
        """The keys of a stock rope_parameters entry that say the same.

        The numbers of ``mrope_section`` are runs of pairs that read time, height, width, time, ... transformers 4
        doubles the list over both halves of the head, so its length must be a multiple of three: 73 numbers in the
        place of 75 start the second half on another axis, silently.
        """
        if self.layout == "interleaved":
            return {"mrope_section": list(self.section), "mrope_interleaved": True}
        runs: list[int] = []
        for axis, pairs in groupby(self.of_pairs.tolist()):
            runs += [0] * ((axis - len(runs)) % 3)
            runs.append(len(list(pairs)))
        return {"mrope_section": runs + [0] * (-len(runs) % 3)}

    @property
    def step(self) -> dict[str, Any]:
        """The chain's step ``axes``."""
        scales = None if self.temporal_scales == (1.0,) else list(self.temporal_scales)
        return {
            "method": "axes",
            "layout": self.layout,
            "positions": self.positions,
            "section": list(self.section),
            "temporal_scales": scales,
        }


def axis_letters(axes: IntArray | None) -> str:
    """The axis of each pair as a letter, ``tthhww``; "none" for text alone."""
    return "none" if axes is None else "".join("thw"[axis] for axis in axes)


def quarter_section(pairs: int) -> list[int]:
    """A quarter of the pairs, rounded up, for time, the rest for height and width, height first: 16, 24, 24 of 64.

    Rounded up, it is what p_rope(fraction=0.75), which rounds down, leaves standing still.
    """
    time = -(-pairs // 4)
    width = (pairs - time) // 2
    return [time, pairs - time - width, width]


def read_stock_axes(model_type: str | None, entry: Mapping[str, Any], pairs: int) -> PairAxes | None:
    """The axes of a config.json, as transformers' class for its model type reads them; None: text alone.

    A section says nothing of the rule for positions, so it is read as ``mrope``, the rule that these models were
    released with.

    Args:
        model_type: of the model or its text model.
        entry: its rope_parameters.
        pairs: d/2.

    Raises:
        UserError: for a section of another number of pairs, or one that no layout gives.
    """
    kind = _kind(model_type)
    if kind not in READ_BANDS | READ_INTERLEAVED:
        return None
    numbers = entry.get("mrope_section") or (READ_BANDS | READ_INTERLEAVED)[kind]
    if not isinstance(numbers, Sequence) or not all(type(number) is int and number >= 0 for number in numbers):
        raise wrong("mrope_section", numbers, "a list of numbers of pairs; write it as the model was published")
    if sum(numbers) != pairs:
        absent = "" if entry.get("mrope_section") else " (the class's own, as the config has none)"
        raise wrong("mrope_section", numbers, f"numbers that add up to the {pairs} pairs of a head{absent}; correct it")
    if kind in READ_INTERLEAVED:
        return PairAxes("interleaved", tuple(numbers), "mrope")
    axis = np.repeat(np.arange(len(numbers)) % 3, numbers)
    section = tuple(np.bincount(axis, minlength=3).tolist())
    layouts: tuple[Layout, ...] = ("bands", "alternating")
    for layout in layouts:
        if np.array_equal(axis, _axis_of_pairs(layout, section)):
            return PairAxes(layout, section, "mrope")
    raise wrong("mrope_section", numbers, f"the runs of a layout that is known: {', '.join(layouts)}")


def _kind(model_type: str | None) -> str:
    return str(model_type).removesuffix("_text")


def _axis_of_pairs(layout: Layout, section: Sequence[int]) -> IntArray:
    time, height, width = section
    if layout == "bands":
        return np.repeat([TIME, HEIGHT, WIDTH], section)
    if layout == "alternating":
        spatial = HEIGHT + np.arange(height + width) % 2
        return np.concatenate([spatial, np.full(time, TIME)])
    axis = np.full(sum(section), TIME)
    axis[1 : 3 * height : 3], axis[2 : 3 * width : 3] = HEIGHT, WIDTH
    return axis


def _check_section(layout: Layout, section: Sequence[int]) -> None:
    if layout not in get_args(Layout):
        raise UserError(f"axes: layout={layout} is not known; use one of: {', '.join(get_args(Layout))}")
    if len(section) != 3 or min(section) < 0:
        raise UserError(f"axes: section={list(section)} must be the pairs of time, height and width, three numbers")
    counts = np.bincount(_axis_of_pairs(layout, section), minlength=3).tolist()
    if counts != list(section):
        raise UserError(
            f"axes: layout={layout} cannot hold section={list(section)}, it gives {counts} pairs to time, height and "
            f"width; write these, or section=auto"
        )


def _check_scales(positions: Rule, scales: Sequence[float]) -> None:
    if positions not in get_args(Rule):
        raise UserError(f"axes: positions={positions} is not known; use one of: {', '.join(get_args(Rule))}")
    if not scales or min(scales) <= 0:
        raise UserError(f"axes: temporal_scales={list(scales)} must be positive numbers, one or more; 1 is unscaled")
    if positions != "diagonal" and tuple(scales) != (1.0,):
        raise UserError(
            f"axes: temporal_scales={list(scales)} have no meaning under positions={positions}, where each frame takes "
            "a whole position; leave them out, or use positions=diagonal"
        )
