"""A model in llama.cpp's words: its position, its architecture, its weights renamed and laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from ropewalk.errors import UserError
from ropewalk.model.load import head_dim, sliding_window
from ropewalk.rope import log_temperature
from ropewalk.rope.log_temperature import LogTemperature
from ropewalk.rope.nope_layers import CARRIER, NopeLayers, describe_layers, is_fourth
from ropewalk.rope.position import Position, stock_factors

FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufPosition:
    """Position in the words of a GGUF file.

    Attributes:
        freq_base: RoPE base.
        factors: float32 (rotating channels / 2,), freq_i = base^(-2i/d) / factor_i; None: all 1, not written.
        attn_factor: multiplies cos and sin; None: 1, not written.
        scaling: rope.scaling.* keys of llama.cpp's own scalings (linear, yarn).
        dimensions: channels of a head that rotate.
        layers: those that do not rotate, which the architecture says and no key; None: all do.
        temperature: the factor on queries, whose length is also in ``scaling``; None: there is none.
    """

    freq_base: float
    factors: NDArray[np.float32] | None
    attn_factor: float | None
    scaling: dict[str, Any]
    dimensions: int
    layers: NopeLayers | None = None
    temperature: LogTemperature | None = None


def gguf_position(position: Position, served: int) -> GgufPosition:
    """The position of a model that serves ``served`` tokens, for llama.cpp.

    It knows ``linear``, and ``yarn`` with the truncated ramp; every other scaling is written as factors, for which no
    rope.scaling.type may be set, since ``longrope`` without its own tensors runs as plain RoPE.
    """
    scaled = position.temperature if position.temperature and position.temperature.beta else None  # else a llama
    stock, rest = position.rope_parameters(served), (position.head_dim, position.layers, scaled)
    base = float(stock["rope_theta"])
    length = {} if scaled is None else {"original_context_length": scaled.length}  # where its mistral3 looks for L0
    if stock["rope_type"] == "default":
        return GgufPosition(base, None, None, length, *rest)
    if stock["rope_type"] == "linear":
        return GgufPosition(base, None, None, {"type": "linear", "factor": float(stock["factor"])}, *rest)
    if stock["rope_type"] == "yarn" and stock.get("truncate", True):
        return GgufPosition(base, None, None, _yarn(stock), *rest)
    spectrum = position.spectrum()
    with np.errstate(over="ignore"):  # 1e39 is meant to become infinite
        factors: NDArray[np.float32] = stock_factors(spectrum).astype(np.float32)
    attention = float(spectrum.attention_scaling)
    return GgufPosition(spectrum.theta, factors, None if attention == 1 else attention, length, *rest)


def _yarn(stock: dict[str, Any]) -> dict[str, Any]:
    scaling = {
        "type": "yarn",
        "factor": float(stock["factor"]),
        "original_context_length": int(stock["original_max_position_embeddings"]),
    }
    for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        value = float(stock.get(key) or default)
        if value != default:
            scaling[f"yarn_{key}"] = value
    return scaling


@dataclass(frozen=True)
class Family:
    """How one model type is written.

    Attributes:
        arch: llama.cpp's architecture.
        interleaved: rotates neighbouring channels, so rows of q and k are permuted from halves to pairs.
        reads_factors: its graph reads ``rope_freqs.weight``; the others refuse a file that holds one.
        norm_shift: added to the weights of norms (Gemma keeps them less 1).
    """

    arch: str
    interleaved: bool = False
    reads_factors: bool = False
    norm_shift: float = 0.0


_LLAMA = Family("llama", interleaved=True, reads_factors=True)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "olmo": Family("olmo", interleaved=True),
    "olmo2": Family("olmo2"),
    "gemma": Family("gemma", norm_shift=1.0),
    "gemma2": Family("gemma2", norm_shift=1.0),
    "gemma3_text": Family("gemma3", norm_shift=1.0),
    CARRIER: Family("smollm3", interleaved=True),
    log_temperature.CARRIER: Family("mistral3", interleaved=True, reads_factors=True),
}


def family_of(config: PreTrainedConfig, position: GgufPosition) -> Family:
    """How to write this model so that llama.cpp rotates with ``position``.

    A Qwen2 is a Llama with biases on q, k and v, which llama.cpp's llama reads: under factors it is written as one. So
    is a SmolLM3 all of whose layers rotate, and a Ministral 3 that scales no query.

    Raises:
        UserError: for a model type that is not written, or one whose graph cannot take the method.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model_type={config.model_type} is not written as GGUF; known are {', '.join(FAMILIES)}: export to=hf"
        )
    if config.model_type == "qwen2" and position.factors is not None:
        family = _LLAMA
    if config.model_type == CARRIER:
        family = _LLAMA if all(config.no_rope_layers[: config.num_hidden_layers]) else family
    if config.model_type == log_temperature.CARRIER and position.temperature is None:
        family = _LLAMA
    if position.factors is not None and not family.reads_factors:
        raise UserError(
            f"llama.cpp's {family.arch} reads no {FACTORS}, so a GGUF of {config.model_type} cannot carry this "
            "method; export to=hf, for transformers, vLLM or SGLang"
        )
    if family.arch == "smollm3":
        _check_smollm3(config)
    if family.arch in _ALTERNATING:
        _check_gemma(config, family.arch)
    window = sliding_window(config)
    if family.arch in ("llama", "qwen2", "qwen3", "olmo2", "smollm3", "mistral3") and window:
        raise UserError(
            f"sliding_window={window}: llama.cpp's {family.arch} attends to everything, so its answers past "
            f"{window} tokens would be another model's; export to=hf"
        )
    return family


