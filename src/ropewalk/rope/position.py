"""How a checkpoint rotates: a chain together with what its methods refer to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.rope.chain import RopeChain
from ropewalk.rope.hf_config import read_hf_position
from ropewalk.rope.spectrum import Spectrum
from ropewalk.rope.values import mapping, number, whole, wrong

METADATA_KEY = "ropewalk"  # in config.json

_INPUTS = ("head_dim", "theta", "pretrained_length", "trained_length")  # of every method
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
        object.__setattr__(self, "theta", float(self.theta))  # 10000 and 1e4 are one base, with one hash
        object.__setattr__(self, "chain", self.chain.resolved(**self._inputs()))

    @classmethod
    def from_pretrained(cls, model: str | Path) -> Position:
        """How a checkpoint rotates: a Hugging Face directory, its config.json, or a hub id.

        Only a hub id needs transformers.

        Raises:
            UserError: where there is no config.json, or one whose scaling no chain expresses.
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
        """Hash of the chain's resolved arguments and of its inputs.

        Equal for equal recipes, however they were written. It does not cover the methods' code, nor another input
        length than the trained one.
        """
        return _sha256([self.chain.to_list(), self._inputs()])

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
        return {name: getattr(self, name) for name in _INPUTS}


def read_config_json(model: str | Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory or hub id, or the file itself.

    Raises:
        UserError: where there is none, or it is not JSON.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if not _HUB_ID.fullmatch(str(model)):
            raise UserError(f"model={model} holds no config.json; name a Hugging Face directory, its file, or a hub id")
        return _read_hub(str(model))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model={file} is not JSON ({error}); it must be a model's config.json") from None
    if not isinstance(content, dict):
        raise UserError(f"model={file} is not a JSON object; it must be a model's config.json")
    return content


def _read_hub(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(name)[0])
    except OSError as error:
        raise unreachable("model", name, error) from error


def unreachable(key: str, name: str, error: OSError) -> UserError:
    """The error for a model that transformers finds neither here nor on the hub, named under the config's ``key``."""
    return UserError(
        f"{key}={name} is neither a Hugging Face directory nor a hub model that can be reached; check the name, or "
        f"log in for a gated one ({str(error).splitlines()[0]})"
    )


def position_of(config: Any) -> Position:
    """How a checkpoint with this config rotates: from our metadata, or read off its stock entry.

    Args:
        config: config.json's content, or a transformers PreTrainedConfig.

    Raises:
        UserError: for metadata that was edited, a foreign scaling that no chain expresses, or a malformed value.
    """
    content = config if isinstance(config, Mapping) else config.to_dict()
    ours = mapping(content, METADATA_KEY)
    if ours:
        return _recorded(ours)
    foreign = read_hf_position(content)
    return Position(
        name="pretrained",
        chain=RopeChain(foreign.chain),
        theta=foreign.theta,
        head_dim=foreign.head_dim,
        pretrained_length=foreign.pretrained_length,
        trained_length=foreign.trained_length,
    )


_MEND = f'put back what was written, or delete the key "{METADATA_KEY}" and the stock entry beside it is read instead'


def _recorded(ours: Mapping[str, Any]) -> Position:
    """What ``Position.metadata`` wrote. The hashes are those of the record itself, not of what is made of it today."""
    steps = ours.get("chain")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise wrong(f"{METADATA_KEY}.chain", steps, f"a list of methods with their arguments; {_MEND}")
    covered = {"chain_sha256": steps, "spectrum_sha256": [steps, {name: ours.get(name) for name in _INPUTS}]}
    for key, content in covered.items():
        recorded, found = ours.get(key), _sha256(content)
        if recorded is not None and recorded != found:
            raise UserError(
                f"config.json: {METADATA_KEY}.{key}={recorded} is not the hash of what stands beside it, {found}: the "
                f"chain or its inputs were edited by hand; {_MEND}"
            )
    inputs = {
        "head_dim": whole(ours, "head_dim", "channels"),
        "theta": number(ours, "theta"),
        "pretrained_length": whole(ours, "pretrained_length"),
        "trained_length": whole(ours, "trained_length"),
    }
    for key, value in inputs.items():
        if value is None:
            raise UserError(f"config.json: {METADATA_KEY} has no {key}; {_MEND}")
    name, base_model = str(ours.get("name") or "unnamed"), ours.get("base_model")
    return Position(name=name, chain=RopeChain(steps), base_model=base_model, **inputs)  # type: ignore[arg-type]


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
