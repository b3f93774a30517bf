from __future__ import annotations

import numpy as np
import pytest
from helpers import composed

from ropewalk.config.groups import RopeConfig
from ropewalk.config.groups import TestTimeConfig as AtTestTime
from ropewalk.evaluation.evaluated_checkpoint import settings_by_length
from ropewalk.rope import RopeChain
from ropewalk.rope.position import Position

YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": "trained_length"}
LENGTHS = [512, 1024, 2048, 4096, 8192]
NO_ROPE = RopeConfig(name="default")


@pytest.fixture
def position() -> Position:
    chain = RopeChain([{"method": "abf", "theta": 1e5}])
    return Position("rope", chain, 1e4, 64, pretrained_length=512, trained_length=2048)


def test_auto_uses_yarn_past_the_trained_length_only(position: Position) -> None:
    settings = settings_by_length(position, NO_ROPE, AtTestTime("auto", beyond=[YARN]), LENGTHS)
    assert [setting.lengths for setting in settings] == [(512, 1024, 2048), (4096, 8192)]
    assert [setting.name for setting in settings] == [
        "none",
        "yarn(factor=4, original_max_position_embeddings=2048)",
    ]
    within, beyond = (setting.spectrum for setting in settings)
    assert within.attention_scaling == 1.0
    assert beyond.attention_scaling == pytest.approx(0.1 * np.log(4) + 1)
    assert beyond.inv_freq[-1] == pytest.approx(within.inv_freq[-1] / 4)
    assert str(settings[1].chain) == f"{position.chain} > {settings[1].name}"


@pytest.mark.parametrize("test_time", [AtTestTime("none"), AtTestTime("yarn4", [YARN], [YARN])])
def test_one_setting_at_every_length_is_one_pass(position: Position, test_time: AtTestTime) -> None:
    (setting,) = settings_by_length(position, NO_ROPE, test_time, LENGTHS)
    assert setting.lengths == tuple(LENGTHS)
    assert setting.longest == 8192


def test_the_rope_group_goes_before_test_time(position: Position) -> None:
    rope = RopeConfig("cope11", [{"method": "cope", "clip": 11}])
    settings = settings_by_length(position, rope, AtTestTime("auto", beyond=[YARN]), [2048, 4096])
    assert [[step["method"] for step in setting.extra] for setting in settings] == [
        ["cope"],
        ["cope", "yarn"],
    ]
    assert settings[0].spectrum.inv_freq[-1] == 0.0


def test_a_length_dependent_chain_needs_a_pass_for_each_length(position: Position) -> None:
    dynamic = {"method": "dynamic_ntk", "factor": 2.0, "original_max_position_embeddings": "trained_length"}
    settings = settings_by_length(position, NO_ROPE, AtTestTime("dynamic", [dynamic], [dynamic]), LENGTHS)
    assert [setting.lengths for setting in settings] == [(512, 1024, 2048), (4096,), (8192,)]
    assert settings[1].extra[0]["original_max_position_embeddings"] == 2048


def test_a_factor_follows_the_length() -> None:
    follow = {"method": "yarn", "factor": "length_over_trained", "original_max_position_embeddings": "trained_length"}
    position = Position("pretrained", RopeChain([]), 1e4, 16, 256, 256)
    found = settings_by_length(position, RopeConfig("default"), AtTestTime("follow", beyond=[follow]), [256, 512, 1024])
    assert [setting.extra[0]["factor"] for setting in found[1:]] == [2.0, 4.0]
    assert [setting.spectrum.attention_scaling for setting in found[1:]] == pytest.approx(
        [0.1 * np.log(2) + 1, 0.1 * np.log(4) + 1]
    )
    assert found[0].extra == ()


def test_a_length_may_have_a_chain_of_its_own() -> None:
    position = Position("pretrained", RopeChain([]), 1e4, 16, 256, 256)
    pi = {"method": "pi", "factor": 2.0}
    test_time = AtTestTime("mine", beyond=[{"method": "ntk", "factor": 4.0}], at={512: [pi], 1024: []})
    found = settings_by_length(position, RopeConfig("default"), test_time, [256, 512, 1024, 2048])
    assert [setting.lengths for setting in found] == [(256,), (512,), (1024,), (2048,)]
    assert [setting.name.partition("(")[0] for setting in found] == ["none", "pi", "none", "ntk"]


def test_without_its_temperature_rope_id_is_one_spectrum_at_every_length() -> None:
    test_time = composed("evaluate", "checkpoint=c", "output=o", "lengths=[8192]", "test_time=no_temperature").test_time
    rope_id = Position("rope_id", RopeChain([{"method": "rope_id"}]), 5e5, 80, 2048, 2048)
    (setting,) = settings_by_length(rope_id, NO_ROPE, test_time, LENGTHS)
    assert (setting.lengths, setting.spectrum.attention_scaling) == (tuple(LENGTHS), 1.0)
    scaled = settings_by_length(rope_id, NO_ROPE, AtTestTime("none"), LENGTHS)
    temperatures = [one.spectrum.attention_scaling**2 for one in scaled]  # of logits
    assert temperatures == pytest.approx([1.0, (0.1 * np.log(2) + 1) ** 2, (0.1 * np.log(4) + 1) ** 2])
    assert all(np.array_equal(one.spectrum.inv_freq, setting.spectrum.inv_freq) for one in scaled)
