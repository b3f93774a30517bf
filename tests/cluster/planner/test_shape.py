"""Parameters against transformers' own models, and sizes that are nowhere are an error with the fix."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers import composed, save_tiny
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForImageTextToText

from ropewalk.cluster.planner import ModelShape, shape_of
from ropewalk.config import CONFIG_DIR
from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import ModelConfig
from ropewalk.model.load import count_parameters, layer_windows, training_config
from ropewalk.training.meter import WorkCounter

WITH_VISION = ("qwen2_vl_7b", "scenes")
SHIPPED = sorted({path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")} - set(WITH_VISION))
ODD = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
       "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


@pytest.mark.parametrize("fields", [
    {"model_type": "llama", "tie_word_embeddings": True}, {"model_type": "llama", "attention_bias": True},
    {"model_type": "llama", "mlp_bias": True}, {"model_type": "mistral"}, {"model_type": "qwen2"},
    {"model_type": "qwen3"}, {"model_type": "qwen3", "attention_bias": True},
    {"model_type": "olmo"}, {"model_type": "olmo2"}, {"model_type": "olmo3", "attention_bias": True},
    {"model_type": "gemma3_text"}, {"model_type": "gemma3_text", "tie_word_embeddings": True},
])  # fmt: skip
def test_parameters_are_those_of_the_model(fields):
    architecture = {"tie_word_embeddings": False, **ODD, **fields}
    plain = dict(architecture)
    config = AutoConfig.for_model(plain.pop("model_type"), **plain)
    assert ModelShape.from_config(architecture, "odd").parameters == count_parameters(config)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_can_be_planned(name):
    model = composed("train", f"model={name}").model
    plain = {"head_dim": model.head_dim, **model.architecture}
    shape = shape_of(ModelConfig(**{**OmegaConf.to_container(OmegaConf.structured(model)), "path": None}))
    assert shape.parameters == count_parameters(AutoConfig.for_model(plain.pop("model_type"), **plain))
    assert shape.head_dim == model.head_dim


QWEN25 = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 2, "out_hidden_size": 48, "patch_size": 6,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", [*WITH_VISION, "qwen2_5_vl"])
def test_a_model_of_videos_counts_with_its_tower(name):
    """Parameters, the weights that a token of the language model passes, and its blocks' inputs, by torch's modules."""
    if name == "qwen2_5_vl":
        fields = {"model_type": name, "vision_config": QWEN25, "tie_word_embeddings": False, **ODD}
        del fields["head_dim"]  # this class takes hidden_size / num_attention_heads
    else:
        fields = OmegaConf.to_container(OmegaConf.create(composed("train", f"model={name}").model.architecture))
    shape, kind = ModelShape.from_config(fields, name), fields["model_type"]
    plain = {key: value for key, value in deepcopy(fields).items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **plain))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    tower, vision = model.model.visual, fields["vision_config"]
    patches = vision["spatial_merge_size"] ** 2
    work = {
        part: sum(
            layer.weight.numel() for layer in module.modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Conv3d))
        )
        for part, module in (("whole", tower), ("merger", tower.merger))
    }
    assert shape.tower.parameters == sum(weight.numel() for weight in tower.parameters())
    assert shape.tower.work == patches * (work["whole"] - work["merger"]) + work["merger"]
    assert shape.linear - shape.tower.work == replace(shape, tower=None).linear
    assert shape.tower.kept == patches * len(tower.blocks) * tower.patch_embed.embed_dim


@pytest.mark.parametrize("fields", [
    {"model_type": "llama"}, {"model_type": "mistral"}, {"model_type": "mistral", "sliding_window": None},
    {"model_type": "qwen2", "sliding_window": 32}, {"model_type": "olmo3"}, {"model_type": "gemma3_text"},
    {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 5},
    {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 4}, {"model_type": "ministral3"},
    {"model_type": "olmo3", "sliding_window": 64, "layer_types": ["full_attention", *["sliding_attention"] * 6]},
])  # fmt: skip
def test_windows_are_those_of_the_model(fields):
    """The planner reads a config.json without transformers."""
    architecture = {**ODD, "num_hidden_layers": 7, **fields}
    plain = dict(architecture)
    windows = layer_windows(AutoConfig.for_model(plain.pop("model_type"), **plain))
    assert +Counter(ModelShape.from_config(architecture, "odd").layers_by_window) == Counter(windows)


def test_llama3_8b_is_as_published():
    shape = shape_of(composed("train", "model=llama3_8b").model)
    assert shape.parameters == 8_030_261_248  # the model card's 8.03B
    assert shape.linear == 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # less the embedding and 65 norms


def test_a_directory_counts_before_what_is_declared(tmp_path):
    save_tiny(tmp_path)
    model = ModelConfig(name="x", path=str(tmp_path), architecture={"model_type": "llama", **ODD}, head_dim=16)
    assert shape_of(model).hidden == json.loads((tmp_path / "config.json").read_text())["hidden_size"] != 48


def test_a_model_of_unknown_size_is_an_error():
    with pytest.raises(ValueError, match=r"model\.path=org/name holds no config\.json here .* give its fields"):
        shape_of(ModelConfig(name="x", path="org/name", head_dim=16))
    with pytest.raises(ValueError, match=r"does not say intermediate_size; give it in model\.architecture"):
        ModelShape.from_config({"model_type": "llama", **ODD, "intermediate_size": None}, "x")
    with pytest.raises(ValueError, match="model_type='gpt2' cannot be planned; use llama"):
        ModelShape.from_config({"model_type": "gpt2"}, "x")


@pytest.mark.parametrize(("key", "value"), [
    ("num_attention_heads", 0), ("num_hidden_layers", -1), ("hidden_size", "48"), ("vocab_size", 96.5),
    ("num_key_value_heads", 0), ("head_dim", -16), ("intermediate_size", True),
])  # fmt: skip
def test_a_size_that_no_model_has_is_an_error(key, value):
    with pytest.raises(ValueError, match=f"^model=x has {key}={value}; it must be a positive integer$"):
        ModelShape.from_config({"model_type": "llama", **ODD, key: value}, "model=x")


def test_heads_that_do_not_share_keys_evenly_are_an_error():
    with pytest.raises(ValueError, match="num_key_value_heads=4, which must divide num_attention_heads=6"):
        ModelShape.from_config({"model_type": "llama", **ODD, "num_key_value_heads": 4}, "x")


def test_a_declared_size_that_the_checkpoint_contradicts_is_refused_at_load(tmp_path):
    """What the planner counted with must be what is trained."""
    save_tiny(tmp_path)
    model = ModelConfig(name="x", path=str(tmp_path), theta=1e4, head_dim=16, pretrained_length=64,
                        architecture={"hidden_size": 48})  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.architecture\.hidden_size=48, but the checkpoint .* has 32; set"):
        training_config(model, RopeConfig("default"), 64)


def test_work_counts_the_same_linear_weights(store_64):
    from ropewalk.data import Mixture

    for kind in ("llama", "qwen2", "qwen3", "olmo3", "gemma3_text"):
        counted = WorkCounter(AutoConfig.for_model(kind, **ODD), Mixture(0, {}, store_64, 1), 1, 1)
        shape = ModelShape.from_config({"model_type": kind, **ODD}, kind)
        assert (shape.linear, shape.attention_width) == (counted.linear, counted.attention_width)
