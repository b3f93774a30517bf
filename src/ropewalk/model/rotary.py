"""The rotary module of a live model: its stock spectrum, put back after a cast, and asserted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.rope import Position, Spectrum
from ropewalk.rope.hf_config import rotating_layers
from ropewalk.rope.methods.scaling import yarn_ramp_ends
from ropewalk.rope.position import longrope_entry
from ropewalk.rope.spectrum import FloatArray, geometric

# float32 rounding of the factor, of base^x and of their product, relative to the float64 spectrum.
SPECTRUM_TOLERANCE = 2.4e-7
_HALF_ULP = 2.0**-24  # the largest relative error of rounding to float32

_ORIGINAL = "original_max_position_embeddings"
_READ_LONGROPE_ALONE = ("phi3", "phi4_multimodal")  # beside default; a yarn entry is taken for longrope, others refused


def place_position(config: PreTrainedConfig, position: Position, length: int | None = None) -> None:
    """Put a chain's stock entry into a config; where layers differ (Gemma 3, OLMo 3), the full-attention layers'.

    A share of channels that rotates at all (Phi-3's partial_rotary_factor) is the architecture's and stays; under
    ``proportional`` it was the scaling's, which the chain holds. A top-level original_max_position_embeddings
    (Phi-3's, which comes back by itself where deleted) wins in transformers, so it follows the entry.

    Args:
        config: its max_position_embeddings is the length that the checkpoint serves, in tokens.
        position: how the model shall rotate.
        length: tokens of the inputs, for length-dependent methods; None: the trained length.
    """
    served, present = config.max_position_embeddings, config.rope_parameters
    layer_type = _layer_types(config)[0]
    entry = position.rope_parameters(served, length)
    if not _is_read(config, layer_type, entry):
        entry = longrope_entry(position.spectrum(length), served)
    replaced = present[layer_type] if layer_type else present
    if "partial_rotary_factor" in replaced and replaced.get("rope_type") != "proportional":
        entry["partial_rotary_factor"] = replaced["partial_rotary_factor"]
    config.rope_parameters = {**present, layer_type: entry} if layer_type else entry
    if hasattr(config, _ORIGINAL):
        setattr(config, _ORIGINAL, entry.get(_ORIGINAL, served))


def _is_read(config: PreTrainedConfig, layer_type: str | None, entry: Mapping[str, Any]) -> bool:
    """True if transformers reads every key of ``entry`` in a model of this type."""
    if config.model_type in _READ_LONGROPE_ALONE:
        return entry["rope_type"] in ("default", "longrope")
    # one layer type's ``truncate`` is not looked up
    return layer_type is None or entry.get("truncate", True)


def _layer_types(config: PreTrainedConfig) -> tuple[str | None, ...]:
    """The layer types with a spectrum of their own, the one that the chain is about first; (None,): all share one."""
    return tuple(rotating_layers(config.rope_parameters, getattr(config, "layer_types", None))) or (None,)


def stock_spectrum(model: PreTrainedModel, layer_type: str | None = None) -> tuple[Tensor, float]:
    """The spectrum that transformers' own rope function computes from the model's config: the truth everywhere.

    Returns:
        inverse frequencies, float32 (head_dim / 2,) on the CPU, and the attention scaling.
    """
    entry = model.config.rope_parameters[layer_type] if layer_type else model.config.rope_parameters
    rotary = model.get_decoder().rotary_emb
    is_default = entry["rope_type"] == "default"
    compute = rotary.compute_default_rope_parameters if is_default else ROPE_INIT_FUNCTIONS[entry["rope_type"]]
    options = {"layer_type": layer_type} if layer_type else {}
    inv_freq, scaling = compute(model.config, device=torch.device("cpu"), **options)
    return inv_freq, float(scaling)


def install_spectrum(model: PreTrainedModel) -> None:
    """Put the float32 spectrum back where a cast has rounded it.

    ``.to(bf16)`` and zero.Init cast the rotary buffers, and the longrope forward copies original_inv_freq over
    inv_freq at every call, so both are set. Call it after the engine is built and after every load.
    """
    rotary = model.get_decoder().rotary_emb
    for layer_type in _layer_types(model.config):
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


def assert_spectrum(model: PreTrainedModel, spectrum: Spectrum) -> None:
    """Check that the model rotates with ``spectrum``.

    The buffers must be float32 and bitwise the stock function's, those within float32 rounding of the float64
    spectrum, exact zeros exact. Where layers differ, the full-attention ones rotate with ``spectrum``, the others
    with their own entry.

    Raises:
        RuntimeError: naming what differs; a wrong spectrum must stop the run.
    """
    for layer_type in _layer_types(model.config):
        _assert_buffers(model, layer_type)
    layer_type = _layer_types(model.config)[0]
    truth, scaling = stock_spectrum(model, layer_type)
    stock, exact = truth.double().numpy(), spectrum.inv_freq
    if not np.array_equal(stock == 0, exact == 0):
        raise RuntimeError("the stopped pairs of the config are not those of the chain")
    turning = exact != 0
    entry = model.config.rope_parameters
    if layer_type:
        entry = {**entry[layer_type], "truncate": True}  # see _is_read
    difference = np.abs(stock[turning] / exact[turning] - 1)
    over = difference / stock_tolerances(spectrum, entry)[turning]
    if over.max(initial=0.0) > 1:
        worst = int(over.argmax())
        raise RuntimeError(
            f"the config's spectrum differs from the chain's by {difference[worst]:.3g} relative at pair "
            f"{int(np.flatnonzero(turning)[worst])}, {over[worst]:.3g} times what float32 rounding explains"
        )
    if abs(scaling / spectrum.attention_scaling - 1) > SPECTRUM_TOLERANCE:
        raise RuntimeError(f"attention scaling is {scaling}, the chain's {spectrum.attention_scaling}")


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
