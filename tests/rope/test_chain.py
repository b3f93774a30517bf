"""Chains: order, validation, text, hash, and the calls that put a chain on a model or a vector."""

import copy
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from rope_samples import chain_of

from ropewalk.rope import Position, RopeChain, Spectrum, available_methods, register_method
from ropewalk.rope.registry import _METHODS, Tokens, get_method

COPE = [{"method": "abf", "theta": 1e7}, {"method": "cope", "clip": 20}]
YARN8 = {"method": "yarn", "factor": 8, "original_max_position_embeddings": 8192}
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
    assert RopeChain(COPE).sha256 != RopeChain([COPE[0]]).sha256
    numpys = [{"method": "abf", "theta": np.float32(1e7)}, {"method": "cope", "clip": np.int64(20)}]
    assert RopeChain(numpys).sha256 == RopeChain(COPE).sha256
    lists = {"method": "longrope", "original_max_position_embeddings": 8, "long_factor": np.arange(1, 3)}
    by_yaml = OmegaConf.create({**lists, "short_factor": [1, 2.5], "long_factor": [1, 2]})
    plain = {**lists, "short_factor": [1.0, 2.5]}
    assert RopeChain([by_yaml]) == RopeChain([plain])


def test_the_canonical_form_is_a_copy():
    chain = RopeChain([{**LONGROPE, "original_max_position_embeddings": 8192}])
    chain.to_list()[0]["short_factor"][0] = 99.0
    assert chain.to_list()[0]["short_factor"][0] == 1.0


@pytest.mark.parametrize(("own", "chain", "expected"), [
    ("llama3()", "cope(clip=20)", "llama3() > cope(clip=20)"), ("llama3()", "rope", "llama3()"),
    ("llama3()", "abf(theta=1e7) > cope(clip=20)", "abf(theta=1e7) > cope(clip=20)"),
    ("rope", "cope(clip=20)", "cope(clip=20)"), ("cope(clip=20)", "rope_id()", "rope_id()"),
])  # fmt: skip
def test_a_chain_follows_a_models_own_or_replaces_it(own, chain, expected):
    assert str(RopeChain.parse(chain).after(RopeChain.parse(own))) == expected


def test_order_matters_where_it_should():
    llama3, cope = {"method": "llama3"}, {"method": "cope", "clip": 40}
    first = RopeChain([llama3, cope]).spectrum(**INPUTS).inv_freq
    second = RopeChain([cope, llama3]).spectrum(**INPUTS).inv_freq
    assert not np.allclose(first, second, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("methods", "message"), [
    ([{"method": "copes"}], "'copes' is not known; did you mean cope\? There are: abf,"),
    ([{"method": "xyz"}], "'xyz' is not known; use one of: abf,"),
    ([{"clip": 20}], "names no method"),
    ([{"method": "cope", "clap": 20}], "clap=20 is not an argument; it takes: clip"),
    ([{"method": "cope"}], "clip is not given and has no default"),
    ([{"method": "cope", "clip": "many"}], "clip='many' must be one of int, auto"),
    ([{"method": "cope", "clip": 2.5}], r"clip=2\.5 must be one of int, auto"),
    ([{"method": "cope", "clip": True}], "clip=True must be one of int, auto"),
    ([{"method": "yarn", "factor": 4}], "original_max_position_embeddings is not given and has no default"),
    ([{"method": "pi", "factor": "auto"}], "factor='auto' must be float"),
    ([{"method": "pi", "factor": float("nan")}], "factor=nan must be float"),
    ([{"method": "cope", "clip": 2, "window": "hann"}], "window='hann' must be one of raised_cosine, quarter_cosine"),
    ([{"method": "longrope", "short_factor": 1, "long_factor": [1], "original_max_position_embeddings": 8}],
     r"short_factor=1 must be list\[float\]"),
    ([{"method": "abf", "theta": "1e7"}], r"theta='1e7' must be one of float.*; it is text, write 1\.0e7"),
    ([{"method": "abf", "theta": 10**400}], r"theta=1000.*\(401 characters\) must be one of float"),
    ([{"method": "cope", "clip": "pretrained_length"}], "clip='pretrained_length' must be one of int, auto"),
    ([{"method": "longrope", "short_factor": "12", "long_factor": [1], "original_max_position_embeddings": 8}],
     r"short_factor='12' must be list\[float\]"),
    ([{"method": "resonance", "period": 1}], "period=1 is not an argument; it takes: nothing"),
    ([COPE[1], COPE[0]], "abf stands at place 2.*: put it first"),
    ([COPE[1], {"method": "rope_id"}], "rope_id stands at place 2.* put it first"),
    ([COPE[1], {"method": "half_rope"}], "half_rope stands at place 2.* put it first, or right after abf"),
    ([COPE[0], {"method": "rope_id"}], "rope_id stands at place 2"),  # it reads no base
    ([COPE[0], {"method": "high_frequency"}], "high_frequency stands at place 2"),
    ([*COPE, {"method": "hardclip", "clip": 5}], r"hardclip\(clip=5\) follows cope\(clip=20\), and a chain clips once"),
    ([{"method": "half_rope"}, {"method": "rope_id"}], "rope_id stands at place 2"),
])  # fmt: skip
def test_bad_chains_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        RopeChain(methods)