def _check_smollm3(config: PreTrainedConfig) -> None:
    """Check what llama.cpp takes for granted of SmolLM3: every fourth layer without rotation, no bias."""
    rotates = [bool(flag) for flag in config.no_rope_layers[: config.num_hidden_layers]]
    if not is_fourth(rotates):
        raise UserError(
            f"layers without rotation: {describe_layers(rotates)}; llama.cpp's smollm3 leaves out every fourth (3, 7, "
            "...) and has no key for others: export to=hf, for transformers and vLLM"
        )
    if config.attention_bias or config.mlp_bias:
        raise UserError("attention_bias or mlp_bias: llama.cpp's smollm3 has no biases; export to=hf")


_ALTERNATING = {"gemma2": 2, "gemma3": 6}  # the period of the layers that attend to everything, in llama.cpp


def _check_gemma(config: PreTrainedConfig, arch: str) -> None:
    """Check what llama.cpp takes for granted of Gemma 2 and 3."""
    every = _ALTERNATING[arch]
    layers = [("full" if (i + 1) % every == 0 else "sliding") + "_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != layers:
        raise UserError(
            f"layer_types: llama.cpp's {arch} has full attention in every layer {every} alone; export to=hf"
        )
    if config.query_pre_attn_scalar != config.head_dim:
        raise UserError(
            f"query_pre_attn_scalar={config.query_pre_attn_scalar}: llama.cpp's {arch} scales queries by head_dim="
            f"{config.head_dim}; export to=hf"
        )


def add_architecture(writer: gguf.GGUFWriter, config: PreTrainedConfig, family: Family) -> None:
    """The numbers that llama.cpp builds the graph from."""
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    if family.arch == "olmo":
        writer.add_layer_norm_eps(1e-5)
        if config.clip_qkv is not None:
            writer.add_clamp_kqv(config.clip_qkv)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family.arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if family.arch == "gemma3":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if family.arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def add_position(writer: gguf.GGUFWriter, position: GgufPosition) -> None:
    """Base, scaling, attention factor and temperature; the factors are a tensor, written with the others."""
    writer.add_rope_dimension_count(position.dimensions)
    writer.add_rope_freq_base(position.freq_base)
    kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    add: dict[str, Callable[[Any], None]] = {
        "type": lambda kind: writer.add_rope_scaling_type(kinds[kind]),
        "factor": writer.add_rope_scaling_factor,
        "original_context_length": writer.add_rope_scaling_orig_ctx_len,
        "yarn_beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "yarn_beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for key, value in position.scaling.items():
        add[key](value)
    if position.attn_factor is not None:
        writer.add_rope_scaling_attn_factors(position.attn_factor)
    if position.temperature is not None:
        writer.add_attn_temperature_scale(position.temperature.beta)


class Layout:
    """Names and layout of a model's weights in llama.cpp."""

    def __init__(self, config: PreTrainedConfig, family: Family) -> None:
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        self.names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self.config, self.family = config, family

    def name(self, weight: str) -> str:
        """llama.cpp's name of a weight.

        Raises:
            UserError: for a weight that its architecture does not have.
        """
        name = self.names.get_name(weight, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"weight {weight} has no place in llama.cpp's {self.family.arch}; the model is not the "
                f"{self.config.model_type} that its config names: export to=hf"
            )
        return str(name)

    def arranged(self, weight: str, tensor: Tensor) -> Tensor:
        """A weight as llama.cpp lays it out, in the same dtype."""
        config = self.config
        if self.family.interleaved and ".self_attn.q_proj." in weight:
            return interleave(tensor, config.num_attention_heads)
        if self.family.interleaved and ".self_attn.k_proj." in weight:
            return interleave(tensor, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        if self.family.norm_shift and weight.endswith("norm.weight"):
            return tensor + self.family.norm_shift
        return tensor


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k from transformers' order (pair i is channels i and i + d/2) to llama.cpp's (2i and 2i + 1).

    Args:
        tensor: (heads * head_dim, ...), weight or bias.
        heads: of q or of k.
    """
    half = tensor.shape[0] // heads // 2
    return tensor.view(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def is_matrix(tensor_shape: torch.Size) -> bool:
    """True if a weight is stored in the file's own type; vectors stay float32."""
    return len(tensor_shape) >= 2
