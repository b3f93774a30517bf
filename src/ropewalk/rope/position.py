"""Position: a chain together with the facts of a model that its methods refer to, as config.json records it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.files import sha256_of_json
from ropewalk.rope.chain import RopeChain, Steps
from ropewalk.rope.hf_config import read_hf_position
from ropewalk.rope.order import reached_length
from ropewalk.rope.registry import LENGTHS, get_method
from ropewalk.rope.spectrum import Spectrum, base_of, geometric
from ropewalk.rope.stock import compile_to_stock
from ropewalk.rope.values import mapping, number, whole, wrong

METADATA_KEY = "ropewalk"  # in config.json

_FACTS = ("head_dim", "theta", "pretrained_length", "trained_length")  # of a model, for every method
_LONGEST = 2**40  # tokens, beyond any input
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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
        base_model: directory or hub id that training started from.

    Raises:
        UserError: for facts or arguments that do not fit, naming the value, the rule and the fix.
    """

    name: str
    chain: RopeChain
    theta: float
    head_dim: int
    pretrained_length: int
    trained_length: int
    base_model: str | None = None
    _as_trained: Spectrum = field(init=False, repr=False, compare=False)
    _reads_length: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        start = self._start()
        watched = _Watched(**vars(start))
        chain, spectrum = _resolve(self.chain, watched)
        reached_length(chain.steps, spectrum)  # refuses scalings that contradict
        resolved = {
            "theta": start.theta,  # 10000 and 1e4 are one base, with one hash
            "chain": chain,
            "_as_trained": _unwatched(spectrum),
            "_reads_length": "length" in watched.lengths_read,
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

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
        return replace(self, chain=self.chain.extended(extra)) if extra else self

    def continued(self, name: str, chain: RopeChain, trained_length: int, base_model: str | None = None) -> Position:
        """The position of a run from this checkpoint: ``chain`` after its own, at ``trained_length`` tokens."""
        return Position(
            name=name,
            chain=chain.after(self.chain),
            theta=self.theta,
            head_dim=self.head_dim,
            pretrained_length=self.trained_length,
            trained_length=trained_length,
            base_model=base_model,
        )

    def spectrum(self, length: int | None = None) -> Spectrum:
        """The float64 spectrum for inputs of ``length`` tokens (None: as trained)."""
        _check_lengths(length=length)
        if length is None:
            return self._as_trained
        if not self._reads_length:
            return self._as_trained.at_length(length)
        spectrum = self._start().at_length(length)
        for step in self.chain.steps:
            spectrum = get_method(step.method).function(spectrum, **step.arguments)
        return spectrum

    def rope_parameters(self, max_position_embeddings: int, length: int | None = None) -> dict[str, Any]:
        """The stock entry of that spectrum, for a checkpoint that serves ``max_position_embeddings`` tokens."""
        return compile_to_stock(self.chain, self.spectrum(length), max_position_embeddings)

    def __str__(self) -> str:
        if not self.depends_on_length:
            return str(self.chain)
        return f"{self.chain}, compiled at {self.trained_length:,} tokens (it depends on the input's length)"

    @cached_property
    def depends_on_length(self) -> bool:
        """True if the spectrum follows the input's length, so that a stock entry holds it for one length only."""
        if not self._reads_length:
            return False
        short, long = self.spectrum(1), self.spectrum(_LONGEST)
        return not np.array_equal(short.inv_freq, long.inv_freq) or short.attention_scaling != long.attention_scaling

    @property
    def sha256(self) -> str:
        """Hash of the chain's resolved arguments and of the model's facts.

        Equal for equal recipes, however they were written. It does not cover the methods' code, nor another input
        length than the trained one.
        """
        return sha256_of_json([self.chain.to_list(), self._facts()], compact=True)

    def metadata(self) -> dict[str, Any]:
        """The record under "ropewalk" in config.json.

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
            **self._facts(),
        }

    @staticmethod
    def apply_chain(
        chain: RopeChain, inv_freq: Any, pretrained_length: int | None, trained_length: int | None, length: int | None
    ) -> Any:
        """The chain on a caller's own vector; see RopeChain.apply."""
        is_torch = hasattr(inv_freq, "detach")
        values = inv_freq.detach().double().cpu().numpy() if is_torch else np.asarray(inv_freq, dtype=np.float64)
        theta = base_of(values) if values.ndim == 1 else None
        if theta is None:
            raise UserError(
                f"inv_freq of shape {values.shape} must be one row of two or more frequencies that starts falling; "
                "give RoPE's own, before any other transform"
            )
        _check_lengths(pretrained_length=pretrained_length, trained_length=trained_length, length=length)
        start = _Watched(values, theta, pretrained_length, trained_length)  # type: ignore[arg-type]
        # Words stand for values of training, so they resolve at the trained length, whatever the present input's.
        resolved, spectrum = _resolve(chain, start if trained_length else start.at_length(length))
        reached_length(resolved.steps, spectrum)
        if trained_length and length is not None:
            spectrum = _resolve(resolved, start.at_length(length))[1]
        result = spectrum.inv_freq
        return inv_freq.new_tensor(result) if is_torch else result.astype(np.asarray(inv_freq).dtype)

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FACTS}

    def _start(self) -> Spectrum:
        """RoPE's own spectrum, which the chain is applied to."""
        if not isinstance(self.head_dim, Integral) or self.head_dim <= 0 or self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim!r} must be positive and even: channels rotate in pairs")
        if not isinstance(self.theta, Real) or not 1 < self.theta < math.inf:
            raise UserError(
                f"theta={self.theta!r} must be a number above 1; it is the model's rope_theta, 10000 in RoFormer"
            )
        _check_lengths(pretrained_length=self.pretrained_length, trained_length=self.trained_length)
        inv_freq = geometric(self.theta, self.head_dim)
        return Spectrum(inv_freq, float(self.theta), self.pretrained_length, self.trained_length)


