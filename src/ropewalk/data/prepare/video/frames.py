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
from ropewalk.errors import UserError

MOST_ELONGATED = 200  # sides of a frame, as Qwen2-VL's processor has it


@dataclass(frozen=True)
class Footage:
    """Frames as a tower takes them, and the grid of tokens that they become.

    Attributes:
        pixels: uint8 (frames, height, width, 3), RGB; one frame is an image.
        grid: frames, rows and columns of tokens.
        frame_seconds: from one frame of the grid to the next; 0: an image.
    """

    pixels: NDArray[np.uint8]
    grid: tuple[int, int, int]
    frame_seconds: float


def read_footage(path: Path, tower: TowerConfig, config: FrameConfig) -> Footage:
    """The frames of a file: ``fps`` a second, evenly spaced ones where these are too many; the last fills the grid.

    Frames are resized to whole tokens, their sides in proportion, all together within ``max_pixels`` (the rule of
    Qwen2-VL's ``smart_resize``).

    Args:
        path: a video, or an image, of any format that FFmpeg reads.
        tower: sizes of the tower.
        config: how many frames and pixels.

    Raises:
        UserError: PyAV is not installed, or the file holds no frame that it can decode.
    """
    times, frames = [], []
    size = None
    for time, frame in _sampled(path, config):
        size = size or token_size(frame.height, frame.width, tower, config)
        height, width = size
        resized = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
        times.append(time)
        frames.append(resized.to_ndarray())
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
    divided by the same number and rounded down.

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
    return np.arange(count) / fps if count <= most else np.arange(most) * (seconds / most)


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
            times = list(sample_times(seconds, config.fps, config.max_frames))
            held: Any = None
            first: float | None = None
            for frame in container.decode(stream):
                first = frame.time if first is None else first
                now = (frame.time or 0.0) - (first or 0.0)
                while held is not None and times and times[0] < now - 1e-6:
                    yield float(times.pop(0)), held
                held = frame
            for time in times if held is not None else []:
                yield float(time), held
    except av.error.FFmpegError as error:
        raise UserError(f"{path} cannot be decoded ({error}); leave it out, or convert it") from error


def _seconds(container: Any, stream: Any) -> float:
    """Length of a video; 0 where the file does not say, as of an image: one frame is taken then."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return 0.0 if container.duration is None else container.duration / 1e6
