"""Rotations of a model: the spectrum of every rotary module as it stands in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Rotation:
    """The spectrum of one rotary module, as it stands in memory.

    Attributes:
        module: its name in the model, with the layer type where a model has more than one spectrum.
        rope_type: stock type of its config entry.
        inv_freq: float (rotating channels / 2,), radians per token, in the buffer's own dtype.
        attention_scaling: multiplies cos and sin.
        length: tokens of the input it was read for.
        equal_on_all_ranks: None outside torch.distributed.
    """

    module: str
    rope_type: str
    inv_freq: Tensor
    attention_scaling: float
    length: int
    equal_on_all_ranks: bool | None

    @property
    def sha256(self) -> str:
        """Of the frequencies as float32, little-endian."""
        return hashlib.sha256(self.inv_freq.detach().cpu().float().numpy().astype("<f4").tobytes()).hexdigest()


def rotations(model: PreTrainedModel, length: int) -> list[Rotation]:
    """The rotary spectra of a live model, for an input of ``length`` tokens.

    A stock type that changes with the input's length (dynamic, longrope) is read after one call at that length, which
    leaves the module as a forward pass of that length would.
    """
    return [found for name, module in _rotary_modules(model) for found in _read(name, module, length)]


def inspect_config(config: PreTrainedConfig, length: int) -> list[Rotation]:
    """The same for a model that stock transformers would build from ``config``; no weights are made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found: list[Rotation] = []
    for name, module in _rotary_modules(model):
        found += _read(name, type(module)(module.config), length)
    return found


def _rotary_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False)):
            yield name, module


def _read(name: str, module: nn.Module, length: int) -> Iterator[Rotation]:
    rope_type: Any = module.rope_type
    of_layers = rope_type if isinstance(rope_type, Mapping) else {None: rope_type}
    for layer_type, kind in of_layers.items():
        prefix = f"{layer_type}_" if layer_type else ""
        buffer = getattr(module, f"{prefix}inv_freq")
        arguments = (torch.zeros(1, device=buffer.device), torch.tensor([[length - 1]], device=buffer.device))
        with torch.no_grad():
            module(*arguments, layer_type) if layer_type else module(*arguments)
        inv_freq = getattr(module, f"{prefix}inv_freq").clone()
        scaling = float(getattr(module, f"{prefix}attention_scaling"))
        label = f"{name}[{layer_type}]" if layer_type else name
        yield Rotation(label, kind, inv_freq, scaling, length, _equal_on_all_ranks(inv_freq))


def _equal_on_all_ranks(inv_freq: Tensor) -> bool | None:
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, inv_freq.detach().cpu().float().numpy().tobytes())
    return len(set(gathered)) == 1
