"""The shape of a model, from its config alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.config.train import SUPPORTED_MODEL_TYPES, VISION_MODEL_TYPES, ModelConfig
from ropewalk.errors import UserError
from ropewalk.rope.hf_config import read_config_json

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION = {  # fields of a vision_config, with transformers' defaults, that a tower's size follows from
    "qwen2_vl": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4},
    "qwen2_5_vl": {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420},
}
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
COUNTS = (*REQUIRED, "num_key_value_heads", "head_dim")
# Of classes that do not take hidden_size / num_attention_heads.
_HEAD_DIM = {"qwen3": 128, "ministral3": 128, "gemma3_text": 256}
_WINDOW = {"mistral": 4096, "olmo3": 4096, "gemma3_text": 4096}  # of classes that have one unless told otherwise
_EVERY = {"olmo3": 4, "gemma3_text": 6}  # the layer that attends to everything


@dataclass(frozen=True)
class TowerShape:
    """Sizes of the vision tower of Qwen2-VL or Qwen2.5-VL.

    Attributes:
        parameters: all of them.
        work: weights that one token of the language model passes, as several patches do each of its blocks.
        kept: channels that its blocks take in, over the patches of a token: what checkpointing keeps.
    """

    parameters: int
    work: int
    kept: int

    @classmethod
    def from_config(cls, kind: str, config: Mapping[str, Any], hidden: int) -> TowerShape:
        """From the fields of a vision_config; ``hidden``: channels of the language model."""
        fields = {**PATCHES, **VISION[kind], **config}
        is_first = kind == "qwen2_vl"  # LayerNorm and a plain MLP; Qwen2.5-VL has RMSNorm and a gated one
        width, depth = fields["embed_dim" if is_first else "hidden_size"], fields["depth"]
        inside = int(width * fields["mlp_ratio"]) if is_first else fields["intermediate_size"]
        maps = 2 if is_first else 3
        embedding = 3 * fields["temporal_patch_size"] * fields["patch_size"] ** 2 * width
        block = 4 * width**2 + maps * width * inside
        small = 4 * width + width + (maps - 1) * inside + (4 if is_first else 2) * width  # biases, and two norms
        patches = fields["spatial_merge_size"] ** 2
        merged = patches * width
        merger = merged**2 + merged * hidden
        beside = merged + hidden + (2 if is_first else 1) * width
        return cls(
            parameters=embedding + depth * (block + small) + merger + beside,
            work=patches * (embedding + depth * block) + merger,
            kept=patches * depth * width,
        )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of the Llama family; heads times ``head_dim`` need not be ``hidden``.

    Attributes:
        model_type: transformers' name.
        vocabulary: rows of the embedding and of the output head.
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels of a head.
        tied: whether the head is the embedding.
        biased: linear layers that have a bias, by name (q, k, v, o, mlp).
        window: keys that a query of the windowed layers sees.
        windowed: layers with that window.
        tower: of a model of images and videos; None: of text alone. Its attention, and what one of its blocks computes,
            are not counted, and every token of a row is taken to be an image's or a video's.
    """

    model_type: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    biased: frozenset[str] = frozenset()
    window: int | None = None
    windowed: int = 0
    tower: TowerShape | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """From the fields of a transformers config.json.

        Raises:
            UserError: where ``name``'s config lacks a field, has a size that is not a positive integer or query heads
                that its key/value heads do not divide, or is of another architecture.
        """
        kind = config.get("model_type")
        known = (*SUPPORTED_MODEL_TYPES, *VISION_MODEL_TYPES)
        if kind not in known:
            raise UserError(f"{name}: model_type={kind!r} cannot be planned; use {', '.join(known)}")
        config = {**config, **config.get("text_config", {}), "model_type": kind}
        missing = [key for key in REQUIRED if config.get(key) is None]
        if missing:
            raise UserError(f"{name} does not say {', '.join(missing)}; give it in model.architecture")
        for key in COUNTS:
            if (value := config.get(key)) is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} has {key}={value}; it must be a positive integer")
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(
                f"{name} has num_key_value_heads={kv_heads}, which must divide num_attention_heads={heads}; change one"
            )
        return cls(
            model_type=kind,
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.get("head_dim") or _HEAD_DIM.get(kind, config["hidden_size"] // heads),
            tied=bool(config.get("tie_word_embeddings", kind in ("smollm3", "gemma3_text"))),
            biased=_biased(kind, config),
            window=config.get("sliding_window", _WINDOW.get(kind)),
            windowed=_windowed(kind, config),
            tower=TowerShape.from_config(kind, config.get("vision_config", {}), config["hidden_size"])
            if kind in VISION_MODEL_TYPES
            else None,
        )

    @property
    def query(self) -> int:
        """Channels of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Channels of all key heads together; as many of the values."""
        return self.kv_heads * self.head_dim

    @property
    def head_normed(self) -> bool:
        """True if queries and keys pass a norm of their own."""
        return self.model_type in ("qwen3", "olmo2", "olmo3", "gemma3_text")

    @property
    def norms(self) -> int:
        """Norms of the residual stream's width in one layer."""
        return 4 if self.model_type == "gemma3_text" else 2

    @property
    def layers_by_window(self) -> dict[int | None, int]:
        """Number of layers by the window that they have."""
        return {None: self.layers - self.windowed, self.window: self.windowed} if self.windowed else {None: self.layers}

    @property
    def linear_per_layer(self) -> int:
        """Weights of one layer's linear maps, without biases."""
        return self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)

    @property
    def linear(self) -> int:
        """Weights of all linear maps that a token passes, the output head with them."""
        return self.layers * self.linear_per_layer + self.embedding + (self.tower.work if self.tower else 0)

    @property
    def embedding(self) -> int:
        """Weights of the embedding; as many of the output head."""
        return self.vocabulary * self.hidden

    @property
    def small_per_layer(self) -> int:
        """Norms and biases of one layer."""
        widths = {"q": self.query, "k": self.key, "v": self.key, "o": self.hidden}
        widths["mlp"] = 2 * self.intermediate + self.hidden
        biases = sum(widths[name] for name in self.biased)
        if self.model_type == "olmo":  # whose norms have no weights
            return biases
        whole = self.model_type in ("olmo2", "olmo3")  # queries and keys are normed across their heads
        heads = (self.query + self.key if whole else 2 * self.head_dim) if self.head_normed else 0
        return self.norms * self.hidden + heads + biases

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        per_layer = self.linear_per_layer + self.small_per_layer
        last_norm = 0 if self.model_type == "olmo" else self.hidden
        own = self.layers * per_layer + self.embedding * (1 if self.tied else 2) + last_norm
        return own + (self.tower.parameters if self.tower else 0)

    @property
    def attention_width(self) -> int:
        """Layers times query channels."""
        return self.layers * self.query


