"""A chain's stock entry in the configs of other architectures, saved, and loaded again by stock transformers."""

import json

import numpy as np
import pytest
from helpers import save_tiny
from transformers import AutoModelForCausalLM

from ropewalk.model.load import load_for_evaluation, read_position
from ropewalk.model.rotary import assert_spectrum
from ropewalk.rope import RopeChain

YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def edit(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def reloaded(model, directory):
    """The same model saved and loaded again without this package's loader."""
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def test_the_share_of_a_proportional_entry_is_the_chains(tmp_path):
    save_tiny(tmp_path / "a", "qwen3")
    edit(tmp_path / "a", rope_parameters={
        "rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5
    })  # fmt: skip
    assert str(read_position(tmp_path / "a").chain) == "p_rope(fraction=0.5)"
    model = load_for_evaluation(tmp_path / "a", [{"method": "pi", "factor": 2.0}])
    expected = np.array([1e4 ** (-i / 8) / 2 for i in range(4)] + [0.0] * 4)
    for found in (model, reloaded(model, tmp_path / "b")):
        np.testing.assert_allclose(found.model.rotary_emb.inv_freq, expected, rtol=2.4e-7)


def test_a_share_of_the_architecture_stays(tmp_path):
    save_tiny(tmp_path / "a", "phi3", pad_token_id=0, partial_rotary_factor=0.5, hidden_size=64)
    model = load_for_evaluation(tmp_path / "a", [{"method": "hardclip", "clip": 1}])
    expected = np.array([1e4 ** (-i / 4) for i in range(3)] + [0.0])
    for found in (model, reloaded(model, tmp_path / "b")):
        assert found.config.rope_parameters["partial_rotary_factor"] == 0.5
        np.testing.assert_allclose(found.model.rotary_emb.inv_freq, expected, rtol=2.4e-7)


@pytest.mark.parametrize("method", [
    YARN, {"method": "llama3", "original_max_position_embeddings": 16}, {"method": "pi", "factor": 4.0},
    {"method": "ntk", "factor": 4.0}, {"method": "cope", "clip": 4},
])  # fmt: skip
def test_phi3_keeps_to_the_entry_through_save_and_load(tmp_path, method):
    save_tiny(tmp_path / "a", "phi3", pad_token_id=0, hidden_size=64, original_max_position_embeddings=32)
    model = load_for_evaluation(tmp_path / "a", [method])
    spectrum = RopeChain([method]).spectrum(head_dim=16, theta=1e4, pretrained_length=64, trained_length=64)
    again = reloaded(model, tmp_path / "b")
    assert_spectrum(again, spectrum)
    assert again.config.original_max_position_embeddings == 64  # where generation would switch lists
    np.testing.assert_allclose(again.model.rotary_emb.inv_freq, spectrum.inv_freq, rtol=2.4e-7)
    assert again.model.rotary_emb.attention_scaling == pytest.approx(spectrum.attention_scaling, rel=1e-12)


def test_a_top_level_original_length_follows_the_entry(tmp_path):
    save_tiny(tmp_path / "a")
    edit(tmp_path / "a", original_max_position_embeddings=32)
    model = load_for_evaluation(tmp_path / "a", [YARN])
    again = reloaded(model, tmp_path / "b")
    assert again.config.rope_parameters["rope_type"] == "yarn"
    assert again.config.rope_parameters["original_max_position_embeddings"] == 16
    spectrum = RopeChain([YARN]).spectrum(head_dim=16, theta=1e4, pretrained_length=64, trained_length=64)
    assert_spectrum(again, spectrum)


def test_an_untruncated_ramp_reaches_the_layers_it_is_for(tmp_path):
    # transformers looks ``truncate`` up beside the layer types' entries, not in them
    save_tiny(tmp_path / "a", "olmo3", layer_types=["sliding_attention", "full_attention"])
    smooth = {**YARN, "truncate": False}
    model = load_for_evaluation(tmp_path / "a", [smooth])
    spectrum = RopeChain([smooth]).spectrum(head_dim=16, theta=1e4, pretrained_length=64, trained_length=64)
    again = reloaded(model, tmp_path / "b")
    np.testing.assert_allclose(again.model.rotary_emb.full_attention_inv_freq, spectrum.inv_freq, rtol=2.4e-7)
    # read off such an entry, the chain is what stock transformers does with it
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    parts = content["rope_parameters"]
    parts["full_attention"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "truncate": False,
                               "original_max_position_embeddings": 16}  # fmt: skip
    edit(tmp_path / "a", rope_parameters=parts)
    load_for_evaluation(tmp_path / "a")  # asserts it