RopeChain.position_type = Position


@dataclass(frozen=True, eq=False)
class _Watched(Spectrum):
    """A spectrum that notes the lengths a chain refers to; one that is not given is an error."""

    lengths_read: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in LENGTHS and value is None:
            raise UserError(f"the chain refers to {name}, which is not given; pass {name}=TOKENS to apply()")
        if name in (*LENGTHS, "length"):
            self.lengths_read.add(name)
        return value


def _unwatched(spectrum: Spectrum) -> Spectrum:
    return Spectrum(**{item.name: vars(spectrum)[item.name] for item in fields(Spectrum)})


def _resolve(chain: RopeChain, spectrum: Spectrum) -> tuple[RopeChain, Spectrum]:
    """The chain with every word (``auto``, ``trained_length``) replaced by its value, and the spectrum it gives."""
    steps = []
    for step in chain.steps:
        method = get_method(step.method)
        arguments = method.resolved(step.arguments, spectrum)
        steps.append({"method": step.method, **arguments})
        spectrum = method.function(spectrum, **arguments)
    return RopeChain(steps), spectrum


def _check_lengths(**lengths: int | None) -> None:
    for name, value in lengths.items():
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise UserError(f"{name}={value!r} must be a whole number of tokens, 1 or more")


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
        UserError: for metadata that was edited, a scaling that no chain expresses, or a malformed value.
    """
    content = config if isinstance(config, Mapping) else config.to_dict()
    record = mapping(content, METADATA_KEY)
    if record:
        return _recorded(json.dumps(record, sort_keys=True))
    stock = read_hf_position(content)
    return Position(
        name="pretrained",
        chain=RopeChain(stock.chain),
        theta=stock.theta,
        head_dim=stock.head_dim,
        pretrained_length=stock.pretrained_length,
        trained_length=stock.trained_length,
    )


_FIX = f'put back what was written, or delete the key "{METADATA_KEY}" and the stock entry beside it is read instead'


@lru_cache(maxsize=64)  # a run reads its own record at several places; it is checked and resolved at the first
def _recorded(text: str) -> Position:
    """The position that ``Position.metadata`` recorded; the hashes are of the record as it is written."""
    record = json.loads(text)
    steps = record.get("chain")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise wrong(f"{METADATA_KEY}.chain", steps, f"a list of methods with their arguments; {_FIX}")
    covered = {"chain_sha256": steps, "spectrum_sha256": [steps, {name: record.get(name) for name in _FACTS}]}
    for key, content in covered.items():
        recorded, actual = record.get(key), sha256_of_json(content, compact=True)
        if recorded is not None and recorded != actual:
            raise UserError(
                f"config.json: {METADATA_KEY}.{key}={recorded} is not the hash of what stands beside it, {actual}: the "
                f"chain or its inputs were edited by hand; {_FIX}"
            )
    facts = {
        "head_dim": whole(record, "head_dim", "channels"),
        "theta": number(record, "theta"),
        "pretrained_length": whole(record, "pretrained_length"),
        "trained_length": whole(record, "trained_length"),
    }
    for key, value in facts.items():
        if value is None:
            raise UserError(f"config.json: {METADATA_KEY} has no {key}; {_FIX}")
    name, base_model = str(record.get("name") or "unnamed"), record.get("base_model")
    return Position(name=name, chain=RopeChain(steps), base_model=base_model, **facts)  # type: ignore[arg-type]
