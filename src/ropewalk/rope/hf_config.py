"""Other people's config.json: position settings as a chain and the facts it refers to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ropewalk.errors import UserError, in_one_line
from ropewalk.rope.hf_scaling import KINDS, ORIGINAL, STRETCHED, WITH_ALPHA, Scaling, scaling_steps
from ropewalk.rope.log_temperature import BETA, read_stock_temperature
from ropewalk.rope.log_temperature import CARRIER as SCALES_QUERIES
from ropewalk.rope.nope_layers import CARRIER, read_stock_layers
from ropewalk.rope.pair_axes import READ_BANDS, read_stock_axes
from ropewalk.rope.values import flag, mapping, number, strings, whole, wrong

DEFAULT_THETA = 1e4  # of a config that names neither its base nor its model type
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_UNREAD = ("gemma4", "deepseek_v4", "dots3", "minimax_m3")
_WIDEST = 65536  # channels of a head
_DTYPES = ("bfloat16", "float32", "float16", "float64")
SHARE = "partial_rotary_factor"
# Classes of transformers 5.23.0 that read SHARE under rope_type default; the others rotate whole heads.
_WITH_SHARE = (
    "bamba fuyu glm glm4 glm4_moe glm4_moe_lite gpt_neox gpt_neox_japanese laguna mellum mimo_v2_flash minimax_m2 "
    "nemotron persimmon phi phi3 phi4_multimodal qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
    "qwen4_exp qwen4_exp_text recurrent_gemma solar_open stablelm zaya"
)
READ_SHARE = frozenset(_WITH_SHARE.split())
_HUNYUAN = ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl", "hunyuan_vl_text")

# Keys with which CoPE's published code selects the clip; no stock engine reads them.
REFERENCE_KEYS = ("use_cope", "cope_clip_n")


@contextmanager
def naming(model: str | Path, key: str = "model") -> Iterator[None]:
    """Put the model before an error about its config.json: a command may read several."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}={model}: {error}") from error


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
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{key}={file} is not JSON ({error}); it must be a model's config.json") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}={file} is not a JSON object; it must be a model's config.json")
    with naming(model, key):
        if not isinstance(content.get("model_type"), (str, type(None))):
            raise wrong("model_type", content["model_type"], "one name; write the model's own")
        for name in ("dtype", "torch_dtype"):
            if not isinstance(value := content.get(name), (dict, type(None))) and value not in _DTYPES:
                raise wrong(name, value, f"one of {', '.join(_DTYPES)}, or null; write that of its weights")
    return content


def _read_hub(name: str, key: str, revision: str | None) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(name, revision=revision)[0])
    except OSError as error:
        raise unreachable(key, name, error) from error


