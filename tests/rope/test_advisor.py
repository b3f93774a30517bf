"""The advisor's numbers against the published ones and against counting by hand."""

import json
import math
import re

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


def test_where_rounding_decides_it_is_said():
    """75% of 29 pairs are 21.75; 27 give 20.25 and 24 give 18, which no rounding to the nearest changes."""
    assert "rounded down; rounding decides: 21.75 is 22 to the nearest pair" in describe(advise(model()))
    for unmoved in (advise(model(), theta=1e7, train_length=65536), advise(model(1e6, 32768))):
        assert "rounding decides" not in describe(unmoved)


@pytest.mark.parametrize(("clip", "weight"), [
    ("cope(clip=20)", 1.0),  # it begins with pair 44
    ("cope(clip=29)", (1 + math.cos(math.pi * 5 / 28)) / 2),  # with pair 35
    ("cope(clip=34)", (1 + math.cos(math.pi * 10 / 33)) / 2),
    ("hardclip(clip=34)", 0.0),
])  # fmt: skip
def test_the_band_that_learned_spectra_keep(clip, weight):
    """LeRoPE's 2.205 training lengths are 144,507 tokens at 64k; of base 1e7's pairs number 40 is nearest: 148,998."""
    advice = advise(model(), theta=1e7, train_length=65536, chain=RopeChain.parse(clip))
    assert (advice.band.period, advice.band.pair) == (pytest.approx(144506.88), 40)
    assert advice.band.pair_period == pytest.approx(2 * math.pi * 1e7 ** (80 / 128), rel=1e-12)
    assert dict(advice.band.weights)[clip] == pytest.approx(weight, rel=1e-12)
    page = describe(advice)
    assert "hypothesis            learned spectra keep a band near 2.205 training lengths (LeRoPE, arXiv 2607" in page
    assert "pair 40, 148,998 tokens a turn" in page
    assert f"{clip} { ({1.0: 'keeps it', 0.0: 'stops it'}.get(weight, f'slows it to {weight:.0%}')) }" in page


def test_a_clipped_models_own_clip_is_held_against_the_band():
    assert advise(COPE20).band.weights == (("cope(clip=20)", 1.0),)
    assert advise(model()).band.pair == 39  # 18,063 tokens at 8,192; pair 39 turns once in 18,663
    short = advise(model(theta=1e4, length=65536))  # its slowest pair turns once in 54,410 tokens
    assert short.band.pair is None
    assert "144,507 tokens, and the slowest pair turns once in 54,410" in describe(short)


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


def warned(*args, **kwargs):
    return " ".join(advise(*args, **kwargs).warnings)


LLAMA31 = Position("pretrained", RopeChain.parse("llama3()"), 5e5, 128, 8192, 131072)
COPE20 = Position("cope20", RopeChain.parse("abf(theta=1e7) > cope(clip=20)"), 5e5, 128, 8192, 65536)


def test_a_clip_above_three_quarters_of_the_pairs_is_warned_of():
    assert "a clip of 50 is above 75% of all 64 pairs" in warned(model(), chain=RopeChain.parse("cope(clip=50)"))
    assert "above 75%" not in warned(model(), chain=RopeChain.parse("hardclip(clip=48)"))
    # At base 1e7 and 64 tokens 54 pairs never finish a turn: 75% of them are 40 of 64, within bounds.
    assert "above 75%" not in warned(model(), theta=1e7, train_length=64)


def test_a_clip_under_llama3_scaling_is_warned_of():
    assert "a clip under llama3 scaling" in warned(LLAMA31)
    assert "llama3" not in warned(LLAMA31, theta=1e7)  # abf replaces the scaling
    assert "a clip under llama3" in warned(model(), chain=RopeChain.parse("llama3() > hardclip(clip=4)"))


def test_a_clip_under_yarn_is_warned_of_where_it_is_asked_for():
    yarn = "yarn(factor=4, original_max_position_embeddings=8192)"
    says = "a clip under full YaRN"
    assert says not in warned(model())  # the table shows it, nobody asked
    assert says in warned(model(), target_length=32768)  # YaRN over the clip is the answer to that
    assert says not in warned(model(), chain=RopeChain.parse(yarn))
    assert says in warned(model(), chain=RopeChain.parse(f"cope(clip=10) > {yarn}"))
    assert says in warned(Position("pretrained", RopeChain.parse(yarn), 5e5, 128, 8192, 32768))  # the clip on top


