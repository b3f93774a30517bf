"""Methods against closed forms, and against transformers' own functions where it has the method."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.rope import RopeChain

LLAMA3 = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}

head_dims = st.sampled_from([32, 48, 64, 80, 96, 128, 256])
thetas = st.floats(1e4, 1e9)
factors = st.floats(1.0, 64.0)
lengths = st.sampled_from([512, 2048, 8192, 32768, 131072])


def spectrum(*methods, **inputs):
    return RopeChain(list(methods)).spectrum(**{**LLAMA3, **inputs})


def stock(head_dim, theta, **entry):
    config = LlamaConfig(head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4)
    config.rope_parameters = {"rope_theta": theta, **entry}
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[entry["rope_type"]](config, device=torch.device("cpu"))
    return inv_freq.double().numpy(), scaling


def close(ours, theirs):
    # float32: a few roundings, and that of the exponent times ln(theta) where head_dim is no power of two
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
@given(head_dims, thetas, factors, lengths, st.booleans())
def test_yarn_equals_stock(head_dim, theta, factor, length, truncate):
    arguments = {"factor": factor, "original_max_position_embeddings": length, "truncate": truncate}
    s = spectrum({"method": "yarn", **arguments}, head_dim=head_dim, theta=theta)
    inv_freq, scaling = stock(head_dim, theta, rope_type="yarn", **arguments)
    np.testing.assert_allclose(s.inv_freq, inv_freq, rtol=2e-5)  # the stock ramp is float32 too
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


@pytest.mark.parametrize(("method", "message"), [
    ({"method": "cope", "clip": 65}, r"clip=65 is not within the 64 pairs of head_dim=128; use 0\.\.64"),
    ({"method": "hardclip", "clip": -1}, "clip=-1"),
    ({"method": "pi", "factor": 0.5}, r"factor=0\.5 must be 1 or more"),
    ({"method": "abf", "theta": 1.0}, r"theta=1\.0 must be above 1"),
    ({"method": "p_rope", "fraction": 1.5}, r"fraction=1\.5 must lie between 0 and 1"),
    ({"method": "llama3", "high_freq_factor": 1.0}, "must exceed low_freq_factor"),
])  # fmt: skip
def test_values_out_of_range_are_named(method, message):
    with pytest.raises(ValueError, match=message):
        spectrum(method)