LINEAR8 = {"method": "pi", "factor": 8}
LONGROPE = {"method": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


@pytest.mark.parametrize(("methods", "message"), [
    ([YARN8, {"method": "llama3"}], r"to 65,536 tokens, and llama3\(\) starts from 8,192 again"),
    ([YARN8, {**YARN8, "original_max_position_embeddings": 65535}], "set original_max_position_embeddings=65536"),
    # pi names no length: it starts from the pretrained one
    ([LINEAR8, YARN8], r"pi\(factor=8, .*=8192\) already stretches the model to 65,536 tokens"),
    # longrope without a factor reaches the trained length, and dynamic_ntk follows the input at least that far
    ([{**LONGROPE, "original_max_position_embeddings": 8192}, YARN8], "already stretches the model to 65,536 tokens"),
    ([{"method": "dynamic_ntk", "factor": 1, "original_max_position_embeddings": 8192}, YARN8], "to 65,536 tokens"),
])  # fmt: skip
def test_scalings_that_contradict_are_refused(methods, message):
    with pytest.raises(ValueError, match=message):
        RopeChain(methods).spectrum(**INPUTS)


SCALINGS = sorted(name for name in available_methods() if get_method(name).scaling)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_model_is_stretched_again_in_later_stages(name):
    """8,192 -> 65,536 -> 131,072 -> 262,144: what one stage reached is where the next may start, and never before."""
    position = Position("model", RopeChain(chain_of(name)), 5e5, 128, 8192, 65536)
    for length in (65536, 131072):
        again = {"method": "yarn", "factor": 2.0, "original_max_position_embeddings": length}
        next_stage = Position("next", position.chain, 5e5, 128, length, 2 * length)
        if name in ("dynamic_ntk", "rope_id_yarn"):  # one follows the input itself, the other's pairs follow no base
            with pytest.raises(ValueError, match=r"already stretches|follow no base"):
                next_stage.extended([again])
            return
        with pytest.raises(ValueError, match="already stretches"):
            next_stage.extended([{**again, "original_max_position_embeddings": length - 1}])
        position = next_stage.extended([again])
        assert len(position.chain.steps) == len(RopeChain(chain_of(name)).steps) + length // 65536
        assert position.chain == RopeChain(position.chain.to_list())


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


def test_apply_asks_for_the_lengths_that_the_chain_refers_to():
    own = 1e7 ** (-np.arange(64) / 64)
    auto = RopeChain.parse("hardclip(clip=auto)")
    with pytest.raises(ValueError, match="refers to trained_length, which is not given; pass trained_length=TOKENS"):
        auto.apply(own)
    assert np.count_nonzero(auto.apply(own, trained_length=65536)) == 44
    with pytest.raises(ValueError, match="refers to pretrained_length"):
        RopeChain.parse("yarn(factor=4, original_max_position_embeddings=pretrained_length)").apply(own)
    np.testing.assert_allclose(RopeChain.parse("pi(factor=8)").apply(own), own / 8, rtol=1e-15)
    dynamic = RopeChain.parse("dynamic_ntk(factor=1, original_max_position_embeddings=8192)")
    with pytest.raises(ValueError, match="refers to trained_length"):
        dynamic.apply(own)
    at_length = dynamic.apply(own, length=65536, trained_length=65536)
    np.testing.assert_allclose(at_length, (1e7 * 8 ** (128 / 126)) ** (-np.arange(64) / 64), rtol=1e-12)


def test_words_resolve_at_the_trained_length_whatever_the_input():
    chain = RopeChain.parse("dynamic_ntk(factor=1, original_max_position_embeddings=8192) > cope(clip=auto)")
    resolved = Position("dynamic", chain, **INPUTS).chain
    for length in (8192, 65536, 1_000_000):
        spectrum = chain.spectrum(**INPUTS, length=length)
        assert spectrum == resolved.spectrum(**INPUTS, length=length)
        assert np.count_nonzero(spectrum.inv_freq) == 63  # one clip at every length, so one pair is stopped
    assert resolved.spectrum(**INPUTS, length=8192) != resolved.spectrum(**INPUTS, length=65536)


def test_spectra_compare_by_value():
    one, same = (RopeChain(COPE).spectrum(**INPUTS) for _ in range(2))
    assert one == same == copy.deepcopy(one)
    assert len({one, same, RopeChain([]).spectrum(**INPUTS)}) == 2
    assert one != RopeChain(COPE).spectrum(**{**INPUTS, "trained_length": 32768})


def _positional(spectrum: Spectrum, times: int) -> Spectrum: ...
def _unannotated(spectrum, *, times) -> Spectrum: ...
def _of_text(spectrum: Spectrum, *, times: str) -> Spectrum: ...
def _whole(spectrum: Spectrum, *, times: Tokens | None = None, kind: Literal["a"] = "a") -> Spectrum: ...


@pytest.mark.parametrize(("name", "function", "options", "message"), [
    ("cope", _whole, {}, "registered already"), ("my method", _whole, {}, "letters, digits and _, and not rope"),
    ("rope", _whole, {}, "and not rope"), ("m", _positional, {}, "times: int must be keyword-only"),
    ("m", _unannotated, {}, "parameter times must be annotated int, float"),
    ("m", _of_text, {}, "times: str must be annotated int, float"),
    ("m", _whole, {"auto": {"clip": int}}, "auto has a rule for clip, which is not a parameter"),
    ("m", _whole, {"clips": True}, "a method with clips takes clip"),
    ("m", _whole, {"reaches": max}, "takes original_max_position_embeddings"),
])  # fmt: skip
def test_registration_is_checked(name, function, options, message):
    with pytest.raises(ValueError, match=message):
        register_method(name, **options)(function)
    assert "m" not in available_methods()


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


def test_scalings_may_follow_each_other():
    again = {**YARN8, "factor": 4, "original_max_position_embeddings": 65536}
    stretched = RopeChain([YARN8, again]).spectrum(**INPUTS)
    assert stretched.periods[-1] == pytest.approx(32 * RopeChain([]).spectrum(**INPUTS).periods[-1], rel=1e-12)
    twice = RopeChain(
        [{"method": "pi", "factor": 2}, {"method": "pi", "factor": 4, "original_max_position_embeddings": 16384}]
    ).spectrum(**INPUTS)
    once = RopeChain([{"method": "pi", "factor": 8}]).spectrum(**INPUTS)
    np.testing.assert_allclose(twice.inv_freq, once.inv_freq, rtol=1e-15)


@pytest.mark.parametrize("text", [
    "rope", "abf(theta=1e7) > cope(clip=20)", "cope(clip=auto, window=kaiser)", "pi(factor=1.3333333333333333)",
    "abf(theta=1234567.5) > yarn(factor=4, original_max_position_embeddings=65536, truncate=False)", "resonance()",
    "rope_id(share=0.25, longest_period=2048) > rope_id_yarn(factor=8)", "abf(theta=12345678)",
    "longrope(short_factor=[1, 1.5], long_factor=[2, 3], original_max_position_embeddings=trained_length)",
])  # fmt: skip
def test_text_round_trip(text):
    assert str(RopeChain.parse(text)) == text
    assert RopeChain.parse(text) == RopeChain(RopeChain.parse(text).to_list())


def test_a_list_printed_short_is_not_read_back_as_anything():
    short, long = [1.0] * 63 + [1e38], [1.5] * 64
    method = {"method": "longrope", "short_factor": short, "long_factor": long}
    chain = RopeChain([{**method, "original_max_position_embeddings": 8}])
    printed = "longrope(short_factor=[64 numbers], long_factor=[64 numbers], original_max_position_embeddings=8)"
    assert str(chain) == printed
    with pytest.raises(ValueError, match=r"\[64 numbers\] in the chain .* was shortened when printed; .*to_list\(\)"):
        RopeChain.parse(printed)
    whole = f"longrope(short_factor={short}, long_factor={long}, original_max_position_embeddings=8)"
    assert RopeChain.parse(whole) == RopeChain(yaml.safe_load(yaml.safe_dump(chain.to_list()))) == chain


@pytest.mark.parametrize(("text", "message"), [
    ("abf(1e7)", r"'abf\(1e7\)' in the chain 'abf\(1e7\)' is not a method; write NAME\(argument=value"),
    ("abf(theta=1e7", "is not a method"), ("abf(theta=1e7) cope()", "is not a method"),
    ("cope(clip=2, clip=3)", "gives clip twice; keep one"), ("cope(method=abf)", "gives method twice"),
    ("cope(clip=2*3)", r"2 \* 3 is not a value"),
    ("__import__('os').getcwd()", "is not a method"), ("pi(factor=open('x'))", r"open\('x'\) is not a value"),
])  # fmt: skip
def test_text_is_data_not_code(text, message):
    with pytest.raises(ValueError, match=message):
        RopeChain.parse(text)


@pytest.mark.parametrize(("inputs", "message"), [
    ({"head_dim": 127}, "head_dim=127 must be positive and even"), ({"head_dim": 0}, "head_dim=0"),
    ({"theta": 0.0}, r"theta=0\.0 must be a number above 1"), ({"theta": -5.0}, "theta=-5"),
    ({"trained_length": 0}, "trained_length=0 must be a whole number of tokens, 1 or more"),
    ({"length": -1}, "length=-1"), ({"pretrained_length": 8192.5}, r"pretrained_length=8192\.5 must be a whole"),
    ({"trained_length": "64k"}, "trained_length='64k'"), ({"theta": "5e5"}, "theta='5e5' must be a number above 1"),
    ({"theta": float("nan")}, "theta=nan"), ({"head_dim": 128.0}, r"head_dim=128\.0 must be positive and even"),
])  # fmt: skip
def test_bad_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        RopeChain([]).spectrum(**{**INPUTS, **inputs})


def test_only_rope_vectors_are_transformed():
    with pytest.raises(ValueError, match="starts falling"):
        RopeChain([]).apply(np.ones(8))


def test_importing_the_package_needs_numpy_alone():
    """Beyond what numpy itself loads, a fresh process takes this package and the standard library."""
    code = "import sys; import numpy; known = set(sys.modules); import ropewalk.rope; print(*set(sys.modules) - known)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names - {"numpy"} == {"ropewalk"}


@pytest.mark.parametrize("methods", [[5], None, "cope", {"method": "cope", "clip": 3}, [{"method": ["cope"]}]])
def test_what_is_no_list_of_steps_is_named(methods):
    with pytest.raises(ValueError, match=r"write|names no method"):
        RopeChain(methods)


def test_apply_at_a_length_needs_no_other():
    own = 1e7 ** (-np.arange(64) / 64)
    dynamic = RopeChain.parse("dynamic_ntk(factor=2, original_max_position_embeddings=8192)")
    expected = (1e7 * 3 ** (128 / 126)) ** (-np.arange(64) / 64)  # 2 x 16384 / 8192 - 1
    np.testing.assert_allclose(dynamic.apply(own, length=16384), expected, rtol=1e-12)
