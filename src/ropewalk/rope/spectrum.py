"""The spectrum of a rotary position encoding: what every method takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def geometric(theta: float, head_dim: int) -> FloatArray:
    """RoPE's inverse frequencies theta^(-2i/d), i = 0..d/2-1 (RoFormer, arXiv 2104.09864, section 3.2.2).

    Returns:
        float64 array (head_dim // 2,), radians per token, highest frequency first.
    """
    return np.float64(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


@dataclass(frozen=True)
class Spectrum:
    """Inverse frequencies of the rotary pairs, with the facts that methods refer to.

    Attributes:
        inv_freq: float64 (head_dim // 2,), radians per token, read-only; exactly 0 means no rotation.
        theta: RoPE base from which the pairs were laid out.
        pretrained_length: tokens of the context that the starting model was trained at.
        trained_length: tokens of the context that this run trains at.
        length: tokens of the present input; None: ``trained_length``. Methods read ``present_length``.
        attention_scaling: multiplies cos and sin, so logits scale by its square.
    """

    inv_freq: FloatArray
    theta: float
    pretrained_length: int
    trained_length: int
    length: int | None = None
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        inv_freq = np.array(self.inv_freq, dtype=np.float64)
        if inv_freq.ndim != 1 or not np.all(np.isfinite(inv_freq)) or np.any(inv_freq < 0):
            raise ValueError(f"inv_freq must be one row of finite, non-negative frequencies; got {inv_freq}")
        inv_freq.flags.writeable = False
        object.__setattr__(self, "inv_freq", inv_freq)

    @property
    def head_dim(self) -> int:
        """Channels of an attention head: twice the number of pairs."""
        return 2 * self.inv_freq.size

    @property
    def periods(self) -> FloatArray:
        """Tokens in one turn of each pair, float64 (head_dim // 2,); infinite where a pair does not rotate."""
        with np.errstate(divide="ignore", over="ignore"):
            return 2 * np.pi / self.inv_freq

    @property
    def present_length(self) -> int:
        """Tokens of the present input: the declared length, else the trained one."""
        return self.trained_length if self.length is None else self.length

    def turns(self, length: int) -> FloatArray:
        """Turns of each pair over ``length`` tokens, float64 (head_dim // 2,)."""
        return length * self.inv_freq / (2 * np.pi)

    def pairs_beyond(self, length: int) -> int:
        """Number of pairs whose period exceeds ``length`` tokens: those that never finish a turn in it."""
        return int((self.periods > length).sum())

    def rebased(self, theta: float) -> Spectrum:
        """RoPE's geometric spectrum at another base; what was there before is replaced."""
        return replace(self, inv_freq=geometric(theta, self.head_dim), theta=theta)

    def laid_out(self, rotated: FloatArray, attention_scaling: float = 1.0) -> Spectrum:
        """``rotated`` frequencies on the first pairs, the others stopped; what was there before is replaced."""
        inv_freq = np.zeros_like(self.inv_freq)
        inv_freq[: rotated.size] = rotated
        return replace(self, inv_freq=inv_freq, attention_scaling=attention_scaling)

    def scaled(self, weights: FloatArray | float, attention_scaling: float = 1.0) -> Spectrum:
        """Each frequency times its weight; ``attention_scaling`` multiplies what is there."""
        return replace(
            self,
            inv_freq=self.inv_freq * weights,
            attention_scaling=self.attention_scaling * attention_scaling,
        )

    def scale_lowest(self, weights: FloatArray) -> Spectrum:
        """The last ``len(weights)`` pairs, those of lowest frequency, times their weights."""
        if weights.size > self.inv_freq.size:
            raise ValueError(
                f"{weights.size} pairs are more than the {self.inv_freq.size} of head_dim={self.head_dim}; use fewer"
            )
        inv_freq = self.inv_freq.copy()
        if weights.size:
            inv_freq[-weights.size :] *= weights
        return replace(self, inv_freq=inv_freq)
