"""Spectrum: the frequencies of a rotary position encoding, which every method takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.errors import UserError
from ropewalk.rope.log_temperature import LogTemperature
from ropewalk.rope.nope_layers import NopeLayers
from ropewalk.rope.pair_axes import PairAxes

FloatArray = NDArray[np.float64]


def geometric(theta: float, head_dim: int) -> FloatArray:
    """RoPE's inverse frequencies theta^(-2i/d), i = 0..d/2-1 (RoFormer, arXiv 2104.09864, section 3.2.2).

    Returns:
        float64 array (head_dim // 2,), radians per token, highest frequency first.
    """
    return np.float64(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def base_of(inv_freq: FloatArray) -> float | None:
    """The base of RoPE frequencies, (f_0 / f_1)^(d/2); None where the first two do not fall.

    The first two suffice, since methods that slow or stop slow pairs leave the fast ones alone.

    Args:
        inv_freq: (d/2,), radians per token, highest first.
    """
    if inv_freq.size < 2 or not inv_freq[0] > inv_freq[1] > 0:
        return None
    return float((inv_freq[0] / inv_freq[1]) ** inv_freq.size)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Inverse frequencies of the rotary pairs, with the facts that methods refer to.

    Attributes:
        inv_freq: float64 (head_dim // 2,), radians per token, read-only; exactly 0 means no rotation.
        theta: RoPE base from which the pairs were laid out.
        pretrained_length: tokens of the context that the starting model was trained at.
        trained_length: tokens of the context that this run trains at.
        length: tokens of the present input; None: ``trained_length``. Methods read ``present_length``.
        attention_scaling: multiplies cos and sin, so logits scale by its square.
        rotary_dim: channels over which theta^(-2i/rotary_dim) was laid out, before anything slowed or stopped a pair.
            None: all of them, head_dim. 0: the pairs follow no base.
        axes: the coordinate of a token that each pair reads, in a model of images and videos; None: text alone.
        layers: the layers of the model that do not rotate; None: all do.
        temperature: the factor on queries by position; None: there is none.
    """

    inv_freq: FloatArray
    theta: float
    pretrained_length: int
    trained_length: int
    length: int | None = None
    attention_scaling: float = 1.0
    rotary_dim: int | None = None
    axes: PairAxes | None = None
    layers: NopeLayers | None = None
    temperature: LogTemperature | None = None

    def __post_init__(self) -> None:
        inv_freq = np.array(self.inv_freq, dtype=np.float64)
        if inv_freq.ndim != 1 or not np.all(np.isfinite(inv_freq)) or np.any(inv_freq < 0):
            raise UserError(f"inv_freq must be one row of finite, non-negative frequencies; got {inv_freq}")
        inv_freq.flags.writeable = False
        object.__setattr__(self, "inv_freq", inv_freq)
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.head_dim)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spectrum) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return tuple(self.inv_freq.tobytes() if name == "inv_freq" else value for name, value in vars(self).items())

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
        """Number of pairs that rotate, but never finish a turn in ``length`` tokens: their period exceeds it."""
        return int(((self.inv_freq > 0) & (self.periods > length)).sum())

    @property
    def rotating_pairs(self) -> int:
        """Pairs up to the last one that rotates: d/2, less those that are stopped at the low end."""
        return int(np.flatnonzero(self.inv_freq)[-1]) + 1 if self.inv_freq.any() else 0

    def rebased(self, theta: float) -> Spectrum:
        """RoPE's geometric spectrum at another base, in place of the present one."""
        return self._with(inv_freq=geometric(theta, self.head_dim), theta=theta, rotary_dim=self.head_dim)

    def laid_out(self, rotated: FloatArray, attention_scaling: float = 1.0, rotary_dim: int = 0) -> Spectrum:
        """``rotated`` frequencies on the first pairs, the others stopped, in place of the present ones.

        ``rotary_dim`` is that of the class: 0, unless the frequencies are powers of ``theta``.
        """
        inv_freq = np.zeros_like(self.inv_freq)
        inv_freq[: rotated.size] = rotated
        return self._with(inv_freq=inv_freq, attention_scaling=attention_scaling, rotary_dim=rotary_dim)

    def scaled(self, weights: FloatArray | float, attention_scaling: float = 1.0) -> Spectrum:
        """Each frequency times its weight; ``attention_scaling`` multiplies the present one."""
        return self._with(
            inv_freq=self.inv_freq * weights, attention_scaling=self.attention_scaling * attention_scaling
        )

    def scale_lowest(self, weights: FloatArray) -> Spectrum:
        """The ``len(weights)`` lowest frequencies that rotate, times their weights, the last weight on the slowest."""
        last = self.rotating_pairs
        if weights.size > last:
            raise UserError(
                f"{weights.size} pairs are more than the {last} of head_dim={self.head_dim} that rotate; use fewer"
            )
        inv_freq = self.inv_freq.copy()
        inv_freq[last - weights.size : last] *= weights
        return self._with(inv_freq=inv_freq)

    def at_length(self, length: int | None) -> Spectrum:
        """The same for an input of ``length`` tokens; None: the trained length."""
        return self._with(length=length)

    def on_axes(self, axes: PairAxes) -> Spectrum:
        """The same frequencies, each pair reading its axis of ``axes``."""
        return self._with(axes=axes)

    def on_layers(self, layers: NopeLayers) -> Spectrum:
        """The same frequencies, in the layers that rotate under ``layers``."""
        return self._with(layers=layers)

    def at_temperature(self, temperature: LogTemperature) -> Spectrum:
        """The same frequencies, queries scaled by ``temperature``."""
        return self._with(temperature=temperature)

    def _with(self, **changes: Any) -> Spectrum:
        return type(self)(**{**vars(self), **changes})
