"""Models whose layer types rotate differently: the chain is the full-attention layers', the others keep their own."""

import json

import numpy as np
import pytest
from helpers import TINY, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import ModelConfig
from ropewalk.export.portable import place_portable, write_portable_config
from ropewalk.export.verify.check_export import Claim
from ropewalk.guard import rotation_faults
from ropewalk.model.load import load_for_evaluation, training_config, write_config
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.advisor import warnings
from ropewalk.rope.position import position_of

LOCAL, GLOBAL = 100.0, 10_000.0  # bases
ALTERNATING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
COPE = [{"method": "abf", "theta": 1e5}, {"method": "cope", "clip": 4}]
GEMMA3_1B = {  # google/gemma-3-1b-pt's config.json
    "model_type": "gemma3_text", "head_dim": 256, "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
OLMO3_7B = {  # allenai/Olmo-3-1025-7B's config.json
    "model_type": "olmo3", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 65536,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "rope_theta": 500000,
    "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                     "original_max_position_embeddings": 8192, "rope_type": "yarn"},
    "sliding_window": 4096, "vocab_size": 100278,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
}  # fmt: skip


def plain(base, head_dim):
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def tiny(model_type, **fields):
    bases = {kind: {"rope_type": "default", "rope_theta": base}
             for kind, base in (("full_attention", GLOBAL), ("sliding_attention", LOCAL))}  # fmt: skip
    return {"model_type": model_type, **TINY, **ALTERNATING, "pad_token_id": 0, "rope_parameters": bases, **fields}


def trained(model_type, chain=COPE, length=256):
    model = ModelConfig("t", architecture=tiny(model_type), theta=GLOBAL, head_dim=16, pretrained_length=64)
    return training_config(model, RopeConfig("cope4", chain), length)


@pytest.mark.parametrize(("published", "chain", "base", "local"), [
    (GEMMA3_1B, "rope", 1e6, 1e4),
    ({**GEMMA3_1B, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}, "pi(factor=8, original_max", 1e6, 1e4),
    (OLMO3_7B, "yarn(factor=8, original_max_position_embeddings=8192", 5e5, 5e5),
])  # fmt: skip
def test_a_published_config_has_the_rotation_of_each_layer_type(published, chain, base, local):
    position = position_of(published)
    assert str(position.chain).startswith(chain)
    (own,) = position.other_layers.values()
    assert list(position.other_layers) == ["sliding_attention"]
    assert (position.theta, own.theta, str(own.chain)) == (base, local, "rope")
    np.testing.assert_allclose(own.spectrum().inv_freq, plain(local, position.head_dim), rtol=1e-14)
    assert own.spectrum().attention_scaling == 1.0


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text"])
def test_a_run_changes_the_full_attention_layers_alone(model_type, tmp_path):
    config = trained(model_type)
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": LOCAL}
    expected = RopeChain(COPE).spectrum(head_dim=16, theta=GLOBAL, pretrained_length=64, trained_length=256)
    model = AutoModelForCausalLM.from_config(config)
    rotary = model.get_decoder().rotary_emb
    np.testing.assert_allclose(rotary.full_attention_inv_freq, expected.inv_freq, rtol=2.4e-7)
    np.testing.assert_allclose(rotary.sliding_attention_inv_freq, plain(LOCAL, 16), rtol=2.4e-7)
    write_config(config, tmp_path / "config.json")
    recorded = Position.from_pretrained(tmp_path)
    assert recorded == position_of(config)
    record = json.loads((tmp_path / "config.json").read_text())["ropewalk"]
    assert record["other_layers"] == {"sliding_attention": {
        "chain": [], "theta": LOCAL, "head_dim": 16, "pretrained_length": 64, "trained_length": 64}}  # fmt: skip
    further = recorded.continued("longer", RopeChain([]), 512)
    assert further.other_layers == recorded.other_layers
    without = Position("cope4", recorded.chain, GLOBAL, 16, 64, 256)
    assert recorded.sha256 != without.sha256
    record["other_layers"]["sliding_attention"]["theta"] = GLOBAL
    with pytest.raises(ValueError, match=r"spectrum_sha256=.* is not the hash of what stands beside it"):
        position_of({"ropewalk": record})


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text"])
def test_an_edited_window_layer_is_found_out(model_type, tmp_path):
    directory = save_tiny(tmp_path / "model", model_type, pad_token_id=0, **ALTERNATING)
    path = directory / "config.json"
    config = trained(model_type)
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    write_config(config, path)
    assert Claim.of(directory).faults() == []
    load_for_evaluation(directory)
    content = json.loads(path.read_text())
    content["rope_parameters"]["sliding_attention"]["rope_theta"] = GLOBAL
    path.write_text(json.dumps(content))
    (fault,) = Claim.of(directory).faults()
    assert fault == (
        "sliding_attention: stock transformers rotates other than the claimed chain at pairs [1, 2, 3, 4, 5, 6, 7]"
    )
    with pytest.raises(RuntimeError, match=r"^sliding_attention: stock transformers rotates other"):
        load_for_evaluation(directory)
    live = AutoModelForCausalLM.from_pretrained(directory)
    assert any("sliding_attention: stock" in found for found in rotation_faults(live))


def test_older_readers_of_an_olmo3_have_one_base_for_all_layers(tmp_path):
    """transformers 4 and SGLang rotate windows with plain RoPE at rope_theta: the full layers' factors are over it."""
    config = trained("olmo3")
    spectrum = position_of(config).spectrum()
    config = place_portable(config, position_of(config), 256)
    config.architectures = ["Olmo3ForCausalLM"]
    assert write_portable_config(config, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["rope_theta"] == LOCAL
    assert content["rope_scaling"] == content["rope_parameters"]["full_attention"]
    factors = np.array(content["rope_scaling"]["long_factor"])
    np.testing.assert_allclose(1 / (factors * LOCAL ** (np.arange(8) / 8))[:-1], spectrum.inv_freq[:-1], rtol=1e-12)
    assert (spectrum.inv_freq[-1], factors[-1]) == (0, 1e38)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert rotation_faults(model) == []  # no key is read by nothing
    rotary = model.get_decoder().rotary_emb
    np.testing.assert_allclose(rotary.full_attention_inv_freq, spectrum.inv_freq, rtol=2.4e-7)
    gemma = trained("gemma3_text")  # has a key for the windows' own base, so the full layers keep theirs
    assert place_portable(gemma, position_of(gemma), 256).rope_parameters["full_attention"]["rope_theta"] == 1e5


@pytest.mark.parametrize(("config", "said"), [
    (OLMO3_7B, "only the full_attention layers take a chain"),
    (GEMMA3_1B, "only the full_attention layers take a chain"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096: layers with a window see no distance"),
    ({"model_type": "gemma2", "sliding_window": 4096, "num_hidden_layers": 4,
     "layer_types": ["sliding_attention", "full_attention"] * 2},
     "2 of 4 layers see no distance beyond it, and the config has one entry for all"),
    ({"model_type": "gemma2"}, "gemma2 is advised on and not trained here: it has soft caps"),
    ({"model_type": "gpt_oss"}, "gpt_oss is advised on and not trained here: it has attention sinks"),
    ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, None),
])  # fmt: skip
def test_advice_on_windows(config, said):
    fields = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192, **config}
    position = position_of(fields)
    told = " ".join(warnings(position, [position], position.trained_length, fields))
    assert said in told if said else "window" not in told