def modern(content: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which Phi-3's first name for longrope, ``su``, is the one that transformers still knows."""
    copied = deepcopy(dict(content))
    entry = copied.get("rope_scaling")
    if isinstance(entry, dict) and entry.get("type") == "su":
        entry["type"] = "longrope"
    return copied


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
        other_layers: the same of the layer types with an entry of their own that is not read here (those with a
            window in Gemma 3 and OLMo 3), by type; empty: all layers share one.
    """

    entry: dict[str, Any]
    theta: float
    head_dim: int
    pretrained_length: int
    trained_length: int
    chain: list[dict[str, Any]]
    other_layers: dict[str, HfPosition] = field(default_factory=dict)


def read_hf_position(config: Mapping[str, Any], stock: Any = None) -> HfPosition:
    """Read a config.json of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters), as transformers does.

    Where layers differ (Gemma 3, OLMo 3), the entry of the full-attention layers is read, and the others' beside it.
    The chain holds the rotary module alone: DeepSeek's factor on the softmax under YaRN is not in it. A key that is
    left out has the default of transformers' class for the model type, which is imported for that.

    Args:
        config: content of config.json.
        stock: the same as transformers' PreTrainedConfig, where it is at hand.

    Raises:
        UserError: for a model without RoPE, a scaling that no chain expresses, or a value of the wrong kind.
    """
    nested = mapping(config, "text_config")
    defaults = _ClassDefaults(config, nested, stock)
    outer_type, config = config.get("model_type"), nested or config
    _refuse_other_encodings(config)
    entry = mapping(config, "rope_scaling") or mapping(config, "rope_parameters")
    layer_types = strings(config, "layer_types") or (None if entry else defaults["layer_types"])
    entry = entries = entry or defaults.entry()
    layers = rotating_layers(entry, layer_types)
    if layers:
        entry = dict(entry[layers[0]])
    kind = _kind(config, entry)
    trained_length = whole(config, "max_position_embeddings") or defaults["max_position_embeddings"]
    if trained_length is None:
        defaults.check()
        raise UserError("config.json has no max_position_embeddings; write the length the model was trained at there")
    longest = whole(config, "max_sequence_length")
    if kind == "linear" and longest is not None and longest > trained_length:
        # Vicuna-16k's and LongChat's convention: max_position_embeddings is the length before scaling
        entry = {ORIGINAL: trained_length, **entry}
        trained_length = longest
    original = trained_length
    if kind in STRETCHED:
        # in transformers the top-level key (Phi-3's) wins, where all layers share one entry
        top_level = whole(config, ORIGINAL) if not layers else None
        original = top_level or whole(entry, ORIGINAL) or defaults[ORIGINAL] or trained_length
    share = _share(config, entry, kind, defaults)
    head_dim = _rotating_channels(config, 1.0 if kind == "proportional" else share, defaults)
    axes = read_stock_axes(config.get("model_type") or outer_type, entry, head_dim // 2)
    nope = None
    if config.get("model_type") == CARRIER:
        flags, count = config.get("no_rope_layers"), whole(config, "num_hidden_layers", "layers")
        nope = read_stock_layers(
            defaults["no_rope_layers"] if flags is None else flags, count or defaults["num_hidden_layers"]
        )
    temperature = None
    if config.get("model_type") == SCALES_QUERIES:
        temperature = read_stock_temperature(entry, trained_length if kind in STRETCHED else None)
    structure = [part.step for part in (axes, nope, temperature) if part is not None]
    scaling = Scaling(kind, entry, original, trained_length, share, bool(layers))
    position = HfPosition(
        entry=entry,
        theta=_theta(config, entry, defaults),
        head_dim=head_dim,
        pretrained_length=original,
        trained_length=trained_length,
        chain=[*structure, *scaling_steps(scaling)],
        other_layers=_other_layers(config, entries, layer_types, defaults),
    )
    defaults.check()
    return position


def _other_layers(
    config: Mapping[str, Any], entries: Mapping[str, Any], layer_types: Sequence[str] | None, defaults: _ClassDefaults
) -> dict[str, HfPosition]:
    """The layer types that the chain is not about, each read as if all layers were of it.

    transformers' class fills their entries from keys of the older form, such as rope_local_base_freq.
    """
    filled = defaults.entry() or entries
    kinds = rotating_layers(filled, layer_types or defaults["layer_types"])[1:]
    rest = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    alike = {kind: [kind] * len(layer_types or defaults["layer_types"] or [kind]) for kind in kinds}
    return {
        kind: read_hf_position({**rest, "rope_parameters": {kind: filled[kind]}, "layer_types": alike[kind]})
        for kind in kinds
    }


@dataclass(frozen=True)
class _ClassDefaults:
    """The values that transformers' own class gives to the keys that a config.json leaves out; None for others."""

    content: Mapping[str, Any]
    nested: Mapping[str, Any]
    stock: Any

    def __getitem__(self, key: str) -> Any:
        return getattr(self._config, key, None)  # which knows a class's other names for it

    def entry(self) -> dict[str, Any]:
        """Its rope_parameters; empty where it has none."""
        return dict(self["rope_parameters"] or {})

    def of_entry(self, key: str) -> Any:
        """A value of the entry that a chain is about; None where it has none."""
        entry = self.entry()
        layers = rotating_layers(entry, self["layer_types"])
        return (entry[layers[0]] if layers else entry).get(key)

    def check(self) -> None:
        """Raise UserError where transformers' class refuses the config; the errors of this module come before it."""
        if isinstance(self._config, Exception):
            raise UserError(f"config.json: transformers refuses it: {in_one_line(self._config)}") from self._config

    @cached_property
    def _config(self) -> Any:
        if self.stock is not None:
            return _text_config(self.stock)
        if not any(isinstance(values.get("model_type"), str) for values in (self.content, self.nested)):
            return None
        from transformers import CONFIG_MAPPING  # late: most of this package needs numpy alone
        from transformers.utils import logging

        for values in (self.content, self.nested):
            if values.get("model_type") in CONFIG_MAPPING:
                level = logging.get_verbosity()
                logging.set_verbosity_error()  # it warns again where the model is loaded
                try:
                    return _text_config(CONFIG_MAPPING[values["model_type"]].from_dict(modern(values)))
                except Exception as error:  # whatever its classes make of a user's file
                    return error
                finally:
                    logging.set_verbosity(level)
        return None


def _text_config(config: Any) -> Any:
    """The config of the language model in one of several modalities; any other as it is."""
    return config.get_text_config() if hasattr(config, "text_config") else config


