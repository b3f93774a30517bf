"""Chains: order, validation, hash, and the caller's own vectors."""

import numpy as np
import pytest
import torch
import yaml

from ropewalk.rope import RopeChain, Spectrum, available_methods, register_method
from ropewalk.rope.registry import _METHODS

COPE = [{"method": "abf", "theta": 1e7}, {"method": "cope", "clip": 20}]
INPUTS = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}


def test_prints_as_it_reads():
    yarn = {"method": "yarn", "factor": 4, "original_max_position_embeddings": 65536}
    assert str(RopeChain(COPE)) == "abf(theta=1e7) > cope(clip=20)"
    assert str(RopeChain([*COPE, yarn])).endswith("> yarn(factor=4, original_max_position_embeddings=65536)")
    assert str(RopeChain([])) == "rope"


def test_hash_is_of_the_meaning_not_the_spelling():
    spelled = [{"theta": 10_000_000, "method": "abf"}, {"method": "cope", "clip": 20.0}]
    assert RopeChain(spelled).sha256 == RopeChain(COPE).sha256
    assert RopeChain(yaml.safe_load(yaml.safe_dump(RopeChain(COPE).to_list()))) == RopeChain(COPE)
    assert RopeChain([COPE[0], {"method": "cope", "clip": 21}]).sha256 != RopeChain(COPE).sha256
    assert RopeChain(COPE[::1]).sha256 != RopeChain([COPE[0]]).sha256


def test_order_matters_where_it_should():
    llama3, cope = {"method": "llama3"}, {"method": "cope", "clip": 40}
    first = RopeChain([llama3, cope]).spectrum(**INPUTS).inv_freq
    second = RopeChain([cope, llama3]).spectrum(**INPUTS).inv_freq
    assert not np.allclose(first, second, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("methods", "message"), [
    ([{"method": "copes"}], "'copes' is not known; use one of: abf,"),
    ([{"clip": 20}], "names no method"),
    ([{"method": "cope", "clap": 20}], "clap=20 is not an argument; it takes: clip"),
    ([{"method": "cope"}], "clip is not given and has no default"),
    ([{"method": "cope", "clip": "many"}], "clip='many' must be int"),
    ([{"method": "cope", "clip": 2.5}], r"clip=2\.5 must be int"),
    ([{"method": "cope", "clip": True}], "clip=True must be int"),
    ([{"method": "yarn", "factor": 4}], "original_max_position_embeddings is not given and has no default"),
    ([COPE[1], COPE[0]], "abf stands at place 2"),
])  # fmt: skip
def test_bad_chains_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        RopeChain(methods)


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="head_dim=63 must be positive and even"):
        RopeChain([]).spectrum(**{**INPUTS, "head_dim": 63})


def test_spectrum_refuses_what_is_no_spectrum():
    for bad in ([[1.0]], [np.nan], [-1.0], [np.inf]):
        with pytest.raises(ValueError, match="finite, non-negative"):
            Spectrum(np.array(bad), 1e4, 1, 1)


def test_apply_to_a_callers_vector():
    chain = RopeChain([{"method": "cope", "clip": 20}])
    expected = RopeChain(COPE).spectrum(**INPUTS).inv_freq
    own = 1e7 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(chain.apply(own), expected, rtol=1e-12)
    torched = chain.apply(torch.tensor(own, dtype=torch.float32))
    assert torched.dtype == torch.float32
    np.testing.assert_allclose(torched.numpy(), expected, rtol=1e-6)
    yarn = RopeChain([{"method": "yarn", "factor": 4, "original_max_position_embeddings": 65536}])
    whole = RopeChain([COPE[0], *yarn.to_list()]).spectrum(**INPUTS).inv_freq
    np.testing.assert_allclose(yarn.apply(own), whole, rtol=1e-9)


def test_a_method_is_one_function():
    @register_method("halved")
    def halved(spectrum: Spectrum, *, times: int = 1) -> Spectrum:
        return spectrum.scaled(0.5**times)

    try:
        assert "halved" in available_methods()
        s = RopeChain([{"method": "halved", "times": 2}]).spectrum(**INPUTS)
        assert s.inv_freq[0] == 0.25
        with pytest.raises(ValueError, match="registered already"):
            register_method("halved")(halved)
    finally:
        del _METHODS["halved"]