def test_a_config_that_stock_code_reads_otherwise_is_warned_of():
    bare = {"head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0}}  # fmt: skip
    assert "without original_max_position_embeddings: transformers takes max_position_embeddings=32,768" in warned(
        position_of(bare), config=bare
    )
    told = {**bare, "rope_scaling": {**bare["rope_scaling"], "original_max_position_embeddings": 32768}}
    assert "without original" not in warned(position_of(told), config=told)
    nested = {"text_config": {**bare, "original_max_position_embeddings": 8192}}
    assert "without original" not in warned(position_of(nested), config=nested)
    reference = {"head_dim": 128, "max_position_embeddings": 8192, "use_cope": True, "cope_clip_n": 20}
    assert "use_cope=True and cope_clip_n=20: CoPE's published code reads these" in warned(
        position_of(reference), config=reference
    )


VICUNA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096,
          "rope_scaling": {"type": "linear", "factor": 4.0}}  # fmt: skip


def test_linear_scaling_in_either_convention():
    """Vicuna-7b-v1.5-16k as published names both lengths; without the second a file can be read both ways."""
    published = position_of({**VICUNA, "max_sequence_length": 16384})
    assert str(published.chain) == "pi(factor=4, original_max_position_embeddings=4096)"
    assert published.trained_length == 16384
    assert "convention" not in warned(published, config={**VICUNA, "max_sequence_length": 16384})
    assert "from 4,096 to 16,384, and the file does not say which" in warned(position_of(VICUNA), config=VICUNA)
    named = {**VICUNA, "rope_scaling": {**VICUNA["rope_scaling"], "original_max_position_embeddings": 1024}}
    assert "convention" not in warned(position_of(named), config=named)


def test_a_type_beside_another_rope_type_and_dual_chunk_attention_are_warned_of():
    plain = {"head_dim": 128, "max_position_embeddings": 1010000, "rope_theta": 1e6}
    both = {**plain, "rope_scaling": {"type": "yarn", "rope_type": "default", "factor": 4.0}}
    assert "type='yarn' beside rope_type='default': transformers takes rope_type" in warned(
        position_of(both), config=both
    )
    same = {**plain, "rope_scaling": {"type": "default", "rope_type": "default"}}
    assert "beside rope_type" not in warned(position_of(same), config=same)
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    dual = {**plain, "dual_chunk_attention_config": chunks}  # Qwen2.5-7B-Instruct-1M
    warning = warned(position_of(dual), config=dual)
    assert "max_position_embeddings=1,010,000 is no length that it was trained at; the file names 262,144" in warning


