"""Layers without rotation (NoPE): which layers of a model leave queries and keys as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import UserError
from ropewalk.rope.values import wrong

CARRIER = "smollm3"  # model_type of the stock class that reads no_rope_layers
# Types whose weights load into that class as they are, and what others have that it lacks.
CARRIED = ("llama", "mistral", CARRIER)
LACKING = {
    "qwen2": "biases on queries, keys and values alone",
    "qwen3": "a norm of queries and keys (QK-norm)",
}
FOURTH = 4  # llama.cpp's smollm3 has this in its code, and no key for another


@dataclass(frozen=True)
class NopeLayers:
    """The layers that do not rotate, by their distance or by their numbers.

    Attributes:
        every: the k-th, 2k-th, ... layer does not rotate, counted from 1.
        layers: numbers of the layers that do not, from 0.
    """

    every: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.every is None) == (self.layers is None):
            raise UserError(
                f"nope_layers: every={self.every} and layers={self.layers}; give one of the two: every=4, or "
                "layers=[3, 7]"
            )
        if self.every is not None and self.every < 1:
            raise UserError(f"nope_layers: every={self.every} must be 1 (no layer rotates) or more; SmolLM3 has 4")
        if self.layers is not None and (
            sorted(set(self.layers)) != list(self.layers) or min(self.layers, default=0) < 0
        ):
            raise UserError(
                f"nope_layers: layers={list(self.layers)} must be numbers of layers, from 0, each once and in order"
            )

    def __str__(self) -> str:
        if self.every is not None:
            return "no layer rotates" if self.every == 1 else f"one layer in {self.every} without rotation"
        numbers = ", ".join(map(str, self.layers or ()))
        return f"layers {numbers} without rotation" if numbers else "every layer rotates"

    def rotate(self, count: int) -> tuple[bool, ...]:
        """True for each layer of a model of ``count`` that rotates.

        Raises:
            UserError: for a layer that the model does not have, or ``every`` beyond its last.
        """
        if max(self.layers or (), default=-1) >= count or (self.every or 0) > count:
            named = f"every={self.every}" if self.layers is None else f"layers={list(self.layers)}"
            raise UserError(f"nope_layers: {named} names a layer that a model of {count} does not have; name fewer")
        if self.every is not None:
            return tuple((layer + 1) % self.every != 0 for layer in range(count))
        return tuple(layer not in (self.layers or ()) for layer in range(count))

    def stock_keys(self, count: int) -> dict[str, Any]:
        """The keys of a SmolLM3 config that say the same; the interval is for engines that read it alone."""
        interval = {} if self.every is None else {"no_rope_layer_interval": self.every}
        return {"no_rope_layers": [int(rotates) for rotates in self.rotate(count)], **interval}

    @property
    def step(self) -> dict[str, Any]:
        """The chain's step ``nope_layers``."""
        return {
            "method": "nope_layers",
            "every": self.every,
            "layers": None if self.layers is None else list(self.layers),
        }


def read_stock_layers(flags: Any, count: Any) -> NopeLayers | None:
    """The layers of a SmolLM3's config.json that do not rotate, as transformers reads them; None: all rotate.

    Args:
        flags: no_rope_layers, 1 for a layer that rotates, as the class has it where the file does not.
        count: num_hidden_layers.

    Raises:
        UserError: for flags of another kind or number.
    """
    if flags is None or count is None:  # transformers refuses the config, in words of its own
        return None
    if not isinstance(flags, Sequence) or len(flags) < count or any(flag not in (0, 1) for flag in flags):
        raise wrong("no_rope_layers", flags, f"a list of 0 and 1, one for each of the {count} layers")
    still = tuple(layer for layer in range(count) if not flags[layer])
    if not still:
        return None
    regular = NopeLayers(every=still[0] + 1)
    return regular if regular.rotate(count) == tuple(map(bool, flags[:count])) else NopeLayers(layers=still)


def is_fourth(rotates: Sequence[bool]) -> bool:
    """True if every fourth layer does not rotate, and every other does: what llama.cpp's smollm3 computes."""
    return list(rotates) == [(layer + 1) % FOURTH != 0 for layer in range(len(rotates))]


def describe_layers(rotates: Sequence[bool]) -> str:
    """The layers without rotation, in words: ``3, 7``, or none."""
    return ", ".join(str(layer) for layer, turns in enumerate(rotates) if not turns) or "none"
