"""Drawn scenes: videos of noisy backgrounds, one of whose frames holds a symbol, and questions about it.

A needle in a haystack of frames in small, after V-NIAH (arXiv 2406.16852): nothing is downloaded, and every visual is a
pure function of its key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ropewalk.config.data import SceneConfig, TowerConfig
from ropewalk.data.prepare.video.frames import Example, Footage
from ropewalk.data.store.hashing import splitmix64, stable_key

NAMES = (
    "anchor", "basket", "candle", "dolphin", "engine", "feather", "guitar", "hammer", "island", "jacket", "kettle",
    "lantern", "mirror", "needle", "orange", "pillow",
)  # fmt: skip
QUARTERS = ("first", "second", "third", "fourth")
QUESTIONS = {  # kind -> the question
    "content": "Which symbol is shown?",
    "time": "In which quarter is the symbol shown?",
}
BACKGROUNDS = 64
CELLS = 4  # of a symbol, and of a background, along each side


def symbol(number: int) -> NDArray[np.uint8]:
    """The pattern of a symbol, 0 or 1 (4, 4): row ``number`` of the Hadamard matrix of order 16.

    Any two symbols differ in eight of their sixteen cells.
    """
    bits = np.arange(CELLS * CELLS) & number
    parity = bits ^ (bits >> 2)
    return ((parity ^ (parity >> 1)) & 1).astype(np.uint8).reshape(CELLS, CELLS)


def background(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """A pattern of 4 x 4 colours between 64 and 191, uint8 (height, width, 3)."""
    colours = splitmix64(stable_key("background", number), CELLS * CELLS * 3) % np.uint64(128) + np.uint64(64)
    return _spread(colours.astype(np.uint8).reshape(CELLS, CELLS, 3), height, width)


def with_symbol(frame: NDArray[np.uint8], pattern: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy of a frame with the symbol in black and white over the middle half of each side."""
    height, width = frame.shape[0] // 2, frame.shape[1] // 2
    top, left = frame.shape[0] // 4, frame.shape[1] // 4
    drawn = frame.copy()
    drawn[top : top + height, left : left + width] = _spread(pattern[..., None] * np.uint8(255), height, width)
    return drawn


def with_noise(pixels: NDArray[np.uint8], *key: str | int) -> NDArray[np.uint8]:
    """Pixels with noise of -16 to 15 that is a pure function of the key."""
    noise = splitmix64(stable_key("noise", *key), -(-pixels.size // 8)).view(np.uint8)[: pixels.size]
    noisy: NDArray[np.int16] = pixels.astype(np.int16) + noise.reshape(pixels.shape) % 32 - 16
    return np.clip(noisy, 0, 255).astype(np.uint8)


def draw_scene(config: SceneConfig, tower: TowerConfig, *key: str | int) -> Example:
    """The scene of a key: number of frames, backgrounds, place and kind of the symbol, and the question.

    Args:
        config: sizes, and the kinds of questions.
        tower: sizes of the vision tower.
        key: what tells this scene from every other, such as a seed and a number.
    """
    draws = splitmix64(stable_key("scene", *key), 5)
    shortest, longest = config.frames
    frames = shortest + int(draws[0] % np.uint64(longest - shortest + 1))
    shown, place = int(draws[1] % np.uint64(len(NAMES))), int(draws[2] % np.uint64(frames))
    kind = config.questions[int(draws[3] % np.uint64(len(config.questions)))]
    backgrounds = splitmix64(stable_key("backgrounds", *key), frames) % np.uint64(BACKGROUNDS)
    side, step = tower.patch_size * tower.merge_size, tower.temporal_patch_size
    height, width = config.height * side, config.width * side
    pixels = np.stack([background(int(number), height, width) for number in backgrounds])
    pixels[place] = with_symbol(pixels[place], symbol(shown))
    noisy = with_noise(np.repeat(pixels, step, axis=0) if frames > 1 else pixels, *key)
    answer = NAMES[shown] if kind == "content" else QUARTERS[place * len(QUARTERS) // frames]
    footage = Footage(noisy, (frames, config.height, config.width), 1.0 if frames > 1 else 0.0)
    return Example(footage, QUESTIONS[kind], answer)


def _spread(cells: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Each cell over its share of the pixels."""
    rows, columns = (np.arange(length) * CELLS // length for length in (height, width))
    return cells[rows[:, None], columns[None, :]]
