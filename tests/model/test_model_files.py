"""Model files in configs/model: the sizes that were published, and position keys read like a config.json's."""

import pytest
from helpers import composed, save_tiny
from omegaconf import OmegaConf

from ropewalk.analysis.subjects import read_model
from ropewalk.config import CONFIG_DIR
from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import ModelConfig
from ropewalk.errors import UserError
from ropewalk.model.load import count_parameters, training_config
from ropewalk.rope.advisor import chain_warnings
from ropewalk.rope.position import declared_position, position_of

# Of the hub's safetensors, a tied head counted once.
PUBLISHED = {
    "llama3_8b": 8_030_261_248, "llama31_8b": 8_030_261_248, "llama32_1b": 1_235_814_400, "llama32_3b": 3_212_749_824,
    "qwen3_06b": 596_049_920, "qwen3_17b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen25_7b": 7_615_616_512,
    "qwen2_vl_7b": 8_291_375_616, "olmo3_7b": 7_298_011_136, "gemma3_1b": 999_885_952,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
TINY = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def scratch(architecture, theta=1e4, head_dim=16, length=256):
    return ModelConfig("m", None, None, architecture, theta, head_dim, length)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_model_has_its_published_size(name):
    file = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml"))
    length = file["pretrained_length"]
    architecture = {"head_dim": file["head_dim"], **file["architecture"]}
    model = scratch(architecture, file["theta"], file["head_dim"], length)
    config = training_config(model, RopeConfig("default"), length)
    assert count_parameters(config) == PUBLISHED[name]
    assert position_of(config).chain == read_model(name).chain


def test_a_declared_scaling_is_read_like_a_config_json_s():
    content = {**TINY, "rope_theta": 5e5, "head_dim": 64, "max_position_embeddings": 131072}
    scaling = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    declared, stock = read_model("llama32_1b"), position_of({**content, "rope_scaling": scaling})
    assert (declared.chain, declared.pretrained_length, declared.trained_length) == (stock.chain, 8192, 131072)
    assert declared.spectrum() == stock.spectrum()


def test_a_model_from_scratch_takes_its_declared_scaling():
    model = scratch({**TINY, "head_dim": 16, "rope_scaling": LLAMA3})
    position = position_of(training_config(model, RopeConfig("default"), 256))
    assert [step.method for step in position.chain.steps] == ["llama3"]
    clipped = training_config(model, RopeConfig("cope2", [{"method": "cope", "clip": 2}]), 256)
    assert "a clip under llama3 scaling" in "".join(chain_warnings([position_of(clipped)]))
    plain = training_config(scratch({**TINY, "head_dim": 16}), RopeConfig("default"), 256)
    assert not list(chain_warnings([position_of(plain)]))


@pytest.mark.parametrize(("architecture", "message"), [
    ({"rope_theta": 1e6}, "architecture.rope_theta=1e[+]06 and model.theta=10000; keep one"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_theta=1e[+]06 and model.theta=10000"),
    ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_type='ntk' is not read as a chain"),
])  # fmt: skip
def test_what_contradicts_in_a_model_file_is_named(architecture, message):
    with pytest.raises(UserError, match=message):
        declared_position(1e4, 16, 256, {**TINY, **architecture})


def test_a_declared_scaling_is_the_checkpoint_s(tmp_path):
    path = save_tiny(tmp_path, max_position_embeddings=256)
    model = ModelConfig("m", str(path), None, {"rope_scaling": LLAMA3}, 1e4, 16, 256)
    with pytest.raises(UserError, match=r"declares llama3\(.*but the checkpoint .* has rope; write its rope_scaling"):
        training_config(model, RopeConfig("default"), 256)
    model.architecture, model.pretrained_length = {}, 128
    with pytest.raises(UserError, match=r"set model\.pretrained_length=256, its max_position_embeddings"):
        training_config(model, RopeConfig("default"), 256)


def test_the_new_models_and_node_compose():
    config = composed("plan", "+experiment=cope20", "model=llama32_1b", "cluster=a100_40gb_8")
    assert (config.cluster.gpus_per_node, config.model.architecture["rope_scaling"]["factor"]) == (8, 32.0)
