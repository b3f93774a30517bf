"""Other people's config.json as a chain: the numbers of transformers' own functions on the same file."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.rope import Position, RopeChain
from ropewalk.rope.position import position_of

FACTORS = [1.0 + i / 8 for i in range(48)]
LONG = [2.0 + i for i in range(48)]

# As published: the keys of each checkpoint's config.json that say anything of position.
LLAMA31 = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "head_dim": 128, "hidden_size": 4096, "num_attention_heads": 32,
    "max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": None,
}  # fmt: skip
QWEN_YARN = {
    "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}  # fmt: skip
PHI3 = {
    "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": LONG},
}  # fmt: skip
PHI4_MINI = {**PHI3, "hidden_size": 3072, "num_attention_heads": 24, "partial_rotary_factor": 0.75}
LINEAR = {**QWEN3, "rope_scaling": {"type": "linear", "factor": 4.0}}
DYNAMIC = {**QWEN3, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
PROPORTIONAL = {
    **QWEN3, "rope_parameters": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
}  # fmt: skip


@pytest.mark.parametrize(("content", "chain", "facts"), [
    (LLAMA31, "llama3()", (5e5, 128, 8192, 131072)),
    (QWEN3, "rope", (1e6, 128, 40960, 40960)),
    (QWEN_YARN, "yarn(factor=4, original_max_position_embeddings=32768)", (1e6, 128, 32768, 32768)),
    (PHI3, None, (1e4, 96, 4096, 131072)),
    (PHI4_MINI, None, (1e4, 96, 4096, 131072)),
    (LINEAR, "pi(factor=4, original_max_position_embeddings=10240)", (1e6, 128, 40960, 40960)),
    (DYNAMIC, "dynamic_ntk(factor=4, original_max_position_embeddings=40960)", (1e6, 128, 40960, 40960)),
    (PROPORTIONAL, "p_rope(fraction=0.25)", (1e6, 128, 40960, 40960)),
])  # fmt: skip
@pytest.mark.parametrize("length", [1000, 4096, 50000, 131072])
def test_published_forms_are_chains_with_transformers_numbers(tmp_path, content, chain, facts, length):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    position = Position.from_pretrained(tmp_path)
    assert position == Position.from_pretrained(file)
    assert RopeChain.from_pretrained(str(tmp_path)) == position.chain
    if chain is not None:
        assert str(position.chain) == chain
    assert (position.theta, position.head_dim, position.pretrained_length, position.trained_length) == facts
    config = AutoConfig.from_pretrained(tmp_path)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"), seq_len=length)
    s = position.spectrum(length=length)
    np.testing.assert_allclose(s.inv_freq, inv_freq.double().numpy(), rtol=1e-5 if kind == "yarn" else 2e-6)
    assert s.attention_scaling == pytest.approx(scaling, rel=1e-12)


def test_our_own_metadata_comes_first(tmp_path):
    ours = Position("cope20", RopeChain.parse("abf(theta=1e7) > cope(clip=20)"), 5e5, 128, 8192, 65536, "base")
    content = {**LLAMA31, "rope_parameters": ours.rope_parameters(65536), "ropewalk": ours.metadata()}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert Position.from_pretrained(tmp_path) == ours
    del content["ropewalk"]  # without it the stock entry still says how it rotates
    (tmp_path / "config.json").write_text(json.dumps({**content, "rope_scaling": None}))
    stripped = Position.from_pretrained(tmp_path)
    assert [step.method for step in stripped.chain.steps] == ["longrope"]
    exact = ours.spectrum().inv_freq
    found = stripped.spectrum().inv_freq
    np.testing.assert_allclose(found[:-1], exact[:-1], rtol=1e-12)
    assert exact[-1] == found[-1] == 0  # 1e38 is finite in float64; with base^(2i/d) it overflows float32


@pytest.mark.parametrize("stopped", [1e38, 1e39, 3.3e38])
def test_factors_that_overflow_float32_stop_the_pairs_that_they_stop_in_transformers(stopped):
    config = LlamaConfig(head_dim=128, hidden_size=512, num_attention_heads=4, max_position_embeddings=8192)
    factors = [stopped, 1.0] * 32
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
        "short_factor": factors, "long_factor": factors, "factor": 2.0,
    }  # fmt: skip
    stock = ROPE_INIT_FUNCTIONS["longrope"](config, device=torch.device("cpu"))[0].numpy()
    found = position_of(config).spectrum().inv_freq
    assert np.array_equal(found == 0, stock == 0)
    assert (found == 0).any()
    np.testing.assert_allclose(found[1::2], stock[1::2], rtol=2.4e-7)


def test_layers_that_differ_give_the_full_attention_entry():
    entry = {"rope_type": "default", "rope_theta": 1e6}
    content = {
        "head_dim": 256, "max_position_embeddings": 131072,
        "rope_parameters": {"sliding_attention": {**entry, "rope_theta": 1e4}, "full_attention": entry},
    }  # fmt: skip
    assert position_of(content).theta == 1e6
    assert position_of({"text_config": content}).head_dim == 256


@pytest.mark.parametrize(("content", "message"), [
    ({"max_position_embeddings": 5}, "names neither head_dim nor num_attention_heads"),
    ({**QWEN3, "rope_scaling": {"type": "mrope"}}, "rope_type='mrope' is not read as a chain; known: default"),
    ({**QWEN3, "rope_scaling": {"type": "yarn", "factor": None}}, "has no factor; write factor"),
    ({**QWEN3, "rope_scaling": {"type": "linear"}}, "'linear' has no factor"),
    ({"head_dim": 64}, "no max_position_embeddings"),
    ([], "is not a JSON object"),
])  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Position.from_pretrained(tmp_path)


def test_a_path_without_config_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no config"):
        Position.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no config"):
        Position.from_pretrained(tmp_path / "nothing" / "here")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Position.from_pretrained(tmp_path)
