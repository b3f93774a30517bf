"""Frames of a video or an image file, sampled in time and resized for a vision tower (PyAV, extra ``video``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.data import FrameConfig, TowerConfig
from ropewalk.data.store.visuals import Content
from ropewalk.errors import UserError

MOST_ELONGATED = 200  # sides of a frame, as Qwen2-VL's processor has it
TICK = 1e-6  # seconds that a file may round a time by
LATE = 1.0  # seconds that a file may say it is longer than its frames, as by its sound


@dataclass(frozen=True)
class Footage:
    """Frames as a tower takes them, and the grid of tokens that they become.

    Attributes:
        pixels: uint8 (frames, height, width, 3), RGB; one frame is an image. Or a tower's output, uint16 (tokens,
            channels) with the bits of bfloat16.
        grid: frames, rows and columns of tokens.
        frame_seconds: from one frame of the grid to the next; 0: an image.
    """

    pixels: Content
    grid: tuple[int, int, int]
    frame_seconds: float


@dataclass(frozen=True)
class Example:
    """One visual with what is asked and answered about it, as text."""

    footage: Footage
    question: str
    answer: str


def read_footage(path: Path, tower: TowerConfig, config: FrameConfig, size: tuple[int, int] | None = None) -> Footage:
    """The frames of a file: ``fps`` a second, evenly spaced ones where these are too many; the last fills the grid.

    Frames are resized to whole tokens, see token_size, and turned as the file says, as phones have it. A video of one
    frame is an image.

    Args:
        path: a video, or an image, of any format that FFmpeg reads.
        tower: sizes of the tower.
        config: how many frames and pixels.
        size: height and width in pixels that frames are resized to, whatever their own shape; None: see token_size.

    Raises:
        UserError: PyAV is not installed; the file holds no frame that it can decode, fewer than it says, or several
            without saying how long they last.
    """
    times, frames = [], []
    for time, frame in _sampled(path, config):
        size = size or token_size(frame.height, frame.width, tower, config)
        height, width = size
        resized = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
        times.append(time)
        frames.append(np.rot90(resized.to_ndarray(), round(frame.rotation / 90)))  # counterclockwise
    if not frames:
        raise UserError(f"{path} holds no frame that can be decoded; leave it out, or convert it")
    pixels, step = np.stack(frames), tower.temporal_patch_size
    if len(pixels) > 1:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], -len(pixels) % step, axis=0)])
    side = tower.patch_size * tower.merge_size
    grid = (max(len(pixels) // step, 1), pixels.shape[1] // side, pixels.shape[2] // side)
    spacing = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return Footage(pixels, grid, spacing * step)


def token_size(height: int, width: int, tower: TowerConfig, config: FrameConfig) -> tuple[int, int]:
    """Height and width in pixels, multiples of a token's, that a frame is resized to.

    The sides are rounded to whole tokens; where a video of ``max_frames`` of them would exceed ``max_pixels``, both are
    divided by the same number and rounded down (the rule of Qwen2-VL's ``smart_resize``).

    Raises:
        UserError: for a frame that is too elongated.
    """
    side = tower.patch_size * tower.merge_size
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise UserError(f"a frame of {width} x {height} pixels is more than {MOST_ELONGATED} times as long as wide")
    rows, columns = (max(1, round(length / side)) for length in (height, width))
    most = config.max_pixels / config.max_frames
    if rows * columns * side**2 > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(1, math.floor(length / shrink / side)) for length in (height, width))
    return rows * side, columns * side


def sample_times(seconds: float, fps: float, most: int) -> NDArray[np.float64]:
    """Instants of a video at which frames are taken: ``fps`` a second from 0 on, or ``most``, evenly spaced.

    Args:
        seconds: length of the video.
        fps: frames a second.
        most: frames, at most.
    """
    count = max(1, math.ceil(seconds * fps - 1e-9))
    step = 1 / fps if count <= most else seconds / most
    return np.arange(min(count, most), dtype=np.float64) * step


def _sampled(path: Path, config: FrameConfig) -> Iterator[tuple[float, Any]]:
    """Time and decoded frame at each sampled instant: the last frame that is not after it."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"frames of {path} need PyAV, which is not installed (pip install '.[video]')") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video and no image; leave it out")
            stream = container.streams.video[0]
            seconds = _seconds(container, stream)
            times = [0.0] if seconds is None else sample_times(seconds, config.fps, config.max_frames).tolist()
            shown: Any = None
            first = now = 0.0
            for number, frame in enumerate(container.decode(stream)):
                if number and seconds is None:
                    raise UserError(f"{path} does not say how long it is; put it into a container that does (mp4, mkv)")
                first = first if number else frame.time or 0.0
                now = (frame.time or 0.0) - first
                while shown is not None and times and times[0] < now - TICK:
                    yield times.pop(0), shown
                shown = frame
            if shown is not None:
                yield from ((time, shown) for time in times)
                _check_end(path, now + (shown.duration or 0) * float(shown.time_base or 0), seconds or 0.0)
    except av.error.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded ({error}); leave it out, or convert it") from error


def _seconds(container: Any, stream: Any) -> float | None:
    """Length of a video; None where the file does not say, as an image does not."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1e6


def _check_end(path: Path, end: float, seconds: float) -> None:
    if end < seconds - LATE:
        raise UserError(
            f"{path} should last {seconds:.1f} s and its frames end after {end:.1f} s; leave it out, or cut it there"
        )
