"""Other people's config.json as a chain: the numbers of transformers' own functions on the same file."""

import json
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ropewalk.config.train import SUPPORTED_MODEL_TYPES
from ropewalk.errors import UserError
from ropewalk.export.gguf.gguf_model import FAMILIES
from ropewalk.model.rotary import inspect_config, place_position
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.advisor import config_warnings
from ropewalk.rope.hf_config import READ_SHARE
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
QWEN3_SHAPE = {"head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6}
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


# One layer of models whose own classes lay the frequencies out; a chain, and the channels that rotate.
ONE = {"num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 0,
       "eos_token_id": 0, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
DEEPSEEK = {
    **ONE, "model_type": "deepseek_v3", "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "max_position_embeddings": 163840, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
}  # fmt: skip
HUNYUAN = {
    **ONE, "model_type": "hunyuan_v1_dense", "head_dim": 64, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic", "mscale": 1.0},
}  # fmt: skip
NULL_FACTOR = {
    **ONE, "model_type": "llama", "max_position_embeddings": 8192,
    "rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 2048, "beta_slow": 0},
}  # fmt: skip
IN_PHI3 = {
    **ONE, "model_type": "phi3", "max_position_embeddings": 8192, "original_max_position_embeddings": 2048,
    "rope_scaling": {"type": "yarn", "short_factor": FACTORS[:32], "long_factor": LONG[:32]},
}  # fmt: skip
SLIDING = {
    **ONE, "model_type": "olmo3", "max_position_embeddings": 8192, "layer_types": ["sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
UNTRUNCATED = {
    **ONE, "model_type": "olmo3", "max_position_embeddings": 8192, "layer_types": ["full_attention"],
    "rope_parameters": {"full_attention": {
        "rope_type": "yarn", "factor": 2.0, "rope_theta": 5e5, "original_max_position_embeddings": 4096,
        "truncate": False,
    }},
}  # fmt: skip


@pytest.mark.parametrize(("content", "chain", "channels"), [
    ({**ONE, "model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 25000, "max_position_embeddings": 2048},
     "rope", 32),
    ({**ONE, "model_type": "gpt_neox", "max_position_embeddings": 2048}, "rope", 16),
    ({**ONE, "model_type": "stablelm", "max_position_embeddings": 4096, "partial_rotary_factor": 0.5}, "rope", 32),
    ({**ONE, "model_type": "glm4", "max_position_embeddings": 4096, "head_dim": 64}, "rope", 32),
    ({**ONE, "model_type": "phi", "max_position_embeddings": 4096}, "rope", 32),
    ({**ONE, "model_type": "minimax_m2", "rotary_dim": 32, "rope_theta": 5e6, "max_position_embeddings": 4096},
     "rope", 32),
    (DEEPSEEK, "yarn(factor=40, original_max_position_embeddings=4096, mscale=1, mscale_all_dim=0.5)", 64),
    (HUNYUAN, "ntk(factor=1000, original_max_position_embeddings=None)", 64),
    (NULL_FACTOR, "yarn(factor=4, original_max_position_embeddings=2048)", 64),
    (IN_PHI3, None, 64), (SLIDING, "pi(factor=2, original_max_position_embeddings=4096)", 64),
    (UNTRUNCATED, "yarn(factor=2, original_max_position_embeddings=4096)", 64),
    ({**ONE, "model_type": "llama", "max_position_embeddings": 4096, "original_max_position_embeddings": 1024,
      "rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}},
     "dynamic_ntk(factor=4, original_max_position_embeddings=4096)", 64),
    ({**ONE, "model_type": "llama", "max_position_embeddings": 4096, "rope_theta": 500000.0,
      "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 1024}},
     "llama3(factor=32, original_max_position_embeddings=1024)", 64),
])  # fmt: skip
@pytest.mark.parametrize("length", [1000, 10000])
def test_the_keys_of_each_architecture_give_its_own_classs_numbers(tmp_path, content, chain, channels, length):
    (tmp_path / "config.json").write_text(json.dumps(content))
    position = Position.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert position_of(config) == position
    assert position.head_dim == channels
    if chain is not None:
        assert str(position.chain) == chain
    (stock,) = (rotation for rotation in inspect_config(config, length) if rotation.inv_freq.numel())
    s = position.spectrum(length=length)
    np.testing.assert_allclose(s.inv_freq, stock.inv_freq.double().numpy(), rtol=5e-6)
    assert s.attention_scaling == pytest.approx(stock.attention_scaling, rel=1e-12)


LEFT_OUT = ("head_dim", "partial_rotary_factor", "rope_theta", "rope_parameters", "max_position_embeddings")
ANSWERED = 109  # causal model types of transformers 5.23.0 that are read with every one of these keys left out


def without(content, key):
    """A config.json without one key, at every level."""
    if not isinstance(content, dict):
        return content
    return {name: without(value, key) for name, value in content.items() if name != key}


def stock_rotation(content):
    """The frequencies of the rotary class that transformers has for a config.json; of the layers that come first."""
    config = CONFIG_MAPPING[content["model_type"]].from_dict(deepcopy(content))
    text = config.get_text_config()
    modules = [sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(each)].__module__] for each in (config, text)
               if type(each) in MODEL_FOR_CAUSAL_LM_MAPPING]  # fmt: skip
    rotary = next(value for module in modules for name, value in vars(module).items()
                  if name.endswith("RotaryEmbedding") and "Vision" not in name)  # fmt: skip
    buffers = dict(rotary(text).named_buffers())
    names = [name for name in buffers if name.endswith("inv_freq") and "original" not in name]
    return buffers["full_attention_inv_freq" if "full_attention_inv_freq" in names else names[0]].double().numpy()


def test_keys_that_are_left_out_have_their_class_s_own_value():
    """Every causal model type of transformers, each key left out and all of them: its rotary class, or an error."""
    answered = set()
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            whole = CONFIG_MAPPING[model_type]().to_dict()
        except StrictDataclassError:
            continue  # a class that cannot be made without arguments
        answered.add(model_type)
        for keys in ((), *((key,) for key in LEFT_OUT), LEFT_OUT):
            content = whole
            for key in keys:
                content = without(content, key)
            try:
                position = position_of(content)
            except UserError:
                answered.discard(model_type)
                continue
            stock = stock_rotation(content)
            near = [np.allclose(s.inv_freq, stock, rtol=1e-4, atol=0.0) for s in
                    (position.spectrum(), position.spectrum(1)) if s.inv_freq.shape == stock.shape]  # fmt: skip
            assert any(near), (model_type, keys)
    print(f"{len(answered)} causal model types are read: {', '.join(sorted(answered))}")
    assert len(answered) >= ANSWERED
    assert answered >= {*SUPPORTED_MODEL_TYPES, *FAMILIES, "olmo3", "phi3"}


def with_share(content, top, entry, **scaling):
    """A config.json with partial_rotary_factor, of the (text) config itself, and in every entry of its rotations."""
    content = deepcopy(content)
    text = content["text_config"] if isinstance(content.get("text_config"), dict) else content
    parameters = text.setdefault("rope_parameters", {})
    for values in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:
        values.pop("partial_rotary_factor", None)
        values.update(scaling | ({} if entry is None else {"partial_rotary_factor": entry}))
    text |= {} if top is None else {"partial_rotary_factor": top}
    return content


def test_a_share_of_channels_rotates_where_the_class_reads_it():
    """Every causal model type that is read, a share at the top or also in the entry: its rotary class, or an error."""
    read = set()
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            whole = CONFIG_MAPPING[model_type]().to_dict()
            position_of(whole)
        except (StrictDataclassError, UserError):
            continue
        for top, entry, scaling in ((0.5, None, {}), (0.5, 0.75, {}), (0.5, None, LINEAR)):
            content = with_share(whole, top, entry, **scaling)
            try:
                position = position_of(content)
            except UserError:
                continue
            stock = stock_rotation(content)
            near = [np.allclose(s.inv_freq, stock, rtol=1e-4, atol=0.0) for s in
                    (position.spectrum(), position.spectrum(1)) if s.inv_freq.shape == stock.shape]  # fmt: skip
            assert any(near), (model_type, top, entry, scaling)
            read |= {model_type} if position.head_dim < position_of(whole).head_dim else set()
    assert read <= READ_SHARE
    assert {"phi3", "glm4_moe_lite", "minimax_m2"} <= read  # whose classes have no share of their own


LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_a_share_that_the_class_does_not_read_is_named_and_not_carried_into_a_scaling():
    content = {"model_type": "llama", "head_dim": 16, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 32,
               "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 64,
               "rope_theta": 1e4, "partial_rotary_factor": 0.5}  # fmt: skip
    position = position_of(content)
    assert position.head_dim == 16
    assert any("partial_rotary_factor=0.5: transformers' llama does not read it" in w for w in config_warnings(content))
    with pytest.raises(UserError, match="must be absent: transformers' llama rotates whole heads"):
        position_of({**content, "rope_scaling": LINEAR})
    config = LlamaConfig.from_dict(content)
    place_position(config, position.extended([{"method": "pi", "factor": 2.0}]))
    reloaded = LlamaConfig.from_dict(json.loads(config.to_json_string()))
    assert AutoModelForCausalLM.from_config(reloaded)(torch.arange(8)[None]).logits.isfinite().all()


def test_a_nested_config_has_its_class_s_own_values():
    published = {  # Gemma-3-4b-it's config.json
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    }  # fmt: skip
    position = position_of(published)
    assert (position.head_dim, position.theta, position.trained_length) == (256, 1e6, 131072)
    shape = {"hidden_size": 2560, "num_attention_heads": 32, "max_position_embeddings": 40960, "rope_theta": 1000000}
    assert position_of({"model_type": "qwen3", **shape}).head_dim == 128  # Qwen3-4B; 2560 / 32 is 80


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, 0, 63]) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
SOUND = {
    "rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional", "su"]),
    "type": st.sampled_from(["yarn", "default"]), "rope_theta": st.floats(2, 1e9), "factor": st.floats(1, 64),
    "head_dim": st.sampled_from([32, 64]), "num_attention_heads": st.just(4), "hidden_size": st.just(128),
    "max_position_embeddings": st.just(8192), "original_max_position_embeddings": st.just(4096),
    "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0]), "rotary_pct": st.just(0.5),
    "short_factor": st.just([1.0] * 16), "long_factor": st.just([2.0] * 16), "attention_factor": st.just(1.1),
    "beta_fast": st.just(32), "beta_slow": st.just(1), "truncate": st.booleans(), "mscale": st.just(1),
    "mscale_all_dim": st.just(1), "low_freq_factor": st.just(1.0), "high_freq_factor": st.just(4.0),
    "alpha": st.just(2.0), "qk_rope_head_dim": st.just(32), "rotary_emb_base": st.just(1e5), "alibi": st.booleans(),
    "position_embedding_type": st.just("rope"), "model_type": st.sampled_from(["llama", "phi3", "hunyuan_v1_dense"]),
}  # fmt: skip
ENTRY = st.fixed_dictionaries({}, optional={key: st.one_of(value, value, JUNK) for key, value in SOUND.items()})
LAYERED = st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), ENTRY | JUNK)
WHOLE = st.fixed_dictionaries(
    {key: st.one_of(SOUND[key], SOUND[key], SOUND[key], JUNK) for key in ("head_dim", "max_position_embeddings")},
    optional={
        key: st.one_of(value, value, JUNK)
        for key, value in {**SOUND, "layer_types": st.just(["full_attention"])}.items()
        if key not in ("head_dim", "max_position_embeddings")
    },
)
CONFIG = st.tuples(WHOLE, st.sampled_from(["rope_parameters", "rope_scaling"]), ENTRY | LAYERED | JUNK).map(
    lambda drawn: {**drawn[0], drawn[1]: drawn[2]}
)


