"""The rotary module whose frequencies are trained, and the config that holds them as a stock entry."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ropewalk.model.rotary import place_position
from ropewalk.rope.chain import learned_as
from ropewalk.rope.position import METADATA_KEY, position_of


def learn_frequencies(lm: PreTrainedModel, device: torch.device) -> Tensor:
    """Have a model rotate with inv_freq exp(alpha), and hand a gradient to alpha, float32 (d/2,), zeros to begin with.

    Stock rotary modules run without a gradient. With alpha at zero cos and sin are theirs, bit for bit. alpha is a
    tensor beside the parameters and none of them: ZeRO-3 holds all of these in the model's one dtype, and a cast to
    bf16 would round alpha to three digits.
    """
    rotary = lm.get_decoder().rotary_emb
    rotary.alpha = torch.zeros(rotary.inv_freq.numel(), dtype=torch.float32, device=device, requires_grad=True)
    rotary.forward = partial(_rotate, rotary)
    return rotary.alpha


def learned_alpha(lm: PreTrainedModel) -> Tensor | None:
    """The alpha of :func:`learn_frequencies`; None: the model rotates as stock transformers has it."""
    return getattr(lm.get_decoder().rotary_emb, "alpha", None)


def _rotate(rotary: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Every supported class's own forward, operation by operation, with one factor on the frequencies."""
    inv_freq = rotary.inv_freq.to(device=x.device, dtype=torch.float32) * rotary.alpha.exp()
    freqs = position_ids[..., None].float() * inv_freq
    emb = torch.cat((freqs, freqs), dim=-1)
    cos, sin = emb.cos() * rotary.attention_scaling, emb.sin() * rotary.attention_scaling
    if type(rotary).__name__.startswith("Olmo"):  # which rotate in fp32
        return cos, sin
    return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def saved_config(lm: PreTrainedModel) -> PreTrainedConfig:
    """The config of a model as a checkpoint holds it: what has been learned stands in its chain and its stock entry."""
    alpha = learned_alpha(lm)
    if alpha is None:
        return lm.config
    position = position_of(lm.config)
    frozen = replace(position, chain=learned_as(position.chain, alpha.tolist()))
    config = place_position(deepcopy(lm.config), frozen)
    setattr(config, METADATA_KEY, frozen.metadata())
    return config
