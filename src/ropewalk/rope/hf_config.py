"""Other people's config.json: position settings as a chain and the facts it refers to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError
from ropewalk.rope.hf_scaling import KINDS, ORIGINAL, STRETCHED, WITH_ALPHA, Scaling, scaling_steps
from ropewalk.rope.values import flag, mapping, number, strings, whole, wrong

# transformers' defaults for a config without a base or a share of rotating channels: the classes whose base is then
# 10,000, and those of them that do not rotate whole heads.
DEFAULT_THETA = 1e4
DEFAULT_SHARES = {
    **dict.fromkeys(("gpt_neox", "qwen3_next", "stablelm"), 0.25),
    **dict.fromkeys(("bamba", "glm", "glm4", "glm4_moe", "nemotron", "persimmon", "phi", "recurrent_gemma"), 0.5),
}
ROTARY_BY_DEFAULT = (
    *DEFAULT_SHARES, "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2", "gpt_neox_japanese",
    "granite", "hunyuan_v1_dense", "hunyuan_v1_moe", "internlm3", "llama", "mistral", "olmo", "olmo2", "olmoe", "phi3",
    "phi4_multimodal", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2",
)  # fmt: skip

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WIDEST = 65536  # channels of a head
_HUNYUAN = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hunyuan_vl_text")

# Keys with which CoPE's published code selects the clip; no stock engine reads them.
REFERENCE_KEYS = ("use_cope", "cope_clip_n")


def read_config_json(model: str | Path, key: str = "model", revision: str | None = None) -> dict[str, Any]:
    """The config.json of a Hugging Face directory or hub id, or the file itself.

    Args:
        model: directory, file or hub id.
        key: of the configuration that names it, for errors.
        revision: of a hub id.

    Raises:
        UserError: where there is none, or it is not JSON.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"{key}={model} is a LoRA adapter without its base; merge it (peft's merge_and_unload), save the whole "
                "model and name that"
            )
        if not _HUB_ID.fullmatch(str(model)):
            raise UserError(f"{key}={model} holds no config.json; name a Hugging Face directory, its file, or a hub id")
        return _read_hub(str(model), key, revision)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise UserError(f"{key}={file} is not JSON ({error}); it must be a model's config.json") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}={file} is not a JSON object; it must be a model's config.json")
    return content


def _read_hub(name: str, key: str, revision: str | None) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(name, revision=revision)[0])
    except OSError as error:
        raise unreachable(key, name, error) from error


def in_one_line(error: BaseException) -> str:
    """A library's message as one line, cut where it is long; the name of its class where it has none."""
    text = " ".join(str(error).split())
    return f"{text[:300]}..." if len(text) > 300 else text or type(error).__name__


def unreachable(key: str, name: str, error: OSError) -> UserError:
    """The error for a model that transformers finds neither here nor on the hub, named under the config's ``key``."""
    return UserError(
        f"{key}={name} is neither a Hugging Face directory nor a hub model that can be reached; check the name, or "
        f"log in for a gated one ({str(error).splitlines()[0]})"
    )


@dataclass(frozen=True)
class HfPosition:
    """The position settings of a config.json without our metadata.

    Attributes:
        entry: its rope_parameters, or rope_scaling in the older form; keys as they stand there.
        theta: RoPE base.
        head_dim: channels of a head that rotate; of DeepSeek's latent attention, qk_rope_head_dim.
        pretrained_length: tokens before any scaling, where the entry names them, else the trained length.
        trained_length: max_position_embeddings, tokens.
        chain: the scaling as steps of a chain.
    """

    entry: dict[str, Any]
    theta: float
    head_dim: int
    pretrained_length: int
    trained_length: int
    chain: list[dict[str, Any]]


def read_hf_position(config: Mapping[str, Any]) -> HfPosition:
    """Read a config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters), as transformers does.

    Where layers differ (Gemma 3), the entry of the full-attention layers is read. The chain holds the rotary module
    alone: DeepSeek's factor on the softmax under YaRN is not in it.

    Raises:
        UserError: for a model without RoPE, a scaling that no chain expresses, or a value of the wrong kind.
    """
    config = mapping(config, "text_config") or config
    _refuse_other_encodings(config)
    entry = mapping(config, "rope_scaling") or mapping(config, "rope_parameters")
    layers = rotating_layers(entry, strings(config, "layer_types"))
    if layers:
        entry = dict(entry[layers[0]])
    kind = _kind(config, entry)
    trained_length = whole(config, "max_position_embeddings")
    if trained_length is None:
        raise UserError("config.json has no max_position_embeddings; write the length the model was trained at there")
    original = trained_length
    if kind in STRETCHED:
        # in transformers the top-level key (Phi-3's) wins, where all layers share one entry
        top_level = whole(config, ORIGINAL) if not layers else None
        original = top_level or whole(entry, ORIGINAL) or trained_length
    share = _share(config, entry, kind)
    return HfPosition(
        entry=entry,
        theta=_theta(config, entry),
        head_dim=_rotating_channels(config, 1.0 if kind == "proportional" else share),
        pretrained_length=original,
        trained_length=trained_length,
        chain=scaling_steps(Scaling(kind, entry, original, trained_length, share, bool(layers))),
    )


