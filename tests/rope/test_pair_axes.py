"""Axes of the pairs: in a chain, in a config, in transformers' own rotary modules, against the slow reference."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import composed
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from video_reference import angles, axes, positions

from ropewalk.analysis import print_advice
from ropewalk.analysis.inspection import print_inspection
from ropewalk.config import CONFIG_DIR
from ropewalk.model.rotary import assert_spectrum, place_position, stock_axes
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.advisor import config_warnings
from ropewalk.rope.pair_axes import PairAxes, quarter_section, read_stock_axes

ARMS = {  # a file of configs/rope -> the reference's name of it
    "mrope": "mrope", "mrope_v5": "mrope_v5", "videorope": "videorope", "hope_video": "hope",
    "hope_video_fixed": "hope",
}  # fmt: skip
CLASSES = {"qwen2_vl": Qwen2VLRotaryEmbedding, "qwen2_5_vl": Qwen2_5_VLRotaryEmbedding,
           "qwen3_vl": Qwen3VLTextRotaryEmbedding}  # fmt: skip
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip


def chain_of(arm):
    return RopeChain(yaml.safe_load((CONFIG_DIR / "rope" / f"{arm}.yaml").read_text())["chain"])


def position_of_arm(arm, head_dim, theta=1e6):
    return Position(arm, chain_of(arm), theta, head_dim, 32768, 32768)


def text_config(model_type, head_dim):
    fields = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim, "num_hidden_layers": 1}
    return AutoConfig.for_model(f"{model_type}_text", **fields)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_stock_transformers_turns_each_pair_with_its_axis(model_type, arm, head_dim):
    section = {32: (4, 6, 6), 64: (8, 12, 12), 128: (16, 24, 24)}[head_dim]
    position = position_of_arm(arm, head_dim)
    config = text_config(model_type, head_dim)
    place_position(config, position)
    rotary = CLASSES[model_type](config)
    place = positions(ARMS[arm], [7, (20, 4, 6), 9], gamma=1.25)
    exact = angles(ARMS[arm], head_dim, 1e6, section, place)
    cos, sin = rotary(torch.zeros(1, 1), torch.from_numpy(place).float()[:, None])
    # a position of 50 times a frequency that is off by 2.4e-7, and float32's own rounding of the product and the cosine
    np.testing.assert_allclose(cos[0].numpy(), np.hstack([np.cos(exact)] * 2), atol=2e-5)
    np.testing.assert_allclose(sin[0].numpy(), np.hstack([np.sin(exact)] * 2), atol=2e-5)
    assert np.array_equal(position.axes.of_pairs, axes(ARMS[arm], head_dim, section)[0])
    assert np.array_equal(stock_axes(rotary, head_dim // 2), position.axes.of_pairs)
    assert np.array_equal(position.spectrum().inv_freq == 0, axes(ARMS[arm], head_dim, section)[1])
    assert np.array_equal(rotary.inv_freq.numpy() == 0, position.spectrum().inv_freq == 0)


def test_hope_is_hardclip_of_an_eighth_of_the_head():
    for head_dim in (32, 64, 128):
        ours = position_of_arm("hope_video", head_dim).spectrum().inv_freq
        clipped = RopeChain([{"method": "hardclip", "clip": head_dim // 8}])
        facts = {"head_dim": head_dim, "theta": 1e6, "pretrained_length": 32768, "trained_length": 32768}
        assert np.array_equal(ours, clipped.spectrum(**facts).inv_freq)


def test_hopes_pairs_that_stand_still_are_those_that_read_time_in_every_head():
    for head_dim in range(2, 140, 2):
        position = position_of_arm("hope_video", head_dim)
        assert np.array_equal(position.spectrum().inv_freq == 0, position.axes.of_pairs == 0)


@pytest.mark.parametrize("arm", ["videorope", "hope_video"])
def test_the_section_is_read_alike_when_it_is_doubled(arm):
    """transformers 4 doubles the list over both halves of a head (4.57.3, apply_multimodal_rotary_pos_emb)."""
    section = position_of_arm(arm, 128).rope_parameters(32768)["mrope_section"]
    assert section == [0, 1, 1] * 24 + [16, 0, 0]
    half = axes("videorope", 128, (16, 24, 24))[0]
    assert np.array_equal(_doubled(section), np.concatenate([half, half]))
    assert not np.array_equal(_doubled(section[:73]), np.concatenate([half, half]))  # the fault that is padded away


def _doubled(section):
    return np.concatenate([np.full(pairs, i % 3) for i, pairs in enumerate(section * 2)])


def test_qwen3_vl_interleaves_its_own_section():
    position = Position("q", RopeChain.parse("axes(layout=interleaved, positions=mrope, section=[24, 20, 20])"), 5e6,
                        128, 8192, 8192)  # fmt: skip
    config = text_config("qwen3_vl", 128)
    place_position(config, position)
    assert np.array_equal(stock_axes(CLASSES["qwen3_vl"](config), 64), position.axes.of_pairs)
    assert np.array_equal(position.axes.of_pairs, axes("mrope_interleaved", 128, (24, 20, 20))[0])
    assert position.rope_parameters(8192)["mrope_interleaved"] is True


def test_axes_are_printed_read_back_and_hashed():
    chain = chain_of("hope_video")
    facts = (1e6, 128, 32768, 32768)
    resolved = Position("hope_video", chain, *facts).chain
    printed = (
        "axes(layout=alternating, positions=diagonal, section=[16, 24, 24], "
        "temporal_scales=[0.5, 0.75, 1, 1.25, 1.5]) > p_rope(fraction=0.75)"
    )
    assert str(resolved) == printed
    assert RopeChain.parse(printed).sha256 == resolved.sha256
    hashes = {Position(arm, chain_of(arm), *facts).sha256 for arm in (*ARMS, "rope1d_video", "cope_mrope")}
    assert len(hashes) == 7
    assert Position("rope", RopeChain([]), *facts).sha256 not in hashes


@pytest.mark.parametrize(("own", "chain", "expected"), [
    ("mrope", "cope(clip=20)", "{mrope} > cope(clip=20)"), ("mrope", "abf(theta=1e7)", "{mrope} > abf(theta=1e7)"),
    ("mrope", "{video} > hardclip(clip=16)", "{video} > hardclip(clip=16)"),
    ("hope", "{mrope} > abf(theta=1e7)", "{mrope} > abf(theta=1e7)"),
    ("hope", "rope", "{video} > p_rope(fraction=0.75)"),
    ("hope", "{mrope} > pi(factor=2)", "{mrope} > p_rope(fraction=0.75) > pi(factor=2)"),
])  # fmt: skip
def test_axes_stay_or_are_replaced_whatever_becomes_of_the_frequencies(own, chain, expected):
    words = {"mrope": "axes(layout=bands, positions=mrope)", "video": "axes(layout=alternating, positions=diagonal)"}
    owns = {"mrope": words["mrope"], "hope": f"{words['video']} > p_rope(fraction=0.75)"}
    joined = RopeChain.parse(chain.format(**words)).after(RopeChain.parse(owns[own]))
    assert joined == RopeChain.parse(expected.format(**words))


@pytest.mark.parametrize(("text", "message"), [
    ("cope(clip=4) > axes(layout=bands, positions=mrope)", "stands once in a chain, before every other"),
    ("axes(layout=bands, positions=mrope) > axes(layout=bands, positions=mrope)", "stands once in a chain"),
    ("axes(layout=bands, positions=mrope, section=[16, 24, 23])", r"must add up to a head's 64 pairs"),
    ("axes(layout=bands, positions=mrope, section=[16, 48])", "must be the pairs of time, height and width"),
    ("axes(layout=alternating, positions=diagonal, section=[16, 30, 18])", r"gives \[16, 24, 24\]"),
    ("axes(layout=interleaved, positions=mrope)", r"gives \[22, 21, 21\]"),
    ("axes(layout=bands, positions=mrope, temporal_scales=[2.0])", "no meaning under positions=mrope"),
    ("axes(layout=bands, positions=diagonal, temporal_scales=[0.0])", "must be positive"),
    ("axes(layout=stripes, positions=mrope)", "must be one of bands, alternating, interleaved"),
    ("axes(layout=bands)", "positions is not given"),
])  # fmt: skip
def test_axes_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Position("x", RopeChain.parse(text), 1e6, 128, 8192, 8192)


@pytest.mark.parametrize("pairs", range(4, 70, 3))
def test_the_automatic_section_fits_every_head(pairs):
    time, height, width = quarter_section(pairs)
    assert time == math.ceil(pairs / 4)
    assert time + height + width == pairs
    assert height - width in (0, 1)
    for layout in ("bands", "alternating"):
        axes_of = PairAxes(layout, (time, height, width), "mrope")
        section = axes_of.stock_keys()["mrope_section"]
        assert len(section) % 3 == 0
        read = read_stock_axes("qwen2_vl", {"mrope_section": section}, pairs)
        assert np.array_equal(read.of_pairs, axes_of.of_pairs)


def tiny(tmp_path, model_type, arm):
    """A random model of images and videos as a directory, under an arm."""
    vision = {"depth": 1, "num_heads": 2, "patch_size": 4}
    vision |= {"embed_dim": 16, "hidden_size": 64} if model_type == "qwen2_vl" else {"hidden_size": 16,
               "out_hidden_size": 64, "intermediate_size": 16}  # fmt: skip
    section = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    config = AutoConfig.for_model(model_type, **SMALL, rope_scaling=section, vision_config=vision)
    position = Position(arm, chain_of(arm), 1e6, 32, 256, 256)
    place_position(config, position)
    config.ropewalk = position.metadata()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    return position


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("arm", ["mrope", "hope_video", "cope_mrope"])
def test_a_config_carries_its_axes_there_and_back(tmp_path, model_type, arm):
    position = tiny(tmp_path, model_type, arm)
    assert Position.from_pretrained(tmp_path).chain == position.chain
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert_spectrum(model, position.spectrum())
    with pytest.raises(RuntimeError, match=r"its pairs read the axes [thw]+, the claimed chain's"):
        assert_spectrum(model, Position("q", position.chain.extended(
            [{"method": "axes", "layout": "bands", "positions": "mrope", "section": [6, 5, 5]}]), 1e6, 32, 256, 256
        ).spectrum())  # fmt: skip
    content = json.loads((tmp_path / "config.json").read_text())
    del content["ropewalk"]  # read off the stock entry alone: the same frequencies and axes, the rule is not there
    (tmp_path / "config.json").write_text(json.dumps(content))
    read = Position.from_pretrained(tmp_path)
    assert np.array_equal(read.axes.of_pairs, position.axes.of_pairs)
    np.testing.assert_allclose(read.spectrum().inv_freq, position.spectrum().inv_freq, rtol=1e-12, atol=1e-40)
    assert read.axes.positions == "mrope"


def test_a_model_that_reads_no_axes_refuses_them():
    config = AutoConfig.for_model("llama", head_dim=32, hidden_size=64, num_attention_heads=2)
    with pytest.raises(ValueError, match="model_type=llama does not read axes"):
        place_position(config, Position("m", chain_of("mrope"), 1e4, 32, 64, 64))
    config = text_config("qwen3_vl", 64)
    with pytest.raises(ValueError, match="model_type=qwen3_vl_text does not read axes"):
        place_position(config, Position("m", chain_of("hope_video"), 1e4, 64, 64, 64))


@pytest.mark.parametrize(("section", "message"), [
    ([16, 24, 23], "add up to the 64 pairs"), ([16, 24, 8, 0, 16], "the runs of a layout that is known"),
    ("16,24,24", "a list of numbers of pairs"), ([16, 24.0, 24], "a list of numbers of pairs"),
])  # fmt: skip
def test_a_section_that_no_layout_gives_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        read_stock_axes("qwen2_vl", {"mrope_section": section}, 64)


PUBLISHED = {  # position keys of the hub's config.json of Qwen2-VL-7B, Qwen2.5-VL-7B and Qwen3-VL-8B
    "qwen2_vl": {"hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 32768, "rope_theta": 1e6,
                 "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "num_hidden_layers": 1},
    "qwen2_5_vl": {"hidden_size": 3584, "num_attention_heads": 28, "max_position_embeddings": 128000, "rope_theta": 1e6,
                   "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "num_hidden_layers": 1},
    "qwen3_vl": {"text_config": {
        "model_type": "qwen3_vl_text", "hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128,
        "max_position_embeddings": 262144, "rope_theta": 5e6, "num_hidden_layers": 1,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}}},
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "layout", "letters"), [
    ("qwen2_vl", "bands", "t" * 16 + "h" * 24 + "w" * 24), ("qwen2_5_vl", "bands", "t" * 16 + "h" * 24 + "w" * 24),
    ("qwen3_vl", "interleaved", "thw" * 20 + "t" * 4),
])  # fmt: skip
def test_advise_and_inspect_read_a_published_config(tmp_path, capsys, model_type, layout, letters):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **PUBLISHED[model_type]}))
    print_advice(composed("advise", f"model.path={tmp_path}"))
    said = capsys.readouterr().out
    time, height, width = (letters.count(letter) for letter in "thw")
    assert f"{layout}: {time} pairs read time, {height} height, {width} width; positions mrope" in said
    (rotation,) = print_inspection(composed("inspect", f"model.path={tmp_path}"))  # the tower's is no chain's
    said = capsys.readouterr().out
    assert f"axes {letters}, pair by pair" in said
    assert f"chain: axes(layout={layout}, positions=mrope" in said
    assert "stock transformers rotates with it" in said
    assert rotation.inv_freq.numel() == 64


def test_axes_of_a_model_that_is_not_read_are_not_passed_over_in_silence():
    entry = {"rope_type": "default", "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
    text = {**SMALL, "model_type": "glm4v_text", "head_dim": 64, "rope_parameters": entry}
    warnings = list(config_warnings({"model_type": "glm4v", "text_config": text}))
    assert any("mrope_section=[8, 12, 12] of model_type=glm4v_text is not read" in warning for warning in warnings)
    for model_type, published in PUBLISHED.items():
        assert not any("mrope_section" in w for w in config_warnings({"model_type": model_type, **published}))


def test_text_hope_and_video_hope_have_names_that_cannot_be_confused():
    files = {path.stem for path in Path(CONFIG_DIR / "rope").glob("*hope*.yaml")}
    assert files == {"hope", "hope_video", "hope_video_fixed"}
    assert {step.method for step in chain_of("hope_video").steps} == {"axes", "p_rope"}
