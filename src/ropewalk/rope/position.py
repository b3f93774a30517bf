"""How a checkpoint rotates: a chain together with what its methods refer to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.rope.chain import RopeChain
from ropewalk.rope.foreign import read_foreign
from ropewalk.rope.spectrum import Spectrum

METADATA_KEY = "ropewalk"  # in config.json

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

Steps = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Position:
    """How a checkpoint rotates: its chain and what the chain's methods refer to.

    Attributes:
        name: short name of the method (the rope group's), "pretrained" for a checkpoint that is not ours.
        chain: methods, applied to RoPE at ``theta``; words such as ``auto`` are resolved here, and so recorded.
        theta: base of the pretrained model.
        head_dim: channels of a head that rotate.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "chain", self.chain.resolved(**self._inputs()))

    @classmethod
    def from_pretrained(cls, model: str | Path) -> Position:
        """How a checkpoint rotates: a Hugging Face directory, its config.json, or a hub id.

        Only a hub id needs transformers.

        Raises:
            ValueError: where there is no config.json, or one whose scaling no chain expresses.
        """
        return position_of(read_config_json(model))

    def extended(self, extra: Steps) -> Position:
        """With ``extra`` steps appended, their words resolved."""
        return replace(self, chain=self.chain.extended(extra))

    def spectrum(self, extra: Steps = (), length: int | None = None) -> Spectrum:
        """The float64 spectrum, with ``extra`` steps appended, for inputs of ``length`` tokens (None: as trained)."""
        return self.chain.extended(extra).spectrum(**self._inputs(), length=length)

    def rope_parameters(
        self, max_position_embeddings: int, extra: Steps = (), length: int | None = None
    ) -> dict[str, Any]:
        """The stock entry for the same."""
        return self.chain.extended(extra).rope_parameters(
            **self._inputs(), max_position_embeddings=max_position_embeddings, length=length
        )

    def __str__(self) -> str:
        if not self.depends_on_length:
            return str(self.chain)
        return f"{self.chain}, compiled at {self.trained_length:,} tokens (it depends on the input's length)"

    @property
    def depends_on_length(self) -> bool:
        """Whether the spectrum follows the input's length, so that a stock entry holds it for one length only."""
        return self.chain.depends_on_length(**self._inputs())

    @property
    def sha256(self) -> str:
        """Hash of the chain and its inputs, so of everything the spectrum follows from."""
        canonical = json.dumps([self.chain.to_list(), self._inputs()], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def metadata(self) -> dict[str, Any]:
        """What config.json keeps under "ropewalk".

        ``compiled_length`` is the length, in tokens, that the stock entry beside it holds the spectrum for, where the
        chain depends on it; else null.
        """
        return {
            "name": self.name,
            "chain": self.chain.to_list(),
            "chain_sha256": self.chain.sha256,
            "spectrum_sha256": self.sha256,
            "base_model": self.base_model,
            "compiled_length": self.trained_length if self.depends_on_length else None,
            **self._inputs(),
        }

    def _inputs(self) -> dict[str, Any]:
        return {
            "head_dim": self.head_dim,
            "theta": self.theta,
            "pretrained_length": self.pretrained_length,
            "trained_length": self.trained_length,
        }


def read_config_json(model: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory or hub id, or the file itself.

    Raises:
        ValueError: where there is none, or it is not JSON.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if not _HUB_ID.fullmatch(str(model)):
            raise ValueError(
                f"model={model} holds no config.json; name a Hugging Face directory, its file, or a hub id"
            )
        return _read_hub(str(model))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model={file} is not JSON ({error}); it must be a model's config.json") from None
    if not isinstance(content, dict):
        raise ValueError(f"model={file} is not a JSON object; it must be a model's config.json")
    return content


def _read_hub(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(name)[0])
    except OSError as error:
        raise ValueError(
            f"model={name} is neither a directory here nor a hub model that can be reached; check the name, or log in "
            f"for a gated one ({str(error).splitlines()[0]})"
        ) from error


def position_of(config: Any) -> Position:
    """How a checkpoint with this config rotates: from our metadata, or read off its stock entry.

    Args:
        config: config.json's content, or a transformers PreTrainedConfig.

    Raises:
        ValueError: for a foreign scaling that no chain expresses.
    """
    content = config if isinstance(config, Mapping) else config.to_dict()
    ours = content.get(METADATA_KEY)
    if ours:
        fields = ("name", "head_dim", "theta", "pretrained_length", "trained_length", "base_model")
        return Position(chain=RopeChain(ours["chain"]), **{name: ours[name] for name in fields})
    foreign = read_foreign(content)
    return Position(
        name="pretrained",
        chain=RopeChain(foreign.chain),
        theta=foreign.theta,
        head_dim=foreign.head_dim,
        pretrained_length=foreign.pretrained_length,
        trained_length=foreign.trained_length,
    )
