"""Position: a chain together with the facts of a model that its methods refer to, as config.json records it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.errors import UserError
from ropewalk.files import sha256_of_json
from ropewalk.rope.chain import RopeChain, Step, Steps, WatchedSpectrum, check_lengths, reached_length, unwatched
from ropewalk.rope.hf_config import HfPosition, naming, read_config_json, read_hf_position
from ropewalk.rope.log_temperature import LogTemperature
from ropewalk.rope.nope_layers import NopeLayers
from ropewalk.rope.pair_axes import PairAxes
from ropewalk.rope.spectrum import FloatArray, Spectrum, geometric
from ropewalk.rope.values import mapping, number, whole, wrong

METADATA_KEY = "ropewalk"  # in config.json
OTHER_LAYERS = "other_layers"  # in the metadata
POSITION_KEYS = frozenset({"rope_scaling", "rope_parameters", "partial_rotary_factor"})  # of an architecture

_FACTS = ("head_dim", "theta", "pretrained_length", "trained_length")  # of a model, for every method
_LONGEST = 2**40  # tokens, beyond any input

# A factor whose product with base^(2i/d) overflows float32 to infinity, whose reciprocal is exactly 0. Infinity itself
# is not JSON. Where base^(2i/d) is too small for that, the factor alone must overflow: 1e39 is a number in JSON, and
# infinite as soon as an engine puts it into float32.
ZERO_FACTOR = 1e38
ZERO_FACTOR_OF_FAST_PAIRS = 1e39
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_OVERFLOW = _FLOAT32_MAX / ZERO_FACTOR


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
        other_layers: of the layer types that no chain changes, by type: those with a window in Gemma 3 and OLMo 3,
            which never see a distance that training has not. Empty: all layers rotate by ``chain``.

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
    other_layers: Mapping[str, Position] = field(default_factory=dict, hash=False)
    _as_trained: Spectrum = field(init=False, repr=False, compare=False)
    _reads_length: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        start = self._start()
        watched = WatchedSpectrum(**vars(start))
        chain, spectrum = self.chain.resolved(watched)
        reached_length(chain.steps, spectrum)  # refuses scalings that contradict
        resolved = {
            "theta": start.theta,  # 10000 and 1e4 are one base, with one hash
            "chain": chain,
            "_as_trained": unwatched(spectrum),
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
        content = read_config_json(model)
        with naming(model):
            return position_of(content)

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
            other_layers=self.other_layers,
        )

    def spectrum(self, length: int | None = None) -> Spectrum:
        """The float64 spectrum for inputs of ``length`` tokens (None: as trained)."""
        check_lengths(length=length)
        if length is None:
            return self._as_trained
        if not self._reads_length:
            return self._as_trained.at_length(length)
        return self.chain.run(self._start().at_length(length))

    @property
    def axes(self) -> PairAxes | None:
        """The axis that each pair reads, and how images and videos get positions; None: text alone."""
        return self._as_trained.axes

    @property
    def layers(self) -> NopeLayers | None:
        """The layers that do not rotate; None: all do."""
        return self._as_trained.layers

    @property
    def temperature(self) -> LogTemperature | None:
        """The factor on queries by position; None: there is none."""
        return self._as_trained.temperature

    def rope_parameters(self, max_position_embeddings: int, length: int | None = None) -> dict[str, Any]:
        """The stock entry of that spectrum, for a checkpoint that serves ``max_position_embeddings`` tokens.

        Layers without rotation are not in it; the config's class says them.
        """
        return compile_to_stock(self, max_position_embeddings, length)

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
        """Hash of the chain's resolved arguments and of the model's facts, and of those of its other layers.

        Equal for equal recipes, however they were written. It does not cover the methods' code, nor another input
        length than the trained one.
        """
        others = [self._others()] if self.other_layers else []
        return sha256_of_json([self.chain.to_list(), self._facts(), *others], compact=True)

    def metadata(self) -> dict[str, Any]:
        """The record under "ropewalk" in config.json.

        ``other_layers`` has chain and facts of the layer types that keep a rotation of their own, where there are any.
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
            **({OTHER_LAYERS: self._others()} if self.other_layers else {}),
        }

    def _others(self) -> dict[str, Any]:
        return {kind: {"chain": own.chain.to_list(), **own._facts()} for kind, own in self.other_layers.items()}

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
        check_lengths(pretrained_length=self.pretrained_length, trained_length=self.trained_length)
        inv_freq = geometric(self.theta, self.head_dim)
        return Spectrum(inv_freq, float(self.theta), self.pretrained_length, self.trained_length)


