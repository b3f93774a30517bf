"""How a checkpoint rotates: a chain together with what its methods refer to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ropewalk.rope.chain import RopeChain
from ropewalk.rope.spectrum import Spectrum

METADATA_KEY = "ropewalk"  # in config.json

Steps = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Position:
    """How a checkpoint rotates: its chain and what the chain's methods refer to.

    Attributes:
        name: short name of the method (the rope group's), "pretrained" for a checkpoint that is not ours.
        chain: methods, applied to RoPE at ``theta``.
        theta: base of the pretrained model.
        head_dim: channels of a head.
        pretrained_length: tokens the first model was trained at.
        trained_length: tokens this checkpoint was last trained at.
        base_model: what training started from.
    """

    name: str
    chain: RopeChain
    theta: float
    head_dim: int
    pretrained_length: int
    trained_length: int
    base_model: str | None = None

    def spectrum(self, extra: Steps = (), length: int | None = None) -> Spectrum:
        """The float64 spectrum, with ``extra`` steps appended, for inputs of ``length`` tokens."""
        return self.chain.extended(extra).spectrum(**self._inputs(), length=length)

    def rope_parameters(
        self, max_position_embeddings: int, extra: Steps = (), length: int | None = None
    ) -> dict[str, Any]:
        """The stock entry for the same."""
        return self.chain.extended(extra).rope_parameters(
            **self._inputs(), max_position_embeddings=max_position_embeddings, length=length
        )

    @property
    def sha256(self) -> str:
        """Hash of the chain and its inputs, so of everything the spectrum follows from."""
        canonical = json.dumps([self.chain.to_list(), self._inputs()], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def metadata(self) -> dict[str, Any]:
        """What config.json keeps under "ropewalk"."""
        return {
            "name": self.name,
            "chain": self.chain.to_list(),
            "chain_sha256": self.chain.sha256,
            "spectrum_sha256": self.sha256,
            "base_model": self.base_model,
            **self._inputs(),
        }

    def _inputs(self) -> dict[str, Any]:
        return {
            "head_dim": self.head_dim,
            "theta": self.theta,
            "pretrained_length": self.pretrained_length,
            "trained_length": self.trained_length,
        }


def position_of(config: Any) -> Position:
    """How a checkpoint with this config rotates: from our metadata, or read off a foreign ``rope_parameters``.

    Args:
        config: a transformers PreTrainedConfig.

    Raises:
        ValueError: for a foreign scaling that no chain expresses.
    """
    ours = getattr(config, METADATA_KEY, None)
    if ours:
        fields = {
            k: ours[k] for k in ("name", "head_dim", "theta", "pretrained_length", "trained_length", "base_model")
        }
        return Position(chain=RopeChain(ours["chain"]), **fields)
    entry = config.rope_parameters
    length = entry.get("original_max_position_embeddings") or config.max_position_embeddings
    return Position(
        name="pretrained",
        chain=RopeChain(_foreign_chain(entry)),
        theta=float(entry["rope_theta"]),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        pretrained_length=length,
        trained_length=config.max_position_embeddings,
    )


def _foreign_chain(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    kind = entry.get("rope_type", "default")
    if kind == "default":
        return []
    if kind == "linear":
        return [{"method": "pi", "factor": entry["factor"]}]
    if kind in ("llama3", "yarn"):
        return [{"method": kind, **{k: v for k, v in entry.items() if k not in ("rope_type", "rope_theta")}}]
    raise ValueError(
        f"rope_type={kind!r} of a checkpoint without ropewalk metadata is not read as a chain; known: default, linear, "
        "llama3, yarn"
    )