def shape_of(model: ModelConfig) -> ModelShape:
    """The shape of the model that a run starts from: its config.json where it is at hand, else model.architecture.

    Raises:
        UserError: where neither says it.
    """
    directory = Path(model.path) if model.path else None
    without = {"sliding_window": None} if "sliding_window" in model.drop else {}
    if directory is not None and (directory / "config.json").is_file():
        return ModelShape.from_config({**read_config_json(directory, "model.path"), **without}, str(directory))
    if not model.architecture:
        raise UserError(
            f"model.path={model.path} holds no config.json here and model.architecture is empty, so its size is "
            "not known; name a directory that is on this disk, or give its fields (++model.architecture={model_type: "
            "llama, hidden_size: ..., ...})"
        )
    fields = {"head_dim": model.head_dim, **model.architecture, **without}
    return ModelShape.from_config(fields, f"model={model.name}")


def _windowed(kind: str, config: Mapping[str, Any]) -> int:
    """Layers with a window, as transformers' classes read a config; of SmolLM3 those that it names alone."""
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    if not config.get("sliding_window", _WINDOW.get(kind)):
        return 0
    if kind in ("qwen2", "qwen3", "smollm3") and not config.get("use_sliding_window"):
        return 0
    if types:
        return int(list(types).count("sliding_attention"))
    if kind in _EVERY:
        return int(layers - layers // config.get("sliding_window_pattern", _EVERY[kind]))
    if kind in ("qwen2", "qwen3"):
        return int(max(0, layers - config.get("max_window_layers", 28)))
    return int(layers) if kind in ("mistral", "ministral3") else 0


def _biased(kind: str, config: Mapping[str, Any]) -> frozenset[str]:
    if kind in ("qwen2", *VISION_MODEL_TYPES):  # their configs have no switch
        return frozenset("qkv")
    names = set("qkvo") if config.get("attention_bias") else set()
    return frozenset(names | ({"mlp"} if config.get("mlp_bias") else set()))