RopeChain.position_type = Position


def compile_to_stock(position: Position, max_position_embeddings: int, length: int | None = None) -> dict[str, Any]:
    """The most specific stock entry that gives a spectrum: default, linear, llama3, yarn, proportional, else longrope.

    Unmodified transformers, vLLM and SGLang read it. A log temperature has its L0 under the key that yarn and llama3
    stretch from, so with it every spectrum but plain RoPE's is written as longrope.

    Args:
        position: what rotates.
        max_position_embeddings: N, the length the checkpoint serves, in tokens.
        length: tokens of the inputs, where the spectrum depends on them; None: the trained length.
    """
    spectrum, steps = position.spectrum(length), position.chain.frequencies().steps
    steps = steps[1:] if steps and steps[0].method == "abf" else steps
    base = _plain_base(spectrum)
    if base is not None and spectrum.attention_scaling == 1.0:
        return {"rope_type": "default", "rope_theta": base, **_structural_keys(spectrum)}
    if spectrum.temperature is None and len(steps) == 1 and steps[0].method in _STOCK and _is_read_alike(steps[0]):
        stock = _STOCK[steps[0].method](steps[0].arguments)
        return {"rope_theta": spectrum.theta, **stock, **_structural_keys(spectrum)}
    return longrope_entry(spectrum, max_position_embeddings)


def _structural_keys(spectrum: Spectrum) -> dict[str, Any]:
    return {
        k: v for part in (spectrum.axes, spectrum.temperature) if part is not None for k, v in part.stock_keys().items()
    }


def _plain_base(spectrum: Spectrum) -> float | None:
    """The base at which plain RoPE is this spectrum, to 1e-12; None: there is none that float32 holds.

    NTK-aware scaling is plain RoPE at another base, b s^(d/(d-2)), and so is whatever else keeps the series geometric.
    """
    slowest, d = spectrum.inv_freq[-1], spectrum.head_dim
    candidates = [spectrum.theta]
    if d > 2 and 0 < slowest < 1:
        candidates.append(float(np.exp(-np.log(slowest) * d / (d - 2))))
    for base in candidates:
        if base < _FLOAT32_MAX and np.allclose(spectrum.inv_freq, geometric(base, d), rtol=1e-12, atol=0.0):
            return base
    return None


def _is_read_alike(step: Step) -> bool:
    """True if every engine takes the same attention scaling from the stock type.

    vLLM's yarn takes 0.1 ln s + 1 and ignores attention_factor and the two mscale.
    """
    arguments = step.arguments
    has_own = arguments.get("attention_factor") or (arguments.get("mscale") and arguments.get("mscale_all_dim"))
    return step.method != "yarn" or not has_own


_STOCK: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {  # by method, from its arguments
    "pi": lambda arguments: {"rope_type": "linear", "factor": arguments["factor"]},
    "llama3": lambda arguments: {"rope_type": "llama3", **arguments},
    "p_rope": lambda arguments: {"rope_type": "proportional", "partial_rotary_factor": arguments["fraction"]},
    "yarn": lambda arguments: {"rope_type": "yarn", **{k: v for k, v in arguments.items() if v is not None}},
}


def stock_factors(spectrum: Spectrum) -> FloatArray:
    """Per-pair factors for ``longrope``: inv_freq_i = 1 / (factor_i base^(2i/d)).

    Returns:
        float64 (d/2,), every one finite as JSON; as float32 those of stopped pairs give a frequency of exactly 0.
    """
    base = geometric(spectrum.theta, spectrum.head_dim)
    with np.errstate(divide="ignore", over="ignore"):
        factors = base / spectrum.inv_freq
        stopped = np.where(1 / base > _OVERFLOW, ZERO_FACTOR, ZERO_FACTOR_OF_FAST_PAIRS)
    return np.where(spectrum.inv_freq == 0, stopped, factors)


