"""The compiled entry in unmodified transformers: the type it takes, and the frequencies that come out."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rope_samples import BESIDE, POSITIONS, SAMPLES, sample
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ropewalk.export.portable import place_portable
from ropewalk.model.load import load_for_evaluation
from ropewalk.model.rotary import inspect_config, place_position, stock_tolerances
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.position import longrope_entry

ABF = {"method": "abf", "theta": 1e7}
YARN = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 65536}
INPUTS = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 65536}


def compiled(*methods, **inputs):
    return RopeChain(list(methods)).rope_parameters(**{**INPUTS, **inputs}, max_position_embeddings=65536)


@pytest.mark.parametrize(("methods", "rope_type"), [
    ([], "default"), ([ABF], "default"), ([{"method": "pi", "factor": 4.0}], "linear"), ([ABF, YARN], "yarn"),
    ([{"method": "llama3"}], "llama3"), ([ABF, {"method": "cope", "clip": 20}], "longrope"),
    ([ABF, {"method": "cope", "clip": 20}, YARN], "longrope"), ([{"method": "hardclip", "clip": 20}], "longrope"),
    ([{"method": "ntk_by_parts", "factor": 2.0, "original_max_position_embeddings": 8192}], "longrope"),
    ([{"method": "p_rope", "fraction": 0.5}], "proportional"),
    ([ABF, {"method": "p_rope", "fraction": 0.0}], "proportional"),
    ([{"method": "p_rope", "fraction": 0.5}, {"method": "pi", "factor": 4.0}], "longrope"),
    ([{"method": "p_rope", "fraction": 1.0}], "default"), ([{"method": "ntk", "factor": 8.0}], "default"),
    ([ABF, {"method": "ntk", "factor": 8.0}], "default"), ([{"method": "ntk", "factor": 8.0}, YARN], "longrope"),
    ([{"method": "cope", "clip": 20}, {"method": "ntk", "factor": 8.0}], "longrope"),
    ([{"method": "high_frequency"}], "default"),
])  # fmt: skip
def test_stock_rotary_gives_the_spectrum(methods, rope_type):
    entry = compiled(*methods)
    assert entry["rope_type"] == rope_type
    assert "NaN" not in json.dumps(entry)
    assert "Infinity" not in json.dumps(entry)
    config = LlamaConfig(head_dim=128, hidden_size=512, num_attention_heads=4, max_position_embeddings=65536)
    config.rope_parameters = entry
    rotary = LlamaRotaryEmbedding(config)
    exact = RopeChain(methods).spectrum(**INPUTS)
    stock = rotary.inv_freq.double().numpy()
    assert np.array_equal(stock == 0, exact.inv_freq == 0)
    turning = exact.inv_freq > 0
    difference = np.abs(stock[turning] / exact.inv_freq[turning] - 1)
    assert np.all(difference <= stock_tolerances(exact, entry)[turning])
    if rope_type not in ("yarn", "llama3"):  # whose ramp the stock function rounds too
        assert difference.max(initial=0) <= 2.4e-7
    assert rotary.attention_scaling == pytest.approx(exact.attention_scaling, rel=1e-12)
    for length in (100, 65536, 262144):  # no list is switched, no scaling added, at any length
        rotary(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
        assert np.array_equal(rotary.inv_freq.double().numpy(), stock)


def test_longrope_entry_is_complete():
    entry = compiled(ABF, {"method": "cope", "clip": 20}, YARN)
    scaling = 0.1 * math.log(4) + 1
    assert entry["short_factor"] == entry["long_factor"]
    assert entry["factor"] == 1.0
    assert entry["original_max_position_embeddings"] == 65536
    for key in ("attention_factor", "short_mscale", "long_mscale"):
        assert entry[key] == pytest.approx(scaling, rel=1e-15)
    assert entry["short_factor"][-1] == 1e38
    assert entry["short_factor"][0] == 1.0


def test_any_pair_can_be_stopped():
    # 1e38 x base^(2i/d) stays finite where the base's power is small; there the factor overflows by itself
    entry = compiled({"method": "hardclip", "clip": 64})
    assert entry["short_factor"][0] == 1e39
    assert entry["short_factor"][63] == 1e38
    assert json.loads(json.dumps(entry)) == entry
    assert np.all(stock_inv_freq(entry) == 0)
    assert np.all(np.isfinite(entry["short_factor"]))


def stock_inv_freq(entry, head_dim=128):
    config = LlamaConfig(head_dim=head_dim, hidden_size=512, num_attention_heads=4, max_position_embeddings=65536)
    config.rope_parameters = entry
    return LlamaRotaryEmbedding(config).inv_freq.double().numpy()


@settings(max_examples=200, deadline=None)
@given(st.integers(16, 128), st.floats(1e4, 1e9), st.data())
def test_longrope_holds_any_spectrum(pairs, theta, data):
    """Exact zeros exact, the rest within the float32 rounding of the factor, the power and their product."""
    head_dim = 2 * pairs
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0, 1e-6, 0.3, 5.0]), min_size=pairs, max_size=pairs))
    base = RopeChain([]).spectrum(head_dim=head_dim, theta=theta, pretrained_length=8192, trained_length=65536)
    s = base.scaled(np.array(weights))
    entry = longrope_entry(s, 65536)
    exact, stock = s.inv_freq, stock_inv_freq(entry, head_dim)
    assert np.array_equal(exact == 0, stock == 0)
    turning = exact > 0
    difference = np.abs(stock[turning] / exact[turning] - 1)
    assert np.all(difference <= stock_tolerances(s, entry)[turning])


@settings(max_examples=100, deadline=None)
@given(st.integers(16, 128), st.floats(1e4, 1e9), st.floats(1, 64))
def test_ntk_is_plain_rope_at_another_base(pairs, theta, factor):
    head_dim = 2 * pairs
    inputs = {"head_dim": head_dim, "theta": theta, "pretrained_length": 8192, "trained_length": 65536}
    chain = RopeChain([{"method": "ntk", "factor": factor}])
    entry = chain.rope_parameters(**inputs, max_position_embeddings=65536)
    assert entry == {
        "rope_type": "default",
        "rope_theta": pytest.approx(theta * factor ** (head_dim / (head_dim - 2)), rel=1e-12),
    }
    exact = chain.spectrum(**inputs)
    stock = stock_inv_freq(entry, head_dim)
    assert np.all(np.abs(stock / exact.inv_freq - 1) <= stock_tolerances(exact, entry))


THETAS, SCALES = st.floats(1e4, 1e9), st.floats(1.01, 64)
YARNS = st.fixed_dictionaries({
    "method": st.just("yarn"), "factor": SCALES, "original_max_position_embeddings": st.integers(1024, 131072),
    "beta_fast": st.floats(8, 64), "beta_slow": st.floats(0.5, 4), "truncate": st.booleans(),
})  # fmt: skip
LLAMA3S = st.tuples(SCALES, st.floats(0.5, 4), st.floats(1, 30), st.integers(1024, 131072)).map(
    lambda drawn: {
        "method": "llama3", "factor": drawn[0], "low_freq_factor": drawn[1], "high_freq_factor": drawn[1] + drawn[2],
        "original_max_position_embeddings": drawn[3],
    }
)  # fmt: skip


def float32_error(method, head_dim, theta):
    """|stock / exact - 1| and |stock - exact| of each pair, and what the bound of the first is."""
    inputs = {"head_dim": head_dim, "theta": theta, "pretrained_length": 8192, "trained_length": 8192}
    chain = RopeChain([method])
    entry = chain.rope_parameters(**inputs, max_position_embeddings=2**24)
    assert entry["rope_type"] in (method["method"], "default")  # the latter where no pair is slow enough to be scaled
    spectrum = chain.spectrum(**inputs)
    stock = stock_inv_freq(entry, head_dim)
    exact = spectrum.inv_freq
    return np.abs(stock / exact - 1), np.abs(stock - exact), stock_tolerances(spectrum, entry)


@settings(max_examples=300, deadline=None)
@given(st.integers(16, 128), THETAS, st.one_of(YARNS, LLAMA3S))
@example(
    16,
    1e4,
    {
        "method": "yarn",
        "factor": 36.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 44.89132456459628,
        "beta_slow": 0.5,
        "truncate": False,
    },
)
def test_ramps_are_as_near_to_float64_as_their_rounding_allows(pairs, theta, method):
    relative, radians, bound = float32_error(method, 2 * pairs, theta)
    assert np.all(relative <= bound)
    assert radians.max() <= 2.4e-7  # a token: the slow pairs' larger relative error turns no further than a fast one's


def test_the_bound_on_ramps_is_not_loose():
    rng = np.random.default_rng(0)
    for name in ("yarn", "llama3"):
        reached = 0.0
        for _ in range(100):
            method = {"method": name, "factor": 2 ** rng.uniform(1, 6), "original_max_position_embeddings": 8192}
            relative, _, bound = float32_error(method, 128, theta=10 ** rng.uniform(4, 9))
            on_ramp = bound > 2.4e-7
            reached = max(reached, (relative / bound)[on_ramp].max())
        assert 0.25 < reached <= 1


# Every method, alone and in the chains people run; head_dim 64, base 1e5, 8,192 tokens stretched to 65,536.
CHAINS = {
    # a Llama reads no axes, layers or temperature; test_pair_axes.py and others have models that do
    **{name: [sample(name, 64)] for name in SAMPLES if name not in ("rope_id_yarn", *BESIDE)},
    "rope": [],
    "rope_id_yarn": [sample("rope_id"), sample("rope_id_yarn")],
    "cope_yarn": [ABF, {"method": "cope", "clip": "auto"}, YARN],
    "kaiser": [{"method": "cope", "clip": 9, "window": "kaiser"}],
    "nope": [{"method": "hardclip", "clip": 32}],
}
SMALL = {"theta": 1e5, "head_dim": 64, "pretrained_length": 8192, "trained_length": 65536}


@pytest.fixture(scope="module")
def stock_process(tmp_path_factory):
    """A tiny Llama under every chain, written here, read by one process that cannot import ropewalk."""
    root = tmp_path_factory.mktemp("stock")
    for name, methods in CHAINS.items():
        save_tiny(root / name, head_dim=64, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, seed=1)
        position = Position(name, RopeChain(methods), **SMALL)
        config = AutoConfig.from_pretrained(root / name)
        config.max_position_embeddings = 65536
        config.rope_parameters = position.rope_parameters(65536)
        config.ropewalk = position.metadata()
        config.save_pretrained(root / name)
    script = Path(__file__).with_name("stock_process.py")
    done = subprocess.run([sys.executable, "-I", str(script), str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("name", list(CHAINS))
def test_a_process_without_ropewalk_rotates_alike(stock_process, name):
    directory = stock_process / name
    found = np.load(directory / "found.npz")
    model = load_for_evaluation(directory)  # asserts the spectrum
    ours = model.model.rotary_emb.inv_freq.numpy()
    assert np.array_equal(ours, found["inv_freq"])
    assert ours.dtype == found["inv_freq"].dtype == np.float32
    position = Position.from_pretrained(directory)
    exact = RopeChain(CHAINS[name]).spectrum(**SMALL)
    assert np.array_equal(position.spectrum().inv_freq, exact.inv_freq)
    assert np.array_equal(exact.inv_freq == 0, ours == 0)
    turning = exact.inv_freq > 0
    difference = np.abs(ours[turning] / exact.inv_freq[turning] - 1)
    entry = json.loads((directory / "config.json").read_text())["rope_parameters"]
    assert np.all(difference <= stock_tolerances(exact, entry)[turning])
    if entry["rope_type"] != "llama3":  # whose ramp the stock function magnifies; yarn's is within it here
        assert difference.max(initial=0) <= 2.4e-7
    assert_equal_logits(model, found["logits"])


def assert_equal_logits(model, expected):
    """The same tokens at the same positions through the model as it was loaded here, bit for bit."""
    tokens = torch.arange(len(POSITIONS))[None] * 7
    model.set_attn_implementation("eager")
    causal = torch.full((len(POSITIONS),) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        logits = model(input_ids=tokens, position_ids=torch.tensor([POSITIONS]), attention_mask=causal).logits[0]
    assert np.array_equal(logits.numpy(), expected)
    assert np.std(expected) > 0.1


def test_positions_matter_to_these_logits(stock_process):
    logits = {name: np.load(stock_process / name / "found.npz")["logits"] for name in ("rope", "cope", "nope", "yarn")}
    assert np.abs(logits["rope"] - logits["cope"]).max() > 1e-3
    assert np.abs(logits["rope"] - logits["nope"]).max() > 1e-3
    assert np.abs(logits["rope"] - logits["yarn"]).max() > 1e-3


def test_a_length_dependent_chain_is_compiled_at_the_declared_length():
    dynamic = {"method": "dynamic_ntk", "factor": 2.0, "original_max_position_embeddings": 8192}
    entries = {n: compiled(dynamic, length=n) for n in (None, 8192, 65536, 131072)}
    assert entries[None] == entries[65536]  # the trained length
    assert entries[8192] == {"rope_type": "default", "rope_theta": 5e5}
    expected = 5e5 * (2 * 131072 / 8192 - 1) ** (128 / 126)
    np.testing.assert_allclose(stock_inv_freq(entries[131072])[-1], expected ** (-126 / 128), rtol=3e-7)


@pytest.mark.parametrize(("model_type", "rope_type"), [
    ("llama", "proportional"), ("qwen3", "proportional"), ("phi3", "longrope"), ("stablelm", "longrope"),
])  # fmt: skip
def test_proportional_is_written_where_the_class_keeps_no_share_of_its_own(model_type, rope_type):
    fields = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": 16,
        "partial_rotary_factor": 1.0,
    }
    config = AutoConfig.for_model(model_type, **fields, pad_token_id=0, max_position_embeddings=64)
    position = Position("p", RopeChain([{"method": "p_rope", "fraction": 0.25}]), 1e4, 16, 64, 64)
    assert place_position(config, position).rope_parameters["rope_type"] == rope_type
    assert np.array_equal(inspect_config(config, 64)[0].inv_freq == 0, [False] * 2 + [True] * 6)
    portable = place_portable(config, position, 64)  # transformers 4 does not know proportional
    assert portable.rope_parameters["rope_type"] == "longrope"
    assert not inspect_config(portable, 64)[0].faults(position.spectrum())


TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(("model_type", "fields"), [
    ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": None}), ("olmo", {}), ("olmo2", {}),
    ("olmo3", TWO_KINDS), ("gemma", {}), ("gemma2", {}), ("gemma3_text", TWO_KINDS), ("phi3", {"pad_token_id": 0}),
])  # fmt: skip
def test_other_rotary_classes_read_the_compiled_form(tmp_path, model_type, fields):
    save_tiny(tmp_path, model_type, head_dim=16, hidden_size=64, **fields)
    chain = [{"method": "abf", "theta": 1e6}, {"method": "cope", "clip": 5}, sample("yarn")]
    before = AutoModelForCausalLM.from_pretrained(tmp_path).get_decoder().rotary_emb
    model = load_for_evaluation(tmp_path, chain)  # asserts the buffers of the stock class against the spectrum
    rotary = model.get_decoder().rotary_emb
    exact = RopeChain(chain).spectrum(head_dim=16, theta=1e6, pretrained_length=64, trained_length=64)
    prefix = "full_attention_" if model_type in ("olmo3", "gemma3_text") else ""
    angles = np.arange(300)[:, None] * exact.inv_freq
    layer = ("full_attention",) if prefix else ()
    cos, sin = rotary(torch.zeros(1), torch.arange(300)[None], *layer)
    np.testing.assert_allclose(cos[0, :, :8], exact.attention_scaling * np.cos(angles), atol=5e-5)
    np.testing.assert_allclose(sin[0, :, 8:], exact.attention_scaling * np.sin(angles), atol=5e-5)
    assert getattr(rotary, f"{prefix}inv_freq")[-1] == 0
    if prefix:  # the layers with a window keep their own
        assert torch.equal(rotary.sliding_attention_inv_freq, before.sliding_attention_inv_freq)
    assert torch.isfinite(model(input_ids=torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize(("arguments", "kind"), [
    ({}, "yarn"), ({"mscale": 0.7}, "yarn"), ({"attention_factor": 1.0}, "longrope"),
    ({"mscale": 1.0, "mscale_all_dim": 1.0}, "longrope"),
])  # fmt: skip
def test_yarn_with_an_attention_scaling_of_its_own_is_longrope(arguments, kind):
    """vLLM's yarn knows 0.1 ln s + 1 alone; longrope's three keys are read by all engines."""
    yarn = {"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, **arguments}
    inputs = {"head_dim": 128, "theta": 5e5, "pretrained_length": 8192, "trained_length": 8192}
    entry = RopeChain([yarn]).rope_parameters(**inputs, max_position_embeddings=32768)
    assert entry["rope_type"] == kind
    if kind == "longrope":
        assert entry["attention_factor"] == entry["long_mscale"] == 1.0