def _refuse_other_encodings(config: Mapping[str, Any]) -> None:
    encoding, model_type = config.get("position_embedding_type"), config.get("model_type")
    if encoding is not None and encoding not in ("rope", "rotary"):
        raise wrong("position_embedding_type", encoding, "rope or rotary: this model has no RoPE that could be read")
    if flag(config, "alibi"):
        raise wrong("alibi", True, "false: a model with ALiBi has no RoPE that could be read")
    if isinstance(model_type, str) and model_type.startswith("gemma4"):
        raise wrong("model_type", model_type, "one whose rotating layers share a head_dim; Gemma 4's do not: not read")


def _kind(config: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    kind = entry.get("rope_type") or entry.get("type") or "default"
    if not isinstance(kind, str):
        raise wrong("rope_type", kind, f"one of {', '.join(KINDS)}")
    if config.get("model_type") in ("phi3", "phi4_multimodal") and kind in ("su", "yarn"):
        return "longrope"  # their earlier names for it
    if kind == "dynamic" and entry.get("alpha"):
        if config.get("model_type") not in _HUNYUAN:
            raise wrong("alpha", entry["alpha"], f"absent: transformers reads it for {', '.join(_HUNYUAN)} alone")
        return WITH_ALPHA
    if "llama_4_scaling_beta" in entry:
        raise wrong(
            "llama_4_scaling_beta", entry["llama_4_scaling_beta"], "absent: no chain has a temperature by position"
        )
    return kind


def _theta(config: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    candidates = (entry, "rope_theta"), (config, "rope_theta"), (config, "rotary_emb_base")
    for values, key in candidates:
        theta = number(values, key, "a number above 1; it is RoPE's base, 10000 in RoFormer", lambda value: value > 1)
        if theta is not None:
            return theta
    model_type = config.get("model_type")
    if model_type is not None and model_type not in ROTARY_BY_DEFAULT:
        raise UserError(
            f"config.json names no rope_theta, and model_type={model_type!r} is not known to rotate at base 10000 "
            "without; where it has RoPE, write rope_theta there"
        )
    return DEFAULT_THETA


def _share(config: Mapping[str, Any], entry: Mapping[str, Any], kind: str) -> float:
    """The share of a head's channels that rotates; under ``proportional`` that of its pairs, which may be none."""
    candidates = (entry, "partial_rotary_factor"), (config, "partial_rotary_factor"), (config, "rotary_pct")
    least = 0.0 if kind == "proportional" else 1e-9
    for values, key in candidates:
        share = number(values, key, "above 0, at most 1; 1 rotates whole heads", lambda value: least <= value <= 1)
        if share is not None:
            return share
    return DEFAULT_SHARES.get(str(config.get("model_type")), 1.0)


def _rotating_channels(config: Mapping[str, Any], share: float) -> int:
    rotary_dim = whole(config, "rotary_dim", "channels", _WIDEST)  # MiniMax's and GPT-J's own key, of whole channels
    if rotary_dim is not None:
        share = 1.0
    head_dim = rotary_dim or whole(config, "qk_rope_head_dim", "channels", _WIDEST)
    head_dim = head_dim or whole(config, "head_dim", "channels", _WIDEST)
    if head_dim is None:
        heads, width = whole(config, "num_attention_heads", "heads"), whole(config, "hidden_size", "channels")
        if heads is None or width is None:
            raise UserError(
                "config.json names neither head_dim nor num_attention_heads and hidden_size; it is not a rotary "
                "transformer's, or lacks one of them: write head_dim there"
            )
        head_dim = width // heads
    rotating = int(head_dim * share)
    if rotating % 2 or not 2 <= rotating <= _WIDEST:
        raise UserError(
            f"config.json: {rotating} channels of a head rotate (head_dim={head_dim}, share {share:g}); channels "
            f"rotate in pairs, so it must be an even number from 2 to {_WIDEST}: fix head_dim or partial_rotary_factor"
        )
    return rotating


def rotating_layers(entry: Mapping[str, Any], layer_types: Sequence[str] | None) -> list[str]:
    """The layer types with a rope_parameters entry of their own, the one that a chain is about first.

    That is full_attention, or the only one. Empty where all layers share one entry.

    Args:
        entry: rope_parameters.
        layer_types: of each layer, as in the config; None: every type in the entry.

    Raises:
        UserError: where several types rotate differently and none is full_attention.
    """
    entries = {kind: values for kind, values in entry.items() if isinstance(values, Mapping)}
    kinds = sorted(kind for kind in entries if not layer_types or kind in layer_types)
    if "full_attention" in kinds:
        return ["full_attention", *(kind for kind in kinds if kind != "full_attention")]
    if any(entries[kind] != entries[kinds[0]] for kind in kinds):
        raise UserError(
            f"rope_parameters has entries for {', '.join(kinds)} that differ, and none for full_attention, whose the "
            "chain would be; name the layers to read full_attention"
        )
    return kinds
