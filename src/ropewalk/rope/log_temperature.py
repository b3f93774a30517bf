"""Log temperature by position (Llama 4, Ministral 3): the factor on queries, which grows with a token's position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.errors import UserError
from ropewalk.rope.values import number, whole, wrong

CARRIER = "ministral3"  # model_type of the stock class that multiplies its queries so
CARRIED = ("llama", "mistral", CARRIER)  # types whose weights load into that class as they are
BETA = "llama_4_scaling_beta"  # in rope_parameters, where transformers looks
VLLM_KEY = "llama_4_scaling"  # beside rope_parameters, where vLLM looks instead
LENGTH = "original_max_position_embeddings"  # in both; types that stretch a length have it, too


@dataclass(frozen=True)
class LogTemperature:
    """Queries at position p times 1 + beta ln(1 + floor(p / L0)).

    Attributes:
        beta: 0 or more; 0 leaves queries as they are.
        length: L0, tokens, 1 or more.
    """

    beta: float
    length: int

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise UserError(
                f"log_temperature: beta={self.beta:g} must be 0, which leaves queries as they are, or more; "
                "Llama 4 and Ministral 3 have 0.1"
            )
        if self.length < 1:
            raise UserError(f"log_temperature: length={self.length} must be 1 token or more; use pretrained_length")

    def __str__(self) -> str:
        if self.beta == 0:
            return "no query is scaled"
        return f"queries at position p are scaled by 1 + {self.beta} ln(1 + floor(p / {self.length:,}))"

    def scale(self, position: int) -> float:
        """The factor on a query at ``position``, counted from 0 in its document."""
        return 1 + self.beta * math.log1p(position // self.length)

    def stock_keys(self) -> dict[str, Any]:
        """The keys of a Ministral 3's rope_parameters that say it."""
        return {BETA: self.beta, LENGTH: self.length}

    def vllm_keys(self) -> dict[str, Any]:
        """The value of ``llama_4_scaling`` in config.json, by which vLLM computes the same."""
        return {"beta": self.beta, LENGTH: self.length}

    @property
    def step(self) -> dict[str, Any]:
        """The chain's step ``log_temperature``."""
        return {"method": "log_temperature", "beta": self.beta, "length": self.length}


def read_stock_temperature(entry: Mapping[str, Any], default_length: int | None) -> LogTemperature:
    """The temperature of a Ministral 3's rope_parameters, as transformers reads it.

    Args:
        entry: rope_parameters.
        default_length: what transformers takes for a length that the entry leaves out; None: it would fail.

    Raises:
        UserError: for a key that is missing, with which the class cannot run, or of another kind.
    """
    beta = number(entry, BETA, "0 or more", lambda value: value >= 0)
    length = whole(entry, LENGTH) or default_length
    for key, value in ((BETA, beta), (LENGTH, length)):
        if value is None:
            raise wrong(key, None, f"there: {CARRIER} scales every query by it; write {BETA}: 0 to have none scaled")
    return LogTemperature(beta, length)  # type: ignore[arg-type]
