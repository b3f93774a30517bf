"""The advisor's numbers against the published ones and against counting by hand."""

import json
import math

import pytest

from ropewalk.analysis.advice import describe
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.advisor import advise, critical_dimension
from ropewalk.rope.position import position_of


def model(theta=5e5, length=8192, head_dim=128, chain="rope"):
    return Position("pretrained", RopeChain.parse(chain), theta, head_dim, length, length)


def test_llama3_at_64k_with_the_papers_base():
    advice = advise(model(), theta=1e7, train_length=65536)
    assert advice.critical_dimension == 70
    assert [(b.theta, b.length, b.pairs) for b in advice.beyond] == [(5e5, 8192, 29), (1e7, 8192, 35), (1e7, 65536, 27)]
    assert (advice.clip, advice.clip_at.pairs) == (20, 27)
    assert "20: 75% of 27 pairs at base 1e7 and 65,536 tokens" in describe(advice)
    assert advice.yarn_ramp == (22, 37)
    assert advice.yarn_factor == 4


@pytest.mark.parametrize(("theta", "length", "pairs", "clip"), [(5e5, 8192, 29, 21), (1e6, 32768, 24, 18)])
def test_without_training_the_models_own_base_and_length_count(theta, length, pairs, clip):
    advice = advise(model(theta, length))
    assert (advice.clip_at.theta, advice.clip_at.length, advice.clip_at.pairs) == (theta, length, pairs)
    assert advice.clip == clip


@pytest.mark.parametrize(("head_dim", "theta", "length"), [(128, 5e5, 8192), (128, 1e4, 4096), (64, 1e5, 8192)])
def test_critical_dimension_counts_the_channels_that_finish_a_turn(head_dim, theta, length):
    finished = sum(2 * math.pi * theta ** (2 * i / head_dim) <= length for i in range(head_dim // 2))
    assert critical_dimension(head_dim, theta, length) == 2 * finished


def test_critical_dimension_stays_within_the_head():
    assert critical_dimension(64, 1e4, 10**9) == 64
    assert critical_dimension(64, 1e4, 3) == 0


def test_what_each_choice_does_to_the_slowest_periods():
    advice = advise(model(), theta=1e7, train_length=65536, target_length=131072)
    rope, hard, cope, yarn, both = advice.choices
    slowest = 2 * math.pi * 1e7 ** (126 / 128)
    assert rope.slowest_period == pytest.approx(slowest, rel=1e-12)
    assert hard.slowest_period == pytest.approx(2 * math.pi * 1e7 ** (2 * 43 / 128), rel=1e-12)
    last_weight = (1 + math.cos(math.pi * 18 / 19)) / 2
    assert cope.slowest_period == pytest.approx(2 * math.pi * 1e7 ** (124 / 128) / last_weight, rel=1e-9)
    assert yarn.slowest_period == pytest.approx(2 * slowest, rel=1e-12)
    assert [c.stopped for c in advice.choices] == [0, 20, 1, 0, 1]
    assert [c.unfinished for c in advice.choices] == [27, 7, 26, 27, 26]
    assert [c.new_phases for c in advice.choices] == [27, 7, 26, 0, 0]
    assert both.chain == "cope(clip=20) > yarn(factor=2, original_max_position_embeddings=65536)"
    turns = [65536 / (2 * math.pi * 1e7 ** (2 * i / 128)) for i in range(37, 64)]
    assert rope.new_turns == pytest.approx(sum(min(2 * t, 1) - t for t in turns), rel=1e-9)


def test_warnings_name_what_to_look_out_for():
    def warned(*args, **kwargs):
        return " ".join(advise(*args, **kwargs).warnings)

    assert "a clip of 50 is above 75% of all 64 pairs" in warned(model(), chain=RopeChain.parse("cope(clip=50)"))
    assert "above 75%" not in warned(model())
    llama31 = Position("pretrained", RopeChain.parse("llama3()"), 5e5, 128, 8192, 131072)
    assert "a clip under llama3 scaling" in warned(llama31)
    assert "the model is scaled already (llama3())" in warned(llama31)
    assert "llama3" not in warned(llama31, theta=1e7)  # abf replaces the scaling
    assert "a clip under full YaRN" in warned(model())
    bare = {"head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0}}  # fmt: skip
    assert "without original_max_position_embeddings: transformers takes max_position_embeddings=32,768" in warned(
        position_of(bare), config=bare
    )
    told = {**bare, "rope_scaling": {**bare["rope_scaling"], "original_max_position_embeddings": 32768}}
    assert "without original" not in warned(position_of(told), config=told)
    reference = {"head_dim": 128, "max_position_embeddings": 8192, "use_cope": True, "cope_clip_n": 20}
    assert "use_cope=True and cope_clip_n=20: CoPE's published code reads these" in warned(
        position_of(reference), config=reference
    )


def test_a_chain_of_ones_own_is_judged_beside_the_rest():
    own = advise(model(), theta=1e7, train_length=65536, chain=RopeChain.parse("abf(theta=8e6)")).choices[-1]
    assert own.chain == "abf(theta=8e6)"
    assert own.slowest_period == pytest.approx(2 * math.pi * 8e6 ** (126 / 128), rel=1e-12)


def test_a_target_below_the_training_length_is_refused():
    with pytest.raises(ValueError, match="target_length=4096 is below train_length=8192"):
        advise(model(), target_length=4096)


def test_a_config_json_alone_is_enough(tmp_path):
    content = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192, "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert advise(Position.from_pretrained(tmp_path / "config.json")).clip == 21