def _refuse_other_encodings(config: Mapping[str, Any]) -> None:
    encoding, model_type = config.get("position_embedding_type"), config.get("model_type")
    if encoding is not None and encoding not in ("rope", "rotary"):
        raise wrong("position_embedding_type", encoding, "rope or rotary: this model has no RoPE that could be read")
    if flag(config, "alibi"):
        raise wrong("alibi", True, "false: a model with ALiBi has no RoPE that could be read")
    if isinstance(model_type, str) and model_type.startswith(_UNREAD):
        raise wrong("model_type", model_type, "one whose rotating layers share a head_dim and a module: it is not read")


def _kind(config: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    kind = entry.get("rope_type") or entry.get("type") or "default"
    if not isinstance(kind, str):
        raise wrong("rope_type", kind, f"one of {', '.join(KINDS)}")
    if config.get("model_type") in ("phi3", "phi4_multimodal") and kind in ("su", "yarn"):
        return "longrope"  # their earlier names for it
    if kind == "mrope" and str(config.get("model_type")).removesuffix("_text") in READ_BANDS:
        return "default"  # Qwen2-VL's name for sections over plain RoPE
    if kind == "dynamic" and entry.get("alpha"):
        if config.get("model_type") not in _HUNYUAN:
            raise wrong("alpha", entry["alpha"], f"absent: transformers reads it for {', '.join(_HUNYUAN)} alone")
        return WITH_ALPHA
    if BETA in entry and config.get("model_type") != SCALES_QUERIES:
        raise wrong(BETA, entry[BETA], f"absent: a chain has a temperature by position for {SCALES_QUERIES} alone")
    return kind


def _theta(config: Mapping[str, Any], entry: Mapping[str, Any], defaults: _ClassDefaults) -> float:
    candidates = (entry, "rope_theta"), (config, "rope_theta"), (config, "rotary_emb_base")
    for values, key in candidates:
        theta = number(values, key, "a number above 1; it is RoPE's base, 10000 in RoFormer", lambda value: value > 1)
        if theta is not None:
            return theta
    if config.get("model_type") is None:
        return DEFAULT_THETA
    theta = defaults.of_entry("rope_theta")
    defaults.check()
    if theta is None:
        raise UserError(
            f"config.json names no rope_theta, and model_type={config['model_type']!r} is not known to rotate without; "
            "where it has RoPE, write rope_theta there"
        )
    return float(theta)


def _share(config: Mapping[str, Any], entry: Mapping[str, Any], kind: str, defaults: _ClassDefaults) -> float:
    """The share of a head's channels that rotates; under ``proportional`` that of its pairs, which may be none.

    A class of transformers decides which of the keys it takes into its entry; most do not read that under ``default``.
    """
    candidates = (entry, SHARE), (config, SHARE), (config, "rotary_pct")
    least = 0.0 if kind == "proportional" else 1e-9
    shares = [
        number(values, key, "above 0, at most 1; 1 rotates whole heads", lambda value: least <= value <= 1)
        for values, key in candidates
    ]
    model_type = defaults["model_type"]
    if model_type is None:
        return next((share for share in shares if share is not None), 1.0)
    own = defaults.of_entry(SHARE)
    if own is None and kind != "default":  # whose functions put a top-level one into each layer type's entry
        own = defaults[SHARE]
    if own is None and model_type == "mimo_v2_flash":  # a number in its modeling code alone
        raise UserError("config.json names no partial_rotary_factor, which mimo_v2_flash needs; write it there: 0.334")
    if own is None or kind == "proportional" or model_type in READ_SHARE:
        return 1.0 if own is None else float(own)
    if kind != "default" and own != 1:
        rule = f"absent: transformers' {model_type} rotates whole heads, and fails with a share's {kind} frequencies"
        raise wrong(SHARE, own, rule)
    return 1.0


def _rotating_channels(config: Mapping[str, Any], share: float, defaults: _ClassDefaults) -> int:
    rotary_dim = whole(config, "rotary_dim", "channels", _WIDEST)  # MiniMax's and GPT-J's own key, of whole channels
    if rotary_dim is not None:
        share = 1.0
    head_dim = rotary_dim or whole(config, "qk_rope_head_dim", "channels", _WIDEST) or defaults["qk_rope_head_dim"]
    head_dim = head_dim or whole(config, "head_dim", "channels", _WIDEST) or defaults["head_dim"]
    if head_dim is None:
        heads = whole(config, "num_attention_heads", "heads") or defaults["num_attention_heads"]
        width = whole(config, "hidden_size", "channels") or defaults["hidden_size"]
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
