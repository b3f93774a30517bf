"""Methods against closed forms, and against transformers' own functions where it has the method."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rope_samples import SAMPLES, chain_of
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropewalk.errors import UserError
from ropewalk.rope import Position, RopeChain, available_methods
from ropewalk.rope.methods import import_methods
from ropewalk.rope.methods.clipping import recommended_clip

LLAMA3 = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}

head_dims = st.integers(16, 128).map(lambda pairs: 2 * pairs)
thetas = st.floats(1e4, 1e9)
factors = st.floats(1.0, 64.0)
lengths = st.sampled_from([512, 2048, 8192, 32768, 131072])


def spectrum(*methods, **inputs):
    return RopeChain(list(methods)).spectrum(**{**LLAMA3, **inputs})


def stock(head_dim, theta, max_position_embeddings=131072, present=None, **entry):
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_position_embeddings,
    )
    config.rope_parameters = {"rope_theta": theta, **entry}
    compute = ROPE_INIT_FUNCTIONS[entry["rope_type"]]
    inv_freq, scaling = compute(config, device=torch.device("cpu"), seq_len=present)
    return inv_freq.double().numpy(), scaling


def close(ours, theirs):
    # float32: a few roundings of 6e-8, and that of the exponent times ln(theta), up to 20 x 6e-8
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=0)


def test_rope_is_the_geometric_series():
    s = spectrum()
    assert s.inv_freq[0] == 1.0
    assert s.inv_freq[1] == pytest.approx(math.exp(-math.log(5e5) / 64), rel=1e-14)
    assert s.inv_freq[32] == pytest.approx(1 / math.sqrt(5e5), rel=1e-14)
    assert s.periods[0] == pytest.approx(2 * math.pi)


@pytest.mark.parametrize(("theta", "length", "pairs"), [(5e5, 8192, 29), (1e7, 8192, 35), (1e7, 65536, 27)])
def test_pairs_beyond_a_length(theta, length, pairs):
    assert int((spectrum({"method": "abf", "theta": theta}).periods > length).sum()) == pairs


def test_cope_weights_are_the_papers():
    base = spectrum({"method": "abf", "theta": 1e7}).inv_freq
    ours = spectrum({"method": "abf", "theta": 1e7}, {"method": "cope", "clip": 20}).inv_freq
    linspace = 0.5 * (1 + np.cos(np.pi * np.linspace(0, 1, 20)))
    np.testing.assert_allclose(ours[-20:], base[-20:] * linspace, rtol=1e-12, atol=1e-20)
    assert np.array_equal(ours[:45], base[:45])  # w_0 = 1: 19 pairs change
    assert int((ours == 0).sum()) == 1
    assert ours[-1] == 0.0


def test_hardclip_zeroes_exactly_its_pairs():
    s = spectrum({"method": "hardclip", "clip": 20})
    assert np.array_equal(np.flatnonzero(s.inv_freq == 0), np.arange(44, 64))


@pytest.mark.parametrize("method", [
    {"method": "cope", "clip": 0}, {"method": "cope", "clip": 1}, {"method": "hardclip", "clip": 0},
    {"method": "pi", "factor": 1.0}, {"method": "ntk", "factor": 1.0}, {"method": "p_rope", "fraction": 1.0},
    {"method": "yarn", "factor": 1.0, "original_max_position_embeddings": 8192}, {"method": "llama3", "factor": 1.0},
])  # fmt: skip
def test_identities(method):
    s = spectrum(method)
    np.testing.assert_allclose(s.inv_freq, spectrum().inv_freq, rtol=1e-15)
    assert s.attention_scaling == 1.0


def test_ntk_is_a_new_base():
    scaled = spectrum({"method": "ntk", "factor": 8.0})
    rebased = spectrum({"method": "abf", "theta": 5e5 * 8.0 ** (128 / 126)})
    np.testing.assert_allclose(scaled.inv_freq, rebased.inv_freq, rtol=1e-12)
    assert scaled.inv_freq[-1] * 8 == pytest.approx(spectrum().inv_freq[-1], rel=1e-12)


@pytest.mark.parametrize(("length", "low", "high"), [(8192, 14, 29), (65536, 22, 37)])
def test_yarn_ramp_ends(length, low, high):
    base = spectrum({"method": "abf", "theta": 1e7}).inv_freq
    yarn = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": length}
    ratio = spectrum({"method": "abf", "theta": 1e7}, yarn).inv_freq / base
    assert np.flatnonzero(ratio < 1)[0] == low + 1
    assert np.flatnonzero(np.isclose(ratio, 0.25, rtol=1e-12))[0] == high
    assert spectrum(yarn).attention_scaling == pytest.approx(0.1 * math.log(4) + 1, rel=1e-15)


def test_yarn_and_cope_commute():
    yarn = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}
    cope = {"method": "cope", "clip": 20}
    np.testing.assert_allclose(spectrum(yarn, cope).inv_freq, spectrum(cope, yarn).inv_freq, rtol=1e-15)


def test_llama3_and_hardclip_of_wavelengths():
    ratio = spectrum({"method": "llama3"}).inv_freq / spectrum().inv_freq
    periods = spectrum().periods
    assert np.all(ratio[periods < 8192 / 4] == 1)
    np.testing.assert_allclose(ratio[periods > 8192], 1 / 8, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(head_dims, thetas, factors)
def test_pi_equals_stock_linear(head_dim, theta, factor):
    s = spectrum({"method": "pi", "factor": factor}, head_dim=head_dim, theta=theta)
    close(s.inv_freq, stock(head_dim, theta, rope_type="linear", factor=factor)[0])


@settings(max_examples=60, deadline=None)
@given(head_dims, thetas, factors, lengths, st.booleans(), st.sampled_from([None, 0.5, 1.0, 1.3]), st.booleans())
def test_yarn_equals_stock(head_dim, theta, factor, length, truncate, mscale, with_attention_factor):
    arguments = {"factor": factor, "original_max_position_embeddings": length, "truncate": truncate}
    arguments |= {"mscale": mscale, "mscale_all_dim": 0.8}
    arguments |= {"attention_factor": 1.1} if with_attention_factor else {}
    s = spectrum({"method": "yarn", **arguments}, head_dim=head_dim, theta=theta)
    inv_freq, scaling = stock(head_dim, theta, rope_type="yarn", **arguments)
    np.testing.assert_allclose(s.inv_freq, inv_freq, rtol=2e-5)  # the stock ramp is float32 too
    assert s.attention_scaling == pytest.approx(scaling, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(head_dims, thetas, factors, lengths, st.floats(0.1, 30))
def test_dynamic_ntk_equals_stock(head_dim, theta, factor, length, stretch):
    present = int(length * stretch) + 1
    method = {"method": "dynamic_ntk", "factor": factor, "original_max_position_embeddings": length}
    s = spectrum(method, head_dim=head_dim, theta=theta, length=present)
    theirs, _ = stock(head_dim, theta, length, present, rope_type="dynamic", factor=factor)
    close(s.inv_freq, theirs)


@settings(max_examples=60, deadline=None)
@given(st.data(), head_dims, thetas, lengths, st.floats(0.5, 32), st.booleans(), st.sampled_from([None, 1.2]))
def test_longrope_equals_stock(data, head_dim, theta, length, stretch, is_long, attention_factor):
    lists = st.lists(st.floats(1.0, 64.0), min_size=head_dim // 2, max_size=head_dim // 2)
    short, long = data.draw(lists), data.draw(lists)
    present, longest = length + is_long, int(length * stretch) + 1
    entry = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": length}
    entry |= {"attention_factor": attention_factor}
    method = {"method": "longrope", **entry}
    s = spectrum(method, head_dim=head_dim, theta=theta, trained_length=longest, length=present)
    theirs, scaling = stock(head_dim, theta, longest, present, rope_type="longrope", **entry)
    close(s.inv_freq, theirs)
    assert s.attention_scaling == pytest.approx(scaling, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(head_dims, thetas, factors, lengths)
def test_llama3_equals_stock(head_dim, theta, factor, length):
    arguments = {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": length
    }  # fmt: skip
    s = spectrum({"method": "llama3", **arguments}, head_dim=head_dim, theta=theta)
    np.testing.assert_allclose(s.inv_freq, stock(head_dim, theta, rope_type="llama3", **arguments)[0], rtol=2e-5)


@settings(max_examples=30, deadline=None)
@given(head_dims, thetas, st.floats(0, 1))
def test_p_rope_equals_stock_proportional(head_dim, theta, fraction):
    s = spectrum({"method": "p_rope", "fraction": fraction}, head_dim=head_dim, theta=theta)
    inv_freq, _ = stock(head_dim, theta, rope_type="proportional", partial_rotary_factor=fraction)
    assert np.array_equal(s.inv_freq == 0, inv_freq == 0)
    close(s.inv_freq, inv_freq)


def test_fmrope_has_the_training_length_as_its_base():
    inputs = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}
    position = Position("fmrope", RopeChain.parse("abf(theta=trained_length)"), **inputs)
    np.testing.assert_allclose(position.spectrum().inv_freq, 2.0 ** (-np.arange(64) / 4), rtol=1e-14)
    assert position.rope_parameters(65536) == {"rope_type": "default", "rope_theta": 65536.0}
    assert position.chain == RopeChain.parse("abf(theta=65536)")  # resolved, with the hash of the number
    assert position.sha256 == Position("x", RopeChain.parse("abf(theta=65536.0)"), **inputs).sha256


def test_every_method_has_a_sample():
    assert set(SAMPLES) == set(available_methods())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), head_dims, thetas, st.integers(64, 2**17), st.integers(1, 2**21))
def test_no_method_gives_nan_infinity_or_a_negative_frequency(name, head_dim, theta, trained, length):
    s = spectrum(*chain_of(name, head_dim), head_dim=head_dim, theta=theta, trained_length=trained, length=length)
    assert s.inv_freq.shape == (head_dim // 2,)
    assert np.all(np.isfinite(s.inv_freq))
    assert np.all(s.inv_freq >= 0)
    assert math.isfinite(s.attention_scaling)
    assert s.attention_scaling > 0


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_rotation_keeps_the_norm_times_the_attention_scaling(name):
    s = spectrum(*chain_of(name), length=131072)
    rows, positions = np.random.default_rng(0).standard_normal((40, 128)), np.linspace(0, 262143, 40).round()
    angles = positions[:, None] * s.inv_freq
    cos, sin = (s.attention_scaling * f(angles) for f in (np.cos, np.sin))
    first, second = rows[:, :64], rows[:, 64:]
    rotated = np.hstack([first * cos - second * sin, second * cos + first * sin])
    assert np.linalg.norm(rotated) == pytest.approx(s.attention_scaling * np.linalg.norm(rows), rel=1e-12)
    still = s.inv_freq == 0  # an exact zero means no rotation
    np.testing.assert_array_equal(rotated[:, :64][:, still], s.attention_scaling * first[:, still])


@pytest.mark.parametrize("method", [
    {"method": "cope", "clip": 1, "taper_domain": "frequency"},
    {"method": "mrrope_pro", "factor": 1.0, "original_max_position_embeddings": 8192},
    {"method": "mrrope_uni", "factor": 1.0, "original_max_position_embeddings": 8192},
    {"method": "dynamic_ntk", "factor": 1.0, "original_max_position_embeddings": 65536},
    {"method": "hope", "rotating": 1.0}, {"method": "half_rope", "share": 1.0},
    {"method": "temperature", "exponent": 2.0},  # at the trained length
])  # fmt: skip
def test_more_identities(method):
    np.testing.assert_allclose(spectrum(method).inv_freq, spectrum().inv_freq, rtol=1e-15)
    assert spectrum(method).attention_scaling == 1.0


@pytest.mark.parametrize(("theta", "length", "clip"), [(5e5, 8192, 21), (1e7, 65536, 20), (1e6, 32768, 18)])
def test_auto_is_the_papers_rule(theta, length, clip):
    rope = spectrum(theta=theta, trained_length=length)
    assert recommended_clip(rope) == clip
    automatic = spectrum({"method": "cope", "clip": "auto"}, theta=theta, trained_length=length)
    np.testing.assert_allclose(automatic.inv_freq, rope.scale_lowest(raised_cosine_of(clip)).inv_freq, rtol=1e-12)


def raised_cosine_of(clip):
    weights = np.sin(np.linspace(np.pi / 2, 0, clip)) ** 2  # (1 + cos 2x) / 2 = cos^2 x
    weights[-1] = 0.0
    return weights


def test_high_frequency_turns_its_slowest_pair_once():
    s = spectrum({"method": "high_frequency"})
    assert s.periods[-1] == pytest.approx(65536, rel=1e-12)
    assert s.periods[0] == pytest.approx(2 * math.pi, rel=1e-12)
    assert np.ptp(np.diff(np.log(s.periods))) < 1e-12
    assert spectrum({"method": "high_frequency", "length": 4096}).periods[-1] == pytest.approx(4096, rel=1e-12)


def test_half_rope_is_partial_rotary():
    config = GPTNeoXConfig(hidden_size=512, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    theirs = GPTNeoXRotaryEmbedding(config).inv_freq.double().numpy()
    s = spectrum({"method": "half_rope"})
    close(s.inv_freq[:32], theirs)
    assert np.all(s.inv_freq[32:] == 0)


def test_rope_id_is_geometric_between_its_periods():
    s = spectrum({"method": "rope_id"}, trained_length=4096)
    assert s.periods[0] == pytest.approx(32, rel=1e-12)
    assert s.periods[31] == pytest.approx(2048, rel=1e-12)  # the table of the paper names 2,048 for 4,096 tokens
    assert np.ptp(np.diff(np.log(s.inv_freq[:32]))) < 1e-12
    assert np.all(s.inv_freq[32:] == 0)
    quarter = spectrum({"method": "rope_id", "share": 0.25, "shortest_period": 16, "longest_period": 4096})
    assert np.flatnonzero(quarter.inv_freq).tolist() == list(range(16))
    np.testing.assert_allclose(quarter.periods[[0, 15]], [16, 4096], rtol=1e-12)


@pytest.mark.parametrize(("length", "exponent"), [(1024, 2.0), (4096, 2.0), (16384, 2.0), (65536, 3.0), (65536, 0.0)])
def test_rope_id_temperature_multiplies_logits(length, exponent):
    method = {"method": "rope_id", "temperature_exponent": exponent}
    s = spectrum(method, trained_length=4096, length=length)
    temperature = (0.1 * math.log(max(length / 4096, 1)) + 1) ** exponent
    assert s.attention_scaling**2 == pytest.approx(temperature, rel=1e-12)  # cos and sin of query and of key


def test_rope_id_yarn_keeps_the_fastest_and_divides_the_slowest():
    base = spectrum({"method": "rope_id"}, trained_length=4096).inv_freq[:32]
    s = spectrum({"method": "rope_id"}, {"method": "rope_id_yarn", "factor": 8.0}, trained_length=4096)
    ratio = s.inv_freq[:32] / base
    np.testing.assert_allclose(ratio, np.linspace(1, 1 / 8, 32), rtol=1e-12)
    assert np.all(s.inv_freq[32:] == 0)


def test_hope_stops_what_never_turns():
    s = spectrum({"method": "hope", "length": 8192})
    assert np.array_equal(s.inv_freq, spectrum({"method": "hardclip", "clip": 29}).inv_freq)
    assert np.flatnonzero(spectrum({"method": "hope", "rotating": 0.8}).inv_freq).tolist() == list(range(51))
    assert np.array_equal(spectrum({"method": "hope"}, trained_length=8192).inv_freq, s.inv_freq)


def test_hopes_half_at_1b_fits_base_5e5_at_4096_tokens_and_80_channels():
    """20 of the 40 pairs of base 5e5 finish a turn in 4,096 tokens: those up to 40 log_b(4096 / 2 pi) = 19.75."""
    facts = {"head_dim": 80, "theta": 5e5, "trained_length": 4096}
    by_length, by_share = spectrum({"method": "hope"}, **facts), spectrum({"method": "hope", "rotating": 0.5}, **facts)
    assert int(40 * math.log(4096 / (2 * math.pi), 5e5)) == 19
    assert np.flatnonzero(by_length.inv_freq).tolist() == list(range(20))
    assert np.array_equal(by_length.inv_freq, by_share.inv_freq)


def test_temperature_replaces_that_of_rope_id_alone():
    with_it = spectrum({"method": "rope_id"}, trained_length=4096, length=16384)
    without = spectrum(
        {"method": "rope_id"}, {"method": "temperature", "exponent": 0.0}, trained_length=4096, length=16384
    )
    assert with_it.attention_scaling == pytest.approx(0.1 * math.log(4) + 1, rel=1e-12)
    assert without.attention_scaling == 1.0
    assert np.array_equal(without.inv_freq, with_it.inv_freq)
    cubed = spectrum(
        {"method": "rope_id"}, {"method": "temperature", "exponent": 3.0}, trained_length=4096, length=16384
    )
    assert cubed.attention_scaling**2 == pytest.approx((0.1 * math.log(4) + 1) ** 3, rel=1e-12)


def test_resonance_periods_are_whole():
    s, rope = spectrum({"method": "resonance"}), spectrum()
    np.testing.assert_allclose(s.periods, np.round(s.periods), rtol=1e-12)
    assert np.abs(s.periods - rope.periods).max() <= 0.5 + 1e-6
    assert s.periods[:3].round().tolist() == [6, 8, 9]  # 2 pi, 2 pi 1.2275.., 2 pi 1.5069..
    clipped = spectrum({"method": "hardclip", "clip": 5}, {"method": "resonance"})
    assert np.all(clipped.inv_freq[-5:] == 0)
    assert np.all(clipped.inv_freq[:-5] > 0)


@pytest.mark.parametrize("progressive", [True, False])
def test_mrrope_as_written_pair_by_pair(progressive):
    length, factor = 8192, 8.0
    theta = [5e5 ** (-2 * i / 128) for i in range(64)]
    turns = [length * t / (2 * math.pi) for t in theta]
    last = max(i for i in range(64) if turns[i] > 32)
    first = min(i for i in range(64) if turns[i] < 1)
    n = first - last
    expected = []
    for i in range(64):
        q = min(max(i - last, 0), n)
        p = q * (q + 1) / (n * (n + 1)) if progressive else q / n
        expected.append(theta[i] * factor**-p)
    name = "mrrope_pro" if progressive else "mrrope_uni"
    s = spectrum({"method": name, "factor": factor, "original_max_position_embeddings": length})
    np.testing.assert_allclose(s.inv_freq, expected, rtol=1e-12)
    assert s.attention_scaling == pytest.approx(0.1 * math.log(8) + 1, rel=1e-15)


@pytest.mark.parametrize("window", ["raised_cosine", "quarter_cosine", "blackman", "kaiser", "linear"])
def test_yarn_and_cope_commute_with_every_window(window):
    yarn = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}
    cope = {"method": "cope", "clip": 20, "window": window}
    np.testing.assert_allclose(spectrum(yarn, cope).inv_freq, spectrum(cope, yarn).inv_freq, rtol=1e-15)


@pytest.mark.parametrize(("method", "message"), [
    ({"method": "cope", "clip": 65}, r"clip=65 is not within the 64 pairs of head_dim=128 that rotate; use 0\.\.64"),
    ({"method": "hardclip", "clip": -1}, "clip=-1"),
    ({"method": "hardclip", "clip": "trained_length"}, "clip='trained_length' must be one of int, auto"),
    ({"method": "pi", "factor": 0.5}, r"factor=0\.5 must be 1 or more"),
    ({"method": "abf", "theta": 1.0}, r"theta=1\.0 must be above 1"),
    ({"method": "abf", "theta": -1e4}, r"theta=-10000\.0 must be above 1"),
    ({"method": "p_rope", "fraction": 1.5}, r"fraction=1\.5 must lie between 0 and 1"),
    ({"method": "llama3", "high_freq_factor": 1.0}, "must exceed low_freq_factor"),
    ({"method": "yarn", "factor": 4, "original_max_position_embeddings": 0}, "embeddings=0 must be 1"),
    ({"method": "yarn", "factor": 4, "original_max_position_embeddings": 8, "beta_slow": 40}, "fast >= slow > 0"),
    ({"method": "yarn", "factor": 4, "original_max_position_embeddings": 8, "attention_factor": 0}, "must be positive"),
    ({"method": "longrope", "short_factor": [1.0] * 63, "long_factor": [1.0] * 64,
      "original_max_position_embeddings": 8}, "short_factor has 63 numbers.*each of the 64 pairs"),
    ({"method": "longrope", "short_factor": [1.0] * 64, "long_factor": [0.0] * 64,
      "original_max_position_embeddings": 8}, "long_factor has 64 numbers, the least 0"),
    ({"method": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 64, "factor": 0.5,
      "original_max_position_embeddings": 8}, r"longrope: factor=0\.5 must be 1 or more"),
    ({"method": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0] * 64, "attention_factor": -1,
      "original_max_position_embeddings": 8}, r"attention_factor=-1\.0 must be positive"),
    ({"method": "yarn", "factor": 4, "original_max_position_embeddings": 8, "mscale": -1, "mscale_all_dim": 1},
     r"mscale=-1\.0 and mscale_all_dim=1\.0 must be positive"),
    ({"method": "half_rope", "share": 0.0}, r"share=0\.0 of 64 pairs"),
    ({"method": "rope_id", "share": 0.001}, r"share=0\.001 of 64 pairs must .* hold a whole pair"),
    ({"method": "rope_id", "shortest_period": 100, "longest_period": 50}, r"shortest_period=100\.0 must be positive"),
    ({"method": "rope_id", "temperature_exponent": -1}, r"temperature_exponent=-1\.0 must be 0"),
    ({"method": "high_frequency", "length": 6}, "length=6 must be 7 tokens or more"),
    ({"method": "hope", "rotating": 2}, r"rotating=2\.0 must lie between 0 and 1"),
    ({"method": "temperature", "exponent": -1}, r"temperature: exponent=-1\.0 must be 0"),
    ({"method": "temperature", "exponent": 1, "trained_length": 0}, "temperature: trained_length=0 must be 1 token"),
])  # fmt: skip
def test_values_out_of_range_are_named(method, message):
    with pytest.raises(ValueError, match=message):
        spectrum(method)


def test_rope_id_yarn_stretches_rope_id_alone():
    with pytest.raises(ValueError, match="put rope_id before it, or use yarn"):
        spectrum({"method": "rope_id_yarn", "factor": 2})
    for name in ("ntk", "yarn", "ntk_by_parts", "dynamic_ntk"):
        with pytest.raises(ValueError, match=r"the pairs it finds follow no base.*use rope_id_yarn"):
            spectrum({"method": "rope_id"}, *chain_of(name))


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 64).map(lambda n: 4 * n), thetas, factors, lengths, st.booleans())
def test_yarn_of_half_a_head_equals_stock_partial_rotary(head_dim, theta, factor, length, truncate):
    arguments = {"factor": factor, "original_max_position_embeddings": length, "truncate": truncate}
    s = spectrum({"method": "half_rope"}, {"method": "yarn", **arguments}, head_dim=head_dim, theta=theta)
    theirs, scaling = stock(head_dim, theta, rope_type="yarn", partial_rotary_factor=0.5, **arguments)
    rotated = head_dim // 4
    assert not s.inv_freq[rotated:].any()
    np.testing.assert_allclose(s.inv_freq[:rotated], theirs[:rotated], rtol=2e-5)
    assert s.attention_scaling == pytest.approx(scaling, rel=1e-12)


def test_ntk_of_half_a_head_is_a_new_base_of_that_half():
    scaled = spectrum({"method": "half_rope"}, {"method": "ntk", "factor": 8.0})
    rebased = spectrum({"method": "abf", "theta": 5e5 * 8.0 ** (64 / 62)}, {"method": "half_rope"})
    np.testing.assert_allclose(scaled.inv_freq, rebased.inv_freq, rtol=1e-12)


@pytest.mark.parametrize("layout", ["half_rope", "rope_id", "p_rope", "hope"])
def test_clips_count_from_the_slowest_pair_that_rotates(layout):
    before = spectrum(*chain_of(layout))
    last = int(np.count_nonzero(before.inv_freq))
    assert before.rotating_pairs == last < 64
    hard = spectrum(*chain_of(layout), {"method": "hardclip", "clip": 5})
    assert np.array_equal(np.flatnonzero(hard.inv_freq), np.arange(last - 5))
    soft = spectrum(*chain_of(layout), {"method": "cope", "clip": 5})
    np.testing.assert_allclose(
        soft.inv_freq[last - 5 : last], before.inv_freq[last - 5 : last] * raised_cosine_of(5), rtol=1e-12
    )
    with pytest.raises(ValueError, match=f"clip={last + 1} is not within the {last} pairs of head_dim=128 that rotate"):
        spectrum(*chain_of(layout), {"method": "cope", "clip": last + 1})


def test_stopped_pairs_are_not_beyond_a_length():
    assert spectrum({"method": "hardclip", "clip": 20}).pairs_beyond(8192) == 9  # of 29
    half = spectrum({"method": "half_rope"})
    turning = [5e5 ** (-2 * i / 64) for i in range(32)]
    assert half.pairs_beyond(8192) == sum(2 * math.pi / f > 8192 for f in turning)


@settings(max_examples=30, deadline=None)
@given(head_dims, thetas)
def test_plain_rope_equals_stock_default(head_dim, theta):
    config = LlamaConfig(head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    theirs, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(config, device=torch.device("cpu"))
    close(spectrum(head_dim=head_dim, theta=theta).inv_freq, theirs.double().numpy())
    assert scaling == 1.0


@settings(max_examples=30, deadline=None)
@given(head_dims, thetas, st.floats(0, 1), factors)
def test_p_rope_then_pi_equals_stock_proportional_with_a_factor(head_dim, theta, fraction, factor):
    slower = {"method": "pi", "factor": factor}
    s = spectrum({"method": "p_rope", "fraction": fraction}, slower, head_dim=head_dim, theta=theta)
    entry = {"rope_type": "proportional", "partial_rotary_factor": fraction, "factor": factor}
    inv_freq, _ = stock(head_dim, theta, **entry)
    assert np.array_equal(s.inv_freq == 0, inv_freq == 0)
    close(s.inv_freq, inv_freq)


tokens = st.integers(8, 2**20)
shares = st.floats(0.05, 1.0)
windows = st.sampled_from(["raised_cosine", "quarter_cosine", "blackman", "kaiser", "linear"])
STRETCH = {"factor": factors, "original_max_position_embeddings": tokens}
BETAS = {"beta_fast": st.floats(8, 64), "beta_slow": st.floats(0.1, 8), "truncate": st.booleans()}
ARGUMENTS = {  # of every method, over its whole range
    "abf": {"theta": st.floats(1.1, 1e12) | st.just("trained_length")},
    "pi": STRETCH,
    "ntk": STRETCH,
    "dynamic_ntk": STRETCH,
    "ntk_by_parts": {**STRETCH, **BETAS},
    "yarn": {**STRETCH, **BETAS, "mscale": st.floats(0, 4), "mscale_all_dim": st.floats(0, 4)},
    "llama3": {**STRETCH, "low_freq_factor": st.floats(0.1, 4), "high_freq_factor": st.floats(4.1, 64)},
    "mrrope_pro": STRETCH,
    "mrrope_uni": STRETCH,
    "cope": {"clip": st.integers(0, 64), "window": windows, "taper_domain": st.sampled_from(["index", "frequency"])},
    "hardclip": {"clip": st.integers(0, 64)},
    "p_rope": {"fraction": st.floats(0, 1)},
    "hope": {"length": tokens, "rotating": st.none() | st.floats(0, 1)},
    "resonance": {},
    "temperature": {"exponent": st.floats(0, 4), "trained_length": tokens},
    "high_frequency": {"length": tokens},
    "half_rope": {"share": shares},
    "rope_id": {"share": shares, "shortest_period": st.floats(1, 64), "longest_period": st.floats(64, 1e6),
                "temperature_exponent": st.floats(0, 4), "trained_length": tokens},
    "longrope": {"short_factor": st.lists(st.floats(0.1, 64), min_size=64, max_size=64),
                 "long_factor": st.lists(st.floats(0.1, 1e38), min_size=64, max_size=64),
                 "original_max_position_embeddings": tokens, "factor": st.none() | factors},
    "rope_id_yarn": STRETCH,
    "axes": {"layout": st.sampled_from(["bands", "alternating"]), "positions": st.just("diagonal"),
             "temporal_scales": st.lists(st.floats(0.1, 4), min_size=1, max_size=4)},
    "nope_layers": {"every": st.integers(1, 100)},
    "log_temperature": {"beta": st.floats(0, 4), "length": tokens},
    "learned": {"alpha": st.lists(st.floats(-50, 50), min_size=64, max_size=64)},
}  # fmt: skip


@pytest.mark.parametrize("name", available_methods())
def test_no_argument_in_range_gives_nan_infinity_or_a_negative_frequency(name):
    before = chain_of(name)[:-1]

    @settings(max_examples=25, deadline=None)
    @given(st.fixed_dictionaries(ARGUMENTS[name]), tokens)
    def holds(arguments, length):
        s = spectrum(*before, {"method": name, **arguments}, length=length)
        assert np.all(np.isfinite(s.inv_freq))
        assert np.all(s.inv_freq >= 0)
        assert math.isfinite(s.attention_scaling)
        assert s.attention_scaling > 0

    holds()


@pytest.mark.parametrize(("name", "text", "message"), [
    ("no_import", "def f(s, *, length: Tokens): ...", r"no_import\.py, line 1: NameError: name 'Tokens'"),
    ("bad_syntax", "x = 1\ndef f(:\n", r"bad_syntax\.py, line 2: SyntaxError"),
    ("moved", "\nfrom ropewalk.rope.order import stretched\n", r"moved\.py, line 2: ModuleNotFound.*stretched"),
    ("bare", "from ropewalk.rope import register_method\n\n\n@register_method('bare')\ndef f(s, *, length): ...\n",
     r"bare\.py, line 4: ValueError: bare: parameter length must be annotated"),
])  # fmt: skip
def test_a_mistake_in_a_method_s_file_is_one_line(tmp_path, monkeypatch, name, text, message):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message):
        import_methods([str(tmp_path)], "")
