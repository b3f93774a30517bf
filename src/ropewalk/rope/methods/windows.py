"""Windows of a soft clip: weights that fall from 1 at the first clipped pair to the slowest one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from ropewalk.rope.spectrum import FloatArray

Window = Literal["raised_cosine", "quarter_cosine", "blackman", "kaiser", "linear"]
TaperDomain = Literal["index", "frequency"]

KAISER_BETA = 8.6  # side lobes like Blackman's (numpy.kaiser's documentation)


def raised_cosine(x: FloatArray) -> FloatArray:
    """(1 + cos(pi x)) / 2, the falling half of Hann's window: CoPE's (arXiv 2602.05258, section 4)."""
    return 0.5 * (1 + np.cos(np.pi * x))


def quarter_cosine(x: FloatArray) -> FloatArray:
    """cos(pi x / 2), the falling half of the cosine window."""
    return np.cos(0.5 * np.pi * x)


def blackman(x: FloatArray) -> FloatArray:
    """0.42 + 0.5 cos(pi x) + 0.08 cos(2 pi x), the falling half of Blackman's window."""
    return 0.42 + 0.5 * np.cos(np.pi * x) + 0.08 * np.cos(2 * np.pi * x)


def kaiser(x: FloatArray) -> FloatArray:
    """I0(beta sqrt(1 - x^2)) / I0(beta), beta 8.6, the falling half of Kaiser's window; it ends at 1/I0(beta)."""
    return np.i0(KAISER_BETA * np.sqrt(1 - x**2)) / np.i0(KAISER_BETA)


def linear(x: FloatArray) -> FloatArray:
    """1 - x, the falling half of Bartlett's window."""
    return 1 - x


WINDOWS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "raised_cosine": raised_cosine,
    "quarter_cosine": quarter_cosine,
    "blackman": blackman,
    "kaiser": kaiser,
    "linear": linear,
}
assert tuple(WINDOWS) == get_args(Window)


def taper(clipped: FloatArray, window: Window, domain: TaperDomain) -> FloatArray:
    """Weights of the clipped pairs.

    Args:
        clipped: their frequencies, highest first, float64 (clip,), radians per token.
        window: shape of the fall over x in [0, 1].
        domain: ``index``: x_j = j / (clip - 1). ``frequency``: x_j = (f_0 - f_j) / (f_0 - f_last), linear in
            frequency, so that most of a geometric series lies near x = 1.

    Returns:
        float64 (clip,) in [0, 1]: 1 at the first pair, and exactly 0 at the last for every window but Kaiser's.
        A single pair, or pairs of one frequency, are untouched.
    """
    if clipped.size < 2:
        return np.ones(clipped.size)
    if domain == "index":
        x = np.arange(clipped.size) / (clipped.size - 1)
    elif clipped[0] == clipped[-1]:
        return np.ones(clipped.size)
    else:
        x = np.clip((clipped[0] - clipped) / (clipped[0] - clipped[-1]), 0.0, 1.0)
    weights = np.clip(WINDOWS[window](x), 0.0, 1.0)
    weights[x == 0.0] = 1.0  # the sums of cosines miss both ends by 1e-16
    if window != "kaiser":
        weights[x == 1.0] = 0.0
    return weights