@settings(max_examples=600, deadline=None)
@given(CONFIG, JUNK)
def test_whatever_stands_in_config_json_only_a_value_error_comes_out(config, metadata):
    for content in (config, {"text_config": config}, {**config, "ropewalk": metadata}):
        try:
            s = position_of(content).spectrum()
        except ValueError:
            continue
        assert all(isinstance(warning, str) for warning in config_warnings(content))
        assert np.all(np.isfinite(s.inv_freq))
        assert np.all(s.inv_freq >= 0)
        assert np.isfinite(s.attention_scaling)


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
    ({**QWEN3, "rope_scaling": {"type": "yarn"}}, "'yarn' has no factor; write factor"),
    ({**LLAMA31, "rope_scaling": {"type": "llama3", "factor": 8}}, "no low_freq_factor; write low_freq_factor"),
    ({**QWEN3, "rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, r"alpha=1000\.0 must be absent: transformers"),
    ({**QWEN3, "rope_scaling": {"type": "yarn", "factor": 4, "llama_4_scaling_beta": 0.1}}, "temperature by position"),
    ({**QWEN3, "rope_scaling": [4]}, r"rope_scaling=\[4\] must be an object"),
    ({**QWEN3, "rope_theta": "1e6"}, "rope_theta='1e6' must be a number above 1; it is RoPE's base"),
    ({**QWEN3, "rope_theta": 1}, "rope_theta=1 must be a number above 1"),
    ({**QWEN3, "head_dim": 127}, "127 channels of a head rotate.*even number from 2"),
    ({**QWEN3, "head_dim": 0}, "head_dim=0 must be a whole number of channels from 1"),
    ({**QWEN3, "head_dim": True}, "head_dim=True must be a whole number"),
    ({**QWEN3, "max_position_embeddings": 1e400}, "max_position_embeddings=inf must be a whole number of tokens"),
    ({**QWEN3, "partial_rotary_factor": -0.5}, "partial_rotary_factor=-0.5 must be above 0, at most 1"),
    ({**PHI3, "rope_scaling": {"type": "longrope", "short_factor": ["1"]}}, "a list of positive numbers"),
    ({**PHI3, "rope_scaling": {"type": "longrope", "short_factor": FACTORS}}, "'longrope' has no long_factor; write"),
    ({**QWEN_YARN, "rope_scaling": {"type": "yarn", "factor": 4, "truncate": "no"}}, "truncate='no' must be true or"),
    ({**QWEN3, "rope_scaling": {"type": ["yarn"]}}, r"rope_type=\['yarn'\] must be one of default, linear"),
    ({**QWEN3, "rope_parameters": {"a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e5}}},
     "entries for a, b that differ"),
    ({"model_type": "bert", "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 512,
      "position_embedding_type": "absolute"}, "position_embedding_type='absolute' must be rope or rotary"),
    ({"model_type": "opt", "hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 2048},
     "names no rope_theta, and model_type='opt' is not known to rotate"),
    ({"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 2048,
      "alibi": True}, "alibi=True must be false"),
    ({"model_type": "gemma4_text", **QWEN3_SHAPE}, "model_type='gemma4_text' must be one whose"),
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


def test_a_linear_entry_may_name_its_start():
    entry = {"type": "linear", "factor": 4.0}
    config = {"head_dim": 128, "max_position_embeddings": 8192, "rope_theta": 1e4}
    for named in ({}, {"original_max_position_embeddings": 2048}):
        chain = position_of({**config, "rope_scaling": {**entry, **named}}).chain
        assert str(chain) == "pi(factor=4, original_max_position_embeddings=2048)"
