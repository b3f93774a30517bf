"""Visuals: the images and videos behind the placeholder tokens of a packed sequence, and how a store keeps them.

A domain with visuals has two index files, and beside each token file one of pixels or embeddings (``media-00000.bin``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.errors import UserError

# Columns of the index, int64 (visuals, 10): the visual's own numbers, its first byte in the media file, its content: 1
# and the pixels' frames, height and width, or 0 and an embedding's width, 0, 0.
COLUMNS = ("start", "frames", "height", "width", "microseconds", "offset", "is_pixels", "first", "second", "third")
Content = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Visual:
    """One image or video in a packed sequence.

    Attributes:
        start: its first placeholder token, counted from the beginning of the sequence or row that it lies in.
        frames: of the grid of its tokens, after the tower has merged patches; 1: an image.
        height: rows of the grid.
        width: columns of the grid.
        content: uint8 (pixel frames, pixel height, pixel width, 3), RGB as the tower takes it; an image has one frame.
            Or the tower's output, uint16 (tokens, width) with the bits of bfloat16.
        frame_seconds: time from one frame of the grid to the next, to the microsecond; 0: an image.
    """

    start: int
    frames: int
    height: int
    width: int
    content: Content
    frame_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Placeholder tokens: frames x height x width."""
        return self.frames * self.height * self.width

    @property
    def end(self) -> int:
        """The token after its last placeholder."""
        return self.start + self.tokens

    @property
    def has_pixels(self) -> bool:
        """True if it holds pixels, False if embeddings."""
        return self.content.dtype == np.uint8

    def moved(self, tokens: int) -> Visual:
        """The same visual, ``tokens`` further on."""
        return replace(self, start=self.start + tokens)


def visual_row(visual: Visual, offset: int) -> tuple[int, ...]:
    """The visual as a row of the index; see COLUMNS."""
    shape = visual.content.shape[:3] if visual.has_pixels else (visual.content.shape[1], 0, 0)
    own = (visual.start, visual.frames, visual.height, visual.width, round(visual.frame_seconds * 1e6))
    return (*own, offset, int(visual.has_pixels), *shape)


def read_visual(row: NDArray[np.int64], media: NDArray[np.uint8]) -> Visual:
    """The visual of a row of the index.

    Args:
        row: (10,); see COLUMNS.
        media: bytes of the media file.
    """
    start, frames, height, width, microseconds, offset, is_pixels, first, second, third = row.tolist()
    tokens = frames * height * width
    shape = (first, second, third, 3) if is_pixels else (tokens, first)
    dtype = np.dtype(np.uint8 if is_pixels else "<u2")
    part = np.array(media[offset : offset + int(np.prod(shape)) * dtype.itemsize])
    return Visual(start, frames, height, width, part.view(dtype).reshape(shape), microseconds / 1e6)


def stored_bytes(visual: Visual) -> bytes:
    """The content as the media file has it."""
    return np.ascontiguousarray(visual.content, np.uint8 if visual.has_pixels else "<u2").tobytes()


def check_visuals(
    visuals: Sequence[Visual], ends: NDArray[np.int32], loss_mask: NDArray[np.bool_] | None, where: str
) -> None:
    """Check the visuals of a sequence: in order, apart, each inside one document, none of their tokens trained.

    Args:
        visuals: of the sequence.
        ends: where each of its documents ends.
        loss_mask: bool (tokens,), True where a token is trained.
        where: of the sequence, for the message.

    Raises:
        UserError: naming the visual.
    """
    for visual, following in pairwise(visuals):
        if following.start < visual.end:
            raise UserError(
                f"{where} has visuals at {visual.start} and {following.start}, which overlap or are not in order"
            )
    for number, visual in enumerate(visuals):
        kind = f"visual {number} of {where}"
        sizes = (visual.frames, visual.height, visual.width)
        if min(sizes) < 1 or not _fits(visual):
            raise UserError(
                f"{kind} has a grid of {sizes} tokens and content of {visual.content.dtype} {visual.content.shape}; "
                "give it pixels, uint8 (frames, height, width, 3), or embeddings, uint16 (tokens, width)"
            )
        document = int(np.searchsorted(ends, visual.start, side="right"))
        if visual.start < 0 or document == len(ends) or visual.end > ends[document]:
            raise UserError(
                f"{kind} takes the tokens {visual.start} .. {visual.end - 1}, which are not of one document"
            )
        if loss_mask is None or loss_mask[visual.start : visual.end].any():
            raise UserError(f"{kind}: its placeholders would be trained; give the sequence a loss mask without them")


def _fits(visual: Visual) -> bool:
    content: NDArray[Any] = visual.content
    if content.dtype == np.uint8:
        return content.ndim == 4 and content.shape[3] == 3 and min(content.shape) > 0
    return content.dtype == np.uint16 and content.ndim == 2 and content.shape[0] == visual.tokens