def test_a_scaling_on_a_dynamic_model_names_the_test_time_setting():
    dynamic = Position(
        "m", RopeChain.parse("dynamic_ntk(factor=2, original_max_position_embeddings=256)"), 1e4, 16, 256, 256
    )
    with pytest.raises(ValueError, match="test_time=none, where it is an evaluation's"):
        dynamic.extended([{"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}])


@pytest.mark.parametrize("fields", [
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    {"rope_theta": 1e6, "rope_local_base_freq": 1e4},  # Gemma 3 as transformers 4 wrote it
    {"rope_theta": 5e5, "model_type": "olmo3"},
])  # fmt: skip
def test_layers_that_differ_are_told(fields):
    config = {"head_dim": 128, "max_position_embeddings": 8192, **fields}
    for content in (config, {"text_config": config}):
        assert "only the full_attention layers take a chain" in warned(position_of(content), config=content)
    plain = {"head_dim": 128, "max_position_embeddings": 8192, "rope_theta": 1e6}
    assert "layers" not in warned(position_of(plain), config=plain)


def test_a_clipped_model_is_recommended_no_second_clip():
    advice = advise(COPE20)
    assert advice.clip is None
    assert not [choice.chain for choice in advice.choices if "clip=" in choice.chain]
    assert "the model is clipped already (cope(clip=20))" in " ".join(advice.warnings)
    assert "recommended clip      none: the model is clipped already, by cope(clip=20)" in describe(advice)
    with pytest.raises(ValueError, match=r"hardclip\(clip=4\) follows cope\(clip=20\), and a chain clips once"):
        advise(COPE20, chain=RopeChain.parse("hardclip(clip=4)"))
    afresh = advise(COPE20, theta=1e7, train_length=65536)
    assert afresh.clip == 20
    assert not afresh.warnings


def test_a_rope_id_model_is_stretched_by_its_own_scaling():
    advice = advise(model(chain="rope_id()", length=4096), target_length=32768)
    assert advice.yarn_ramp is None  # YaRN's ramp follows the base, and these pairs follow none
    assert [choice.chain for choice in advice.choices][-1].startswith("rope_id_yarn(factor=8")
    assert "rope_id_yarn, factor 8 from 4,096 tokens" in describe(advice)


def test_pairs_that_are_stopped_already_leave_no_clip_to_recommend():
    advice = advise(model(chain="p_rope(fraction=0.75)"))
    assert advice.clip is None
    assert "16 pairs are stopped already (p_rope(fraction=0.75))" in " ".join(advice.warnings)
    assert "none: pairs are stopped already" in describe(advice)


def test_where_every_pair_finishes_a_turn_there_is_nothing_to_clip():
    advice = advise(model(theta=1e4, length=65536))  # the slowest period is 2 pi 1e4^(63/64) = 54,410 tokens
    assert advice.clip == 0
    assert "none: 75% of 0 pairs at base 1e4 and 65,536 tokens, rounded down, is no pair" in describe(advice)
    assert [choice.chain.split("(")[0] for choice in advice.choices] == ["as it is", "yarn"]


def test_counts_say_base_and_scaling():
    """Llama 3.1 divides by 8 the pairs whose wavelength is above 8,192 tokens; none between ends up near a count."""
    periods = [2 * math.pi * 5e5 ** (i / 64) for i in range(64)]
    plain, scaled = (sum(p > length for p in periods) for length in (8192, 131072 / 8))
    advice = advise(LLAMA31)
    assert str(advice.beyond[0]) == f"{plain} pairs at base 5e5 and 8,192 tokens"
    assert str(advice.clip_at) == f"{scaled} pairs at base 5e5 under llama3 and 131,072 tokens"
    assert advice.clip == 3 * scaled // 4
    assert f"{advice.clip}: 75% of {scaled} pairs at base 5e5 under llama3 and 131,072 tokens" in describe(advice)


def test_a_second_scaling_starts_where_the_first_one_ends():
    advice = advise(LLAMA31, target_length=524288)
    assert (advice.yarn_from, advice.yarn_factor) == (131072, 4)
    assert advice.choices[-2].chain == "yarn(factor=4, original_max_position_embeddings=131072)"
    assert advice.choices[-2].slowest_period == pytest.approx(4 * 8 * 2 * math.pi * 5e5 ** (63 / 64), rel=1e-12)
    assert "the model is scaled already (llama3())" in " ".join(advice.warnings)
    # 8 x 8,192 = 65,536 tokens are reached by the scaling itself, whatever a run trains at.
    assert advise(LLAMA31, train_length=32768).yarn_from == 65536
    qwen = Position(
        "p", RopeChain.parse("yarn(factor=4, original_max_position_embeddings=32768)"), 1e6, 128, 32768, 32768
    )
    reached = advise(qwen, target_length=131072)
    assert not [choice.chain for choice in reached.choices if "yarn" in choice.chain]
    assert "none: the target, 131,072 tokens, is not beyond the 131,072 it starts from" in describe(reached)


def test_words_of_a_judged_chain_resolve_as_in_training():
    """A run from Llama 3.1 starts from 131,072 tokens: from there a second scaling is legal."""
    chain = RopeChain.parse("yarn(factor=2, original_max_position_embeddings=pretrained_length)")
    judged = advise(LLAMA31, train_length=262144, chain=chain).choices[-1]
    assert judged.chain == "yarn(factor=2, original_max_position_embeddings=131072)"


def test_a_chain_of_ones_own_is_judged_beside_the_rest():
    own = advise(model(), theta=1e7, train_length=65536, chain=RopeChain.parse("abf(theta=8e6)")).choices[-1]
    assert own.chain == "abf(theta=8e6)"
    assert own.slowest_period == pytest.approx(2 * math.pi * 8e6 ** (126 / 128), rel=1e-12)


@pytest.mark.parametrize(("given", "message"), [
    ({"target_length": 4096}, "target_length=4096 is below train_length=8192"),
    ({"theta": 0.0}, "theta=0 must be above 1; leave it out to keep the model's own base, 5e5"),
    ({"theta": -5.0}, "theta=-5 must be above 1"),
    ({"theta": math.nan}, "theta=nan must be above 1"),
    ({"train_length": 0}, "train_length=0 must be 7 tokens or more"),
    ({"train_length": -5}, "train_length=-5 must be 7 tokens or more"),
    ({"target_length": 0}, "target_length=0 must be 7 tokens or more"),
])  # fmt: skip
def test_lengths_and_bases_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        advise(model(), **given)


@pytest.mark.parametrize("length", [7, 16, 201, 1000])
def test_yarns_ramp_stays_within_the_pairs_at_short_lengths(length):
    """Pairs with 32 or more turns in the length are kept, those with 1 or fewer divided; by 201 tokens none has 32."""
    advice = advise(model(), train_length=length)
    low, high = advice.yarn_ramp
    turns = [length / (2 * math.pi * 5e5 ** (i / 64)) for i in range(64)]
    assert low == max(sum(t >= 32 for t in turns) - 1, 0)
    assert high == sum(t > 1 for t in turns)
    kept = f"pairs 0 to {low} are kept" if low else "pair 0 is kept"
    assert f"{kept}, pairs {high} to 63 divided by 4" in describe(advice)


def test_a_config_json_alone_is_enough(tmp_path):
    content = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 8192, "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert advise(Position.from_pretrained(tmp_path / "config.json")).clip == 21
