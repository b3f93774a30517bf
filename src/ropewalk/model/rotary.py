"""Rotary modules of models: a chain put into a config, the spectrum in memory read, put back after a cast, asserted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.errors import UserError, in_one_line
from ropewalk.model.carrier import carry_layers, carry_temperature
from ropewalk.model.hf_directory import auto_class
from ropewalk.rope import Position, Spectrum, log_temperature
from ropewalk.rope.hf_config import READ_SHARE, SHARE, rotating_layers
from ropewalk.rope.log_temperature import LogTemperature, read_stock_temperature
from ropewalk.rope.methods.scaling import yarn_ramp_ends
from ropewalk.rope.nope_layers import CARRIER, NopeLayers, describe_layers
from ropewalk.rope.pair_axes import IntArray, axis_letters
from ropewalk.rope.position import longrope_entry
from ropewalk.rope.spectrum import FloatArray, geometric

# float32 rounding of the factor, of base^x and of their product, relative to the float64 spectrum.
SPECTRUM_TOLERANCE = 2.4e-7
_HALF_ULP = 2.0**-24  # the largest relative error of rounding to float32

_ORIGINAL = "original_max_position_embeddings"
_UNSCALED = LogTemperature(0.0, 1)
_Carried = tuple[tuple[bool, ...] | None, LogTemperature | None]  # of a model: the layers that rotate, the temperature
_READ_LONGROPE_ALONE = ("phi3", "phi4_multimodal")  # beside default; a yarn entry is taken for longrope, others refused


def place_position(
    config: PreTrainedConfig, position: Position, length: int | None = None, refused: Sequence[str] = ()
) -> PreTrainedConfig:
    """Put a chain's stock entry into a config; where layers differ (Gemma 3, OLMo 3), the full-attention layers'.

    The entries of other layer types stay as they are. Of OLMo 3 older readers know one base for all layers
    (transformers 4, SGLang), so with ``refused`` an entry at another base is written as longrope factors at that one.

    Layers without rotation, and a log temperature, are carried by another stock class: the config is then a new one, of
    that class.

    A share of channels that rotates at all (Phi-3's partial_rotary_factor) is the architecture's and stays; under
    ``proportional`` it was the scaling's, which the chain holds. A top-level original_max_position_embeddings
    (Phi-3's, which comes back by itself where deleted) wins in transformers, so it follows the entry.

    Args:
        config: its max_position_embeddings is the length that the checkpoint serves, in tokens.
        position: how the model shall rotate.
        length: tokens of the inputs, for length-dependent methods; None: the trained length.
        refused: stock types that readers of the checkpoint differ on; their spectrum is written as longrope factors.

    Returns:
        The config: the given one, changed, or the new one.

    Raises:
        UserError: for axes of pairs that transformers' class for the model does not read, or layers without rotation
            or a log temperature in a model that no stock class carries with them.
    """
    outer = config if position.layers is None else carry_layers(config, position.layers)
    outer = outer if position.temperature is None else carry_temperature(outer, position.temperature)
    config = outer.get_text_config()
    _check_axes(config, position)
    served, present = config.max_position_embeddings, config.rope_parameters
    layer_type = _layer_types(config)[0]
    entry = position.rope_parameters(served, length)
    if entry["rope_type"] in refused or not _is_read(config, layer_type, entry):
        entry = longrope_entry(position.spectrum(length), served)
    if refused and config.model_type == "olmo3" and layer_type == "full_attention":
        base = present["sliding_attention"]["rope_theta"]
        if entry["rope_theta"] != base:
            entry = longrope_entry(replace(position.spectrum(length), theta=base), served)
    replaced = rope_entry(config)
    if config.model_type in READ_SHARE and SHARE in replaced and replaced.get("rope_type") != "proportional":
        entry[SHARE] = replaced[SHARE]
    elif config.model_type not in READ_SHARE and hasattr(config, SHARE):
        delattr(config, SHARE)  # the class ignores it under default, and fails with it under other types
    config.rope_parameters = {**present, layer_type: entry} if layer_type else entry
    if hasattr(config, _ORIGINAL):
        setattr(config, _ORIGINAL, entry.get(_ORIGINAL, served))
    return outer


def _check_axes(config: PreTrainedConfig, position: Position) -> None:
    """Raise UserError unless the model's class reads the chain's axes, which others ignore in silence."""
    if position.axes is not None and not position.axes.is_read_by(config.model_type):
        raise UserError(
            f"model_type={config.model_type} does not read {position.chain.structure()}; choose a chain without axes, "
            "or a model of images and videos with this layout (bands, alternating: qwen2_vl, qwen2_5_vl)"
        )


def rope_entry(config: PreTrainedConfig) -> dict[str, Any]:
    """The stock entry that a chain is about: the only one, or the full-attention layers'."""
    config = config.get_text_config()
    layer_type = _layer_types(config)[0]
    return dict(config.rope_parameters[layer_type] if layer_type else config.rope_parameters)


def _is_read(config: PreTrainedConfig, layer_type: str | None, entry: Mapping[str, Any]) -> bool:
    """True if transformers reads every key of ``entry`` in a model of this type."""
    if entry["rope_type"] == "proportional" and (layer_type or config.model_type in READ_SHARE):
        return False  # whose own share of a head stands under the same key
    if config.model_type in _READ_LONGROPE_ALONE:
        return entry["rope_type"] in ("default", "longrope")
    return layer_type is None or entry.get("truncate", True)  # see _entry


def _layer_types(config: PreTrainedConfig) -> tuple[str | None, ...]:
    """The layer types with a spectrum of their own, the one that the chain is about first; (None,): all share one."""
    return tuple(rotating_layers(config.rope_parameters, getattr(config, "layer_types", None))) or (None,)


def stock_spectrum(model: PreTrainedModel, layer_type: str | None = None) -> tuple[Tensor, float]:
    """The spectrum that transformers' own rope function computes from the model's config: the truth everywhere.

    Returns:
        inverse frequencies, float32 (head_dim / 2,) on the CPU, and the attention scaling.
    """
    config = model.config.get_text_config()
    entry = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    rotary = model.get_decoder().rotary_emb
    is_default = entry["rope_type"] == "default"
    compute = rotary.compute_default_rope_parameters if is_default else ROPE_INIT_FUNCTIONS[entry["rope_type"]]
    options = {"layer_type": layer_type} if layer_type else {}
    inv_freq, scaling = compute(config, device=torch.device("cpu"), **options)
    return inv_freq, float(scaling)


def stock_axes(rotary: Any, pairs: int) -> IntArray | None:
    """The axis that a live rotary module of transformers gives each pair, int64 (pairs,); None: text alone.

    Its own function hands out the numbers of the axes, in the place of cosines, so this is what it does with them.
    """
    hand_out = getattr(rotary, "recomposition_frequencies", None)
    if hand_out is None:
        return None
    numbers = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, pairs).clone()
    return hand_out(numbers)[0, 0, :pairs].long().numpy()


def stock_layers(model: PreTrainedModel) -> tuple[bool, ...] | None:
    """True for each layer of a live model that rotates, read off its attention modules; None: its class has no other.

    They are SmolLM3's: of other classes that leave layers out (Llama 4), no chain speaks.
    """
    if model.config.get_text_config().model_type != CARRIER:
        return None
    return tuple(bool(module.use_rope) for module in model.get_decoder().modules() if hasattr(module, "use_rope"))


def stock_temperature(model: PreTrainedModel) -> LogTemperature | None:
    """The factor on queries that a live model's attention reads from its config; None: its class has none.

    It is Ministral 3's: of other classes that have one (Llama 4, Mistral 4), no chain speaks.
    """
    config = model.config.get_text_config()
    if config.model_type != log_temperature.CARRIER:
        return None
    return read_stock_temperature(config.rope_parameters, None)


def install_spectrum(model: PreTrainedModel) -> None:
    """Put the float32 spectrum back where a cast has rounded it.

    ``.to(bf16)`` and zero.Init cast the rotary buffers, and the longrope forward copies original_inv_freq over
    inv_freq at every call, so both are set. Call it after the engine is built and after every load.
    """
    rotary = model.get_decoder().rotary_emb
    for layer_type in _layer_types(model.config.get_text_config()):
        truth, scaling = stock_spectrum(model, layer_type)
        prefix = f"{layer_type}_" if layer_type else ""
        for name in (f"{prefix}inv_freq", f"{prefix}original_inv_freq"):
            device = getattr(rotary, name).device
            setattr(rotary, name, nn.Buffer(truth.to(device, copy=True), persistent=False))
        kind = rotary.rope_type[layer_type] if layer_type else rotary.rope_type
        if kind == "longrope":
            # Read past the trained length; without it, the device's own pow would compute it anew there.
            setattr(rotary, f"{prefix}long_inv_freq", truth.to(device, copy=True))
        setattr(rotary, f"{prefix}attention_scaling", scaling)


def assert_spectrum(
    model: PreTrainedModel, spectrum: Spectrum, other_layers: Mapping[str, Position] | None = None
) -> None:
    """Check that the model rotates with ``spectrum``, and layer types with one of their own as they were read.

    The buffers must be float32 and bitwise the stock function's, those within float32 rounding of the float64
    spectrum, exact zeros exact, each pair on its axis, the layers those that shall rotate, queries scaled as they shall
    be. Where layers have entries of their own, the full-attention ones rotate with ``spectrum``, others with theirs,
    which are held against ``other_layers`` (a Position's) where it names them.

    Raises:
        RuntimeError: naming what differs; a wrong spectrum must stop the run.
    """
    config = model.config.get_text_config()
    layer_types = _layer_types(config)
    for layer_type in layer_types:
        _assert_buffers(model, layer_type)
    inv_freq, scaling = stock_spectrum(model, layer_types[0])
    axes = stock_axes(model.get_decoder().rotary_emb, inv_freq.numel())
    carried = stock_layers(model), stock_temperature(model)
    faults = spectrum_faults(inv_freq, scaling, spectrum, _entry(config, layer_types[0]), axes, *carried)
    others = {kind: (*stock_spectrum(model, kind), _entry(config, kind)) for kind in layer_types[1:] if kind}
    faults += _other_faults(others, other_layers or {})
    if faults:
        raise RuntimeError("; ".join(faults))


def _other_faults(
    stock: Mapping[str, tuple[Tensor, float, Mapping[str, Any]]], claimed: Mapping[str, Position]
) -> list[str]:
    """Differences of layer types that no chain changes: (inv_freq, attention scaling, entry) of each, by type."""
    faults = [f"no {kind} layers with a rotation of their own, which are claimed" for kind in claimed.keys() - stock]
    for kind in claimed.keys() & stock:
        inv_freq, scaling, entry = stock[kind]
        faults += [f"{kind}: {fault}" for fault in spectrum_faults(inv_freq, scaling, claimed[kind].spectrum(), entry)]
    return faults


def _entry(config: PreTrainedConfig, layer_type: str | None) -> dict[str, Any]:
    """The stock entry as transformers reads it: one layer type's ``truncate`` is not looked up."""
    entry = config.rope_parameters
    return {**entry[layer_type], "truncate": True} if layer_type else dict(entry)


def spectrum_faults(
    inv_freq: Tensor,
    attention_scaling: float,
    spectrum: Spectrum,
    entry: Mapping[str, Any],
    axes: IntArray | None = None,
    layers: tuple[bool, ...] | None = None,
    temperature: LogTemperature | None = None,
) -> list[str]:
    """The differences of a model's rotation from ``spectrum`` beyond float32 rounding, in words; exact zeros exact.

    Args:
        inv_freq: float (rotating channels / 2,), radians per token.
        attention_scaling: multiplies cos and sin.
        spectrum: of the chain.
        entry: stock entry that ``inv_freq`` was computed from.
        axes: (rotating channels / 2,), the axis that each pair reads; None: text alone.
        layers: (layers,), True for each that rotates; None: all do.
        temperature: the factor on queries; None: there is none.
    """
    stock, exact = inv_freq.detach().cpu().double().numpy(), spectrum.inv_freq
    if stock.shape != exact.shape:
        return [f"stock transformers rotates {stock.size} pairs, the claimed chain {exact.size}"]
    with np.errstate(divide="ignore", invalid="ignore"):  # of a stopped pair on another method's ramp
        is_wrong = np.abs(stock - exact) > stock_tolerances(spectrum, entry) * exact
    is_wrong |= (stock == 0) != (exact == 0)
    pairs = np.flatnonzero(is_wrong).tolist()
    faults = [f"stock transformers rotates other than the claimed chain at pairs {pairs}"] if pairs else []
    if not np.isclose(attention_scaling, spectrum.attention_scaling, rtol=SPECTRUM_TOLERANCE):
        faults.append(f"attention scaling is {attention_scaling:g}, the claimed chain's {spectrum.attention_scaling:g}")
    claimed = None if spectrum.axes is None else spectrum.axes.of_pairs
    if axis_letters(axes) != axis_letters(claimed):
        faults.append(f"its pairs read the axes {axis_letters(axes)}, the claimed chain's {axis_letters(claimed)}")
    factors = [str(found or _UNSCALED) for found in (temperature, spectrum.temperature)]
    if factors[0] != factors[1]:
        faults.append(f"{factors[0]}, and the claim is: {factors[1]}")
    return faults + _layer_faults(layers, spectrum.layers)


def _layer_faults(layers: tuple[bool, ...] | None, claimed: NopeLayers | None) -> list[str]:
    if layers is None:
        return [] if claimed is None else [f"every layer rotates, and the claim is: {claimed}"]
    wanted = (True,) * len(layers) if claimed is None else claimed.rotate(len(layers))
    if layers == wanted:
        return []
    return [f"layers without rotation: {describe_layers(layers)}, the claimed chain's {describe_layers(wanted)}"]


def _assert_buffers(model: PreTrainedModel, layer_type: str | None) -> None:
    truth, scaling = stock_spectrum(model, layer_type)
    rotary = model.get_decoder().rotary_emb
    prefix = f"{layer_type}_" if layer_type else ""
    for name in (f"{prefix}inv_freq", f"{prefix}original_inv_freq"):
        buffer = getattr(rotary, name)
        if buffer.dtype != torch.float32 or not torch.equal(buffer.cpu(), truth):
            raise RuntimeError(
                f"{name} is not the float32 spectrum of the config (dtype {buffer.dtype}); it was cast or overwritten"
            )
    installed = getattr(rotary, f"{prefix}attention_scaling")
    if installed != scaling:
        raise RuntimeError(f"{prefix}attention_scaling is {installed}, the config's {scaling}")


def stock_tolerances(spectrum: Spectrum, entry: Mapping[str, Any]) -> FloatArray:
    """Tolerance of each pair that transformers computes from ``entry`` in float32, against the float64 spectrum.

    SPECTRUM_TOLERANCE everywhere. Where head_dim is not a power of two the exponent 2i/d is rounded as well, by up to
    2^-25, which ln(theta) magnifies. On the ramp of yarn and llama3 a pair is theta_i (w + (1 - w) / s). An error of w
    is magnified there by at most theta_i / inv_freq_i, so by s where w is small; the mixing rounds three times more.
    Only pairs that turn few times in L are on a ramp, so in radians this stays below the rounding of the fast pairs.

    Returns:
        float64 (d/2,), relative.
    """
    is_rounded = spectrum.head_dim & (spectrum.head_dim - 1) != 0
    plain = SPECTRUM_TOLERANCE + is_rounded * 2**-25 * math.log(entry["rope_theta"])
    tolerances = np.full(spectrum.inv_freq.size, plain)
    if entry["rope_type"] not in ("yarn", "llama3"):
        return tolerances
    weight, error = _yarn_weights(spectrum, entry) if entry["rope_type"] == "yarn" else _llama3_weights(spectrum, entry)
    on_ramp = (weight > -error) & (weight < 1 + error)
    unscaled = geometric(spectrum.theta, spectrum.head_dim)
    magnified = error * unscaled / spectrum.inv_freq + 3 * _HALF_ULP
    return tolerances + np.where(on_ramp, magnified, 0.0)


def _yarn_weights(spectrum: Spectrum, entry: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """w_i = (high - i) / (high - low), not yet clamped, and the absolute error of the float32 one.

    The quotient rounds; where low and high are not whole numbers, so do low, i - low and high - low.
    """
    truncate = entry.get("truncate", True)
    length = entry["original_max_position_embeddings"]
    fast, slow = entry.get("beta_fast") or 32.0, entry.get("beta_slow") or 1.0
    low, high = yarn_ramp_ends(spectrum, length, fast, slow, truncate)
    width = high - low if high != low else 0.001
    pairs = np.arange(spectrum.inv_freq.size, dtype=np.float64)
    weight = (low + width - pairs) / width
    error = _HALF_ULP * (1 if truncate else 3 + low / width)
    return weight, np.full(pairs.size, error)


def _llama3_weights(spectrum: Spectrum, entry: Mapping[str, Any]) -> tuple[FloatArray, FloatArray]:
    """w_i = (turns_i - low) / (high - low), not yet clamped, and the absolute error of the float32 one.

    turns_i = L / (2 pi / theta_i) carries the error of theta_i and rounds three times; low rounds once.
    """
    low, high = entry["low_freq_factor"], entry["high_freq_factor"]
    unscaled = geometric(spectrum.theta, spectrum.head_dim)
    turns = entry["original_max_position_embeddings"] * unscaled / (2 * math.pi)
    theta_error = stock_tolerances(spectrum, {**entry, "rope_type": "default"})
    error = ((theta_error + 3 * _HALF_ULP) * turns + _HALF_ULP * low) / (high - low)
    return (turns - low) / (high - low), error


@dataclass(frozen=True)
class Rotation:
    """The spectrum of one rotary module, as it stands in memory.

    Attributes:
        module: its name in the model, with the layer type where a model has more than one spectrum.
        entry: stock entry of the config that it was computed from.
        inv_freq: float (rotating channels / 2,), radians per token, in the buffer's own dtype.
        attention_scaling: multiplies cos and sin.
        length: tokens of the input it was read for.
        equal_on_all_ranks: None outside torch.distributed.
        axes: (rotating channels / 2,), 0 for time, 1 for height, 2 for width; None: text alone.
        layers: (layers,), True for each layer of the model that rotates; None: all do.
        temperature: the factor on queries by position; None: the class has none.
        output: float32 (2, channels), cos and sin at position ``length`` - 1 as the module hands them out; None: it
            hands out something else.
    """

    module: str
    entry: Mapping[str, Any]
    inv_freq: Tensor
    attention_scaling: float
    length: int
    equal_on_all_ranks: bool | None
    axes: IntArray | None = None
    layers: tuple[bool, ...] | None = None
    temperature: LogTemperature | None = None
    output: Tensor | None = None

    @property
    def rope_type(self) -> str:
        """Stock type of the entry."""
        return str(self.entry["rope_type"])

    @property
    def sha256(self) -> str:
        """Of the frequencies as float32, little-endian."""
        return hashlib.sha256(self.inv_freq.detach().cpu().float().numpy().astype("<f4").tobytes()).hexdigest()

    def faults(self, spectrum: Spectrum) -> list[str]:
        """The differences from the spectrum of a chain, at ``length`` tokens; see :func:`spectrum_faults`."""
        carried = self.axes, self.layers, self.temperature
        return spectrum_faults(self.inv_freq, self.attention_scaling, spectrum, self.entry, *carried)


def rotations(model: PreTrainedModel, length: int) -> list[Rotation]:
    """The rotary spectra of a live model, for an input of ``length`` tokens.

    A stock type that changes with the input's length (dynamic, longrope) is read after one call at that length, which
    leaves the module as a forward pass of that length would.
    """
    carried = stock_layers(model), stock_temperature(model)
    return [rotation for name, module in _rotary_modules(model) for rotation in _read(name, module, length, carried)]


def stock_rotations(model: PreTrainedModel, length: int) -> list[Rotation]:
    """The rotations of modules that the model's own classes build anew from its config, on the CPU; no weights."""
    with torch.device("cpu"):
        modules = [(name, type(module)(module.config)) for name, module in _rotary_modules(model)]
        carried = stock_layers(model), stock_temperature(model)
        return [rotation for name, module in modules for rotation in _read(name, module, length, carried)]


def inspect_config(config: PreTrainedConfig, length: int) -> list[Rotation]:
    """The same for a model that stock transformers would build from ``config``; no weights are made.

    Raises:
        UserError: where it builds none.
    """
    if (
        type(config.get_text_config()) in MODEL_FOR_CAUSAL_LM_MAPPING
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        config = config.get_text_config()  # of a model of several modalities
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
        rotations = stock_rotations(model, length)
    except (ValueError, KeyError, ImportError, TypeError, RuntimeError) as error:
        raise UserError(
            f"transformers builds no {config.model_type} of this config.json: {in_one_line(error)}"
        ) from error
    if not rotations:
        raise UserError(
            f"model_type={config.model_type} has no rotary module in transformers, so it has no RoPE to read"
        )
    return rotations


def chain_rotation(modules: list[Rotation]) -> Rotation:
    """The rotation that a chain is about: the only one, or the full-attention layers' where layers differ."""
    return next((rotation for rotation in modules if "full_attention" in rotation.module), modules[0])


def position_faults(modules: list[Rotation], position: Position, length: int | None = None) -> list[str]:
    """The differences of a model's rotations from ``position`` at ``length`` tokens (None: as trained), in words.

    Of the chain, and of the layer types that no chain changes.
    """
    chosen = chain_rotation(modules)
    others = {
        other.module.rpartition("[")[2].removesuffix("]"): (other.inv_freq, other.attention_scaling, other.entry)
        for other in modules
        if other is not chosen
    }
    return chosen.faults(position.spectrum(length)) + _other_faults(others, position.other_layers)


def _rotary_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    is_multimodal = model.config.get_text_config() is not model.config
    # a tower of images rotates too, by no chain
    modules = set(model.get_decoder().modules()) if is_multimodal else set(model.modules())
    for name, module in model.named_modules():
        if module in modules and any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
            yield name, module


def _read(name: str, module: Any, length: int, carried: _Carried) -> Iterator[Rotation]:
    layer_types = list(module.rope_type) if isinstance(module.rope_type, Mapping) else [None]
    for layer_type in layer_types:
        prefix = f"{layer_type}_" if layer_type else ""
        buffer = getattr(module, f"{prefix}inv_freq")
        states = torch.zeros(1, dtype=torch.float32, device=buffer.device)
        arguments = (states, torch.tensor([[length - 1]], device=buffer.device), *([layer_type] if layer_type else []))
        with torch.no_grad():
            output = module(*arguments)
        inv_freq = getattr(module, f"{prefix}inv_freq").clone()
        scaling = float(getattr(module, f"{prefix}attention_scaling"))
        entry = _entry(module.config, layer_type)
        label = f"{name}[{layer_type}]" if layer_type else name
        axes = stock_axes(module, inv_freq.numel())
        is_pair = isinstance(output, tuple) and len(output) == 2 and axes is None
        cos_sin = torch.stack([values.flatten().float().cpu() for values in output]) if is_pair else None
        equal = _equal_on_all_ranks(inv_freq)
        yield Rotation(label, entry, inv_freq, scaling, length, equal, axes, *carried, cos_sin)


def _equal_on_all_ranks(inv_freq: Tensor) -> bool | None:
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, inv_freq.detach().cpu().float().numpy().tobytes())
    return len(set(gathered)) == 1
