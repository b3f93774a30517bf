"""Rotations of a model: the spectrum of every rotary module in memory, and its comparison with a chain's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ropewalk.model.rotary import SPECTRUM_TOLERANCE, stock_tolerances
from ropewalk.rope import Spectrum


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
    """

    module: str
    entry: Mapping[str, Any]
    inv_freq: Tensor
    attention_scaling: float
    length: int
    equal_on_all_ranks: bool | None

    @property
    def rope_type(self) -> str:
        """Stock type of the entry."""
        return str(self.entry["rope_type"])

    @property
    def sha256(self) -> str:
        """Of the frequencies as float32, little-endian."""
        return hashlib.sha256(self.inv_freq.detach().cpu().float().numpy().astype("<f4").tobytes()).hexdigest()

    def faults(self, spectrum: Spectrum) -> list[str]:
        """The differences from a chain's spectrum beyond what float32 rounding explains, in words; exact zeros exact.

        Args:
            spectrum: of the chain, at ``length`` tokens.
        """
        stock, exact = self.inv_freq.detach().cpu().double().numpy(), spectrum.inv_freq
        if stock.shape != exact.shape:
            return [f"stock transformers rotates {stock.size} pairs, the claimed chain {exact.size}"]
        with np.errstate(divide="ignore", invalid="ignore"):  # of a stopped pair on another method's ramp
            too_far = np.abs(stock - exact) > stock_tolerances(spectrum, self.entry) * exact
        wrong = np.flatnonzero(too_far | ((stock == 0) != (exact == 0)))
        faults = [f"stock transformers rotates other than the claimed chain at pairs {wrong.tolist()}"]
        faults = faults if wrong.size else []
        if not np.isclose(self.attention_scaling, spectrum.attention_scaling, rtol=SPECTRUM_TOLERANCE):
            faults.append(
                f"attention scaling is {self.attention_scaling:g}, the claimed chain's {spectrum.attention_scaling:g}"
            )
        return faults


def rotations(model: PreTrainedModel, length: int) -> list[Rotation]:
    """The rotary spectra of a live model, for an input of ``length`` tokens.

    A stock type that changes with the input's length (dynamic, longrope) is read after one call at that length, which
    leaves the module as a forward pass of that length would.
    """
    return [rotation for name, module in _rotary_modules(model) for rotation in _read(name, module, length)]


def inspect_config(config: PreTrainedConfig, length: int) -> list[Rotation]:
    """The same for a model that stock transformers would build from ``config``; no weights are made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [
        rotation
        for name, module in _rotary_modules(model)
        for rotation in _read(name, type(module)(module.config), length)
    ]


def chain_rotation(modules: list[Rotation]) -> Rotation:
    """The rotation that a chain is about: the only one, or the full-attention layers' where layers differ."""
    return next((rotation for rotation in modules if "full_attention" in rotation.module), modules[0])


def _rotary_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
            yield name, module


def _read(name: str, module: Any, length: int) -> Iterator[Rotation]:
    layer_types = list(module.rope_type) if isinstance(module.rope_type, Mapping) else [None]
    for layer_type in layer_types:
        prefix = f"{layer_type}_" if layer_type else ""
        buffer = getattr(module, f"{prefix}inv_freq")
        arguments = (torch.zeros(1, device=buffer.device), torch.tensor([[length - 1]], device=buffer.device))
        with torch.no_grad():
            module(*arguments, layer_type) if layer_type else module(*arguments)
        inv_freq = getattr(module, f"{prefix}inv_freq").clone()
        scaling = float(getattr(module, f"{prefix}attention_scaling"))
        entry = module.config.rope_parameters
        if layer_type:
            entry = {**entry[layer_type], "truncate": True}  # transformers does not look up one layer type's truncate
        label = f"{name}[{layer_type}]" if layer_type else name
        yield Rotation(label, entry, inv_freq, scaling, length, _equal_on_all_ranks(inv_freq))


def _equal_on_all_ranks(inv_freq: Tensor) -> bool | None:
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, inv_freq.detach().cpu().float().numpy().tobytes())
    return len(set(gathered)) == 1