def longrope_entry(spectrum: Spectrum, max_position_embeddings: int) -> dict[str, Any]:
    """Any spectrum as a ``longrope`` entry for a model that serves ``max_position_embeddings`` tokens.

    The short and the long list are equal and both lengths are N. So no engine switches between lists or adds a
    scaling of its own. transformers reads attention_factor, vLLM and SGLang the two mscale keys. Of a log temperature
    the original length is L0: transformers and vLLM then choose between equal lists. SGLang reads one row of its table
    wrongly (docs/position.md), so such an export is not for it.
    """
    factors = stock_factors(spectrum).tolist()
    scaling = float(spectrum.attention_scaling)
    return {
        "rope_type": "longrope",
        "rope_theta": spectrum.theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "original_max_position_embeddings": max_position_embeddings,
        "attention_factor": scaling,
        "short_mscale": scaling,
        "long_mscale": scaling,
        **_structural_keys(spectrum),
    }


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
    return _read_off(read_hf_position(content, None if isinstance(config, Mapping) else config))


def _read_off(stock: HfPosition) -> Position:
    return Position(
        name="pretrained",
        chain=RopeChain(stock.chain),
        theta=stock.theta,
        head_dim=stock.head_dim,
        pretrained_length=stock.pretrained_length,
        trained_length=stock.trained_length,
        other_layers={kind: _read_off(own) for kind, own in stock.other_layers.items()},
    )


def declared_position(
    theta: float, head_dim: int, pretrained_length: int, architecture: Mapping[str, Any], name: str = "pretrained"
) -> Position:
    """The position of a model file (configs/model), its architecture's position keys read like a config.json's.

    Args:
        theta: RoPE base.
        head_dim: channels of a head.
        pretrained_length: max_position_embeddings of the checkpoint, tokens.
        architecture: fields of its config.json.
        name: of the position.

    Raises:
        UserError: for a scaling that no chain expresses, or a base that contradicts ``theta``.
    """
    facts = {"rope_theta": theta, "head_dim": head_dim, "max_position_embeddings": pretrained_length}
    if architecture.get("rope_theta", theta) != theta:
        raise UserError(
            f"model.architecture.rope_theta={architecture['rope_theta']:g} and model.theta={theta:g}; keep one"
        )
    if not POSITION_KEYS & architecture.keys():
        return Position(name, RopeChain([]), theta, head_dim, pretrained_length, pretrained_length)
    position = position_of({**architecture, **facts})
    if position.theta != theta:
        raise UserError(f"model.architecture has rope_theta={position.theta:g} and model.theta={theta:g}; keep one")
    return replace(position, name=name)


_FIX = f'put back what was written, or delete the key "{METADATA_KEY}" and the stock entry beside it is read instead'


@lru_cache(maxsize=64)  # a run reads its own record at several places; it is checked and resolved at the first
def _recorded(text: str) -> Position:
    """The position that ``Position.metadata`` recorded; the hashes are of the record as it is written."""
    record = json.loads(text)
    steps = record.get("chain")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise wrong(f"{METADATA_KEY}.chain", steps, f"a list of methods with their arguments; {_FIX}")
    others = mapping(record, OTHER_LAYERS) or {}
    facts_of = [{name: record.get(name) for name in _FACTS}, *([others] if others else [])]
    covered = {"chain_sha256": steps, "spectrum_sha256": [steps, *facts_of]}
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
    try:
        chain = RopeChain(steps)
    except UserError as error:
        raise UserError(f"config.json: {METADATA_KEY}.chain: {error}") from error
    own = {kind: _recorded(json.dumps(other, sort_keys=True)) for kind, other in others.items()}
    return Position(name=name, chain=chain, base_model=base_model, other_layers=own, **facts)  # type: ignore[arg-type]
