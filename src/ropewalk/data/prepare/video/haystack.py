"""V-NIAH's haystack and needles: frames of a film or of drawn scenes, in one file that every arm reads.

After V-NIAH (arXiv 2406.16852) and V-NIAH-D (arXiv 2502.05173): a needle frame stands at a depth of a long video, with
distractors that look like it if asked for, and a question follows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ropewalk.config.data import FrameConfig, PrepareVniahConfig
from ropewalk.config.rules import validate_numbers
from ropewalk.data.prepare.video.frames import read_footage
from ropewalk.data.prepare.video.scenes import (
    BACKGROUNDS,
    CELLS,
    NAMES,
    QUARTERS,
    QUESTIONS,
    background,
    symbol,
    with_noise,
    with_symbol,
)
from ropewalk.data.prepare.video.visual_pipeline import listed_rows
from ropewalk.data.store.hashing import splitmix64, stable_key
from ropewalk.errors import UserError
from ropewalk.files import replace_atomically, sha256_of, writing

FILE = "vniah.safetensors"
Frames = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class Needle:
    """Texts about one needle frame.

    Attributes:
        question: about its content.
        answer: to that.
        when: the question in which quarter of the video it is shown; "": it has none.
    """

    question: str
    answer: str
    when: str = ""


@dataclass(frozen=True, eq=False)
class Haystack:
    """A haystack and its needles.

    Attributes:
        frames: of the haystack: uint8 (frames, pixel frames, height, width, 3), RGB, or a tower's output, uint16
            (frames, tokens, channels) with the bits of bfloat16.
        needles: frames of the same kind, one for each of ``texts``.
        distractors: frames of the same kind that are none of the needles; empty: the other needles are.
        texts: about each needle.
        grid: rows and columns of a frame, in tokens.
        frame_seconds: time from one frame to the next.
    """

    frames: Frames
    needles: Frames
    distractors: Frames
    texts: tuple[Needle, ...]
    grid: tuple[int, int]
    frame_seconds: float

    @property
    def has_pixels(self) -> bool:
        """True if it holds pixels, False if embeddings."""
        return self.frames.dtype == np.uint8

    @property
    def tokens_per_frame(self) -> int:
        """Rows x columns."""
        return self.grid[0] * self.grid[1]

    def video(self, frames: int, depth: float, needle: int, distractors: int, rng: random.Random) -> Frames:
        """A video with one needle.

        Args:
            frames: of the video, needle and distractors included; a haystack of fewer is repeated, as in HoPE.
            depth: share of the video before the needle, 0 to 1.
            needle: which.
            distractors: frames at random places that are replaced by distractors.
            rng: of the haystack's first frame, and of the distractors and their places.
        """
        place = needle_place(frames, depth)
        start = rng.randrange(len(self.frames))
        video = self.frames[(start + np.arange(frames)) % len(self.frames)]
        others = [number for number in range(len(self.needles)) if number != needle]
        pool = self.distractors if len(self.distractors) else self.needles[others]
        for at in rng.sample([number for number in range(frames) if number != place], distractors):
            video[at] = pool[rng.randrange(len(pool))]
        video[place] = self.needles[needle]
        return video


def prepare_vniah(config: PrepareVniahConfig) -> Path:
    """Write ``output/vniah.safetensors`` and return its path.

    Raises:
        UserError: for numbers out of range, a file that cannot be read, or an output that is there already.
    """
    path = Path(config.output) / FILE
    if path.exists():
        raise UserError(f"{path} is there already; remove it, or choose another output")
    haystack = _made(config)
    with writing(f"output={config.output}", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        source = {"seed": config.seed} | {
            name: sha256_of(Path(file)) for name in ("film", "needles") if (file := getattr(config, name)) is not None
        }
        write_haystack(path, haystack, {"source": source})
    rows, columns = haystack.grid
    kinds = f"{len(haystack.frames):,} frames of {rows} x {columns} tokens, {len(haystack.needles)} needles"
    print(f"{path}: {kinds}, {len(haystack.distractors)} distractors", flush=True)
    print(
        f"next: python scripts/evaluate.py suite=vniah vniah.data={config.output} checkpoint=RUN output=DIR", flush=True
    )
    return path


def write_haystack(path: Path, haystack: Haystack, about: dict[str, Any]) -> None:
    """Write a haystack to one file of safetensors; ``about``: what else its header says, as JSON."""
    header = about | {
        "texts": [asdict(text) for text in haystack.texts],
        "grid": list(haystack.grid),
        "frame_seconds": haystack.frame_seconds,
    }
    tensors = {name: np.ascontiguousarray(getattr(haystack, name)) for name in ("frames", "needles", "distractors")}
    replace_atomically(path, lambda partial: save_file(tensors, partial, {"vniah": json.dumps(header)}))


def read_haystack(path: Path) -> tuple[Haystack, dict[str, Any]]:
    """A haystack, and all that its header says.

    Raises:
        UserError: for a file that is not one.
    """
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})["vniah"])
            frames, needles, distractors = map(file.get_tensor, ("frames", "needles", "distractors"))
        texts = tuple(Needle(**text) for text in header["texts"])
        haystack = Haystack(frames, needles, distractors, texts, tuple(header["grid"]), header["frame_seconds"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no haystack ({type(error).__name__}: {error}); write one with data_prep/prepare_video.py vniah"
        ) from error
    return haystack, header


def needle_place(frames: int, depth: float) -> int:
    """The frame, from 0, that the needle is."""
    return min(int(depth * frames), frames - 1)


def quarter_of(place: int, frames: int) -> str:
    """The word for the quarter of a video that a frame lies in."""
    return QUARTERS[place * len(QUARTERS) // frames]


def _made(config: PrepareVniahConfig) -> Haystack:
    validate_numbers(config)
    tower = config.tower
    side, step = tower.patch_size * tower.merge_size, tower.temporal_patch_size
    height, width = config.height * side, config.width * side
    seconds = 1.0
    if config.needles is None and min(height, width) < 2 * CELLS:
        raise UserError(
            f"frames of {height} x {width} pixels cannot show a symbol of {CELLS} x {CELLS} in the middle half of each "
            f"side; give each side {2 * CELLS} or more by height, width or tower.patch_size"
        )
    if config.film is None:
        numbers = splitmix64(stable_key("haystack", config.seed), config.frames) % np.uint64(BACKGROUNDS)
        still = np.stack([background(int(number), height, width) for number in numbers])
        pixels = with_noise(np.repeat(still, step, axis=0), "haystack", config.seed)
    else:
        taken = FrameConfig(fps=config.fps, max_frames=config.frames * step)
        footage = read_footage(Path(config.film), tower, taken, (height, width))
        pixels, seconds = footage.pixels.astype(np.uint8, copy=False), footage.frame_seconds
    frames = pixels.reshape(-1, step, height, width, 3)
    if config.needles is None:
        texts = tuple(Needle(QUESTIONS["content"], name, QUESTIONS["time"]) for name in NAMES)
        needles = _drawn(frames, [symbol(number) for number in range(len(NAMES))])
        distractors = _drawn(frames, [1 - symbol(number) for number in range(len(NAMES))])  # none is a symbol
    else:
        rows = list(listed_rows(Path(config.needles), "needles"))
        texts = tuple(Needle(row["question"], row["answer"], row.get("when", "")) for _, row in rows)
        images = [read_footage(path, tower, FrameConfig(), (height, width)).pixels[:1] for path, _ in rows]
        needles = np.stack([np.repeat(image, step, axis=0) for image in images])
        distractors = needles[:0]
    return Haystack(frames, needles, distractors, texts, (config.height, config.width), seconds)


def _drawn(frames: NDArray[np.uint8], patterns: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Each pattern over a frame of the haystack, in turn."""
    chosen = [frames[number % len(frames)] for number in range(len(patterns))]
    return np.stack(
        [
            np.stack([with_symbol(part, pattern) for part in frame])
            for frame, pattern in zip(chosen, patterns, strict=True)
        ]
    )
