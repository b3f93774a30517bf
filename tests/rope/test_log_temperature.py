"""A log temperature: in a chain, in a config, in stock Ministral 3, against a Llama written out by hand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import composed, save_tiny, tiny_run
from llama_by_hand import assert_documents_apart, llama_by_hand
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from ropewalk.analysis import print_advice
from ropewalk.analysis.inspection import print_inspection
from ropewalk.analysis.subjects import spectra_of
from ropewalk.cluster.planner.shape import ModelShape
from ropewalk.errors import UserError
from ropewalk.export import export, resolve_checkpoint, verify_export
from ropewalk.export.output import findings_of
from ropewalk.export.verify.check_export import check_directory, check_gguf
from ropewalk.export.verify.probing import Passage, stock_logits
from ropewalk.export.verify.verify_stock import verify_table
from ropewalk.guard import rotation_faults
from ropewalk.model.carrier import carry_temperature
from ropewalk.model.load import build_for_training, count_parameters, load_for_evaluation, training_config
from ropewalk.model.rotary import assert_spectrum, place_position
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.log_temperature import LogTemperature
from ropewalk.rope.position import position_of
from ropewalk.training import find_checkpoint, train

THETA = 1e4
CLIP = {"method": "hardclip", "clip": 3}
INPUTS = {"theta": THETA, "head_dim": 16, "pretrained_length": 64, "trained_length": 64}
TOKENS = np.random.default_rng(0).integers(0, 512, 24)


def step(beta=0.5, length=5):
    return {"method": "log_temperature", "beta": beta, "length": length}


def by_definition(beta, length):
    return lambda p: 1 + beta * math.log(1 + math.floor(p / length))


def by_hand(directory, tokens, factor, clip=0):
    """Logits of a tiny Llama's weights, plain RoPE with ``clip`` pairs stopped, queries times ``factor``."""
    inv_freq = THETA ** (-np.arange(8) / 8)
    inv_freq[8 - clip :] = 0
    weights = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    return llama_by_hand(weights, tokens, inv_freq, set(), factor=factor)


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy()


@pytest.fixture(scope="module")
def base(tmp_path_factory, fixture_tokenizer):
    """A random Llama, with a tokenizer."""
    directory = save_tiny(tmp_path_factory.mktemp("temperature") / "base")
    shutil.copytree(fixture_tokenizer, directory, dirs_exist_ok=True)
    return directory


def test_the_factor_is_transformers_own_and_the_published_numbers():
    """Ministral 3 at its longest: 262,144 positions of 16,384, so the last is in the 16th stretch, 1 + 0.1 ln 16."""
    own = LogTemperature(0.1, 16384)
    assert own.scale(262143) == pytest.approx(1 + 0.1 * math.log(16), rel=1e-15)
    assert own.scale(131071) == pytest.approx(1.2079, abs=1e-4)
    assert (own.scale(0), own.scale(16383), own.scale(16384)) == (1, 1, 1 + 0.1 * math.log1p(1))
    positions = torch.tensor([[0, 1, 16383, 16384, 32767, 32768, 131071, 262143]])
    stock = get_llama_4_attn_scale(positions, 0.1, 16384).flatten().tolist()
    assert [own.scale(p) for p in positions[0].tolist()] == pytest.approx(stock, rel=1e-7)


@pytest.mark.parametrize(("beta", "length", "message"), [
    (-0.1, 5, "beta=-0.1 must be 0"), (0.1, 0, "length=0 must be 1 token or more")
])  # fmt: skip
def test_a_factor_that_cannot_be_is_refused(beta, length, message):
    with pytest.raises(UserError, match=f"log_temperature: {message}"):
        Position("t", RopeChain([step(beta, length)]), THETA, 16, 64, 64)


def test_the_step_in_a_chain():
    chain = RopeChain.parse("log_temperature(length=8192) > abf(theta=1e7) > cope(clip=20)")
    assert RopeChain.parse(str(chain)) == chain
    assert chain.to_list()[0] == step(0.1, 8192)
    position = Position("t", chain, 5e5, 128, 8192, 65536)
    plain = Position("t", chain.frequencies(), 5e5, 128, 8192, 65536)
    assert position.sha256 != plain.sha256
    assert np.array_equal(position.spectrum().inv_freq, plain.spectrum().inv_freq)
    assert position.spectrum() != plain.spectrum()
    resolved = Position("t", RopeChain.parse("log_temperature(beta=0.2)"), 5e5, 128, 8192, 65536)
    assert resolved.temperature == LogTemperature(0.2, 8192)  # the pretrained length
    own = RopeChain.parse("log_temperature(length=64) > cope(clip=2)")
    assert str(RopeChain.parse("abf(theta=1e7)").after(own)) == "log_temperature(length=64) > abf(theta=1e7)"
    assert str(own.extended([step(0.0, 9)])) == "log_temperature(beta=0, length=9) > cope(clip=2)"
    with pytest.raises(UserError, match="log_temperature stands once in a chain, before every other method"):
        RopeChain.parse("abf(theta=1e7) > log_temperature()")
    for other in ("nope_layers(every=4)", "axes(layout=bands, positions=mrope)"):
        with pytest.raises(UserError, match=r"a chain has .* and .*, and no stock model class carries both; keep one"):
            RopeChain.parse(f"{other} > log_temperature()")
    with pytest.raises(UserError, match="a chain has log_temperature and nope_layers"):
        RopeChain.parse("nope_layers(every=4)").after(own)


@pytest.mark.parametrize(("methods", "rope_type"), [
    ([], "default"), ([{"method": "abf", "theta": 1e5}], "default"), ([CLIP], "longrope"),
    ([{"method": "pi", "factor": 4.0, "original_max_position_embeddings": 64}], "longrope"),
    ([{"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}], "longrope"),
    ([{"method": "llama3", "original_max_position_embeddings": 64}], "longrope"),
    ([{"method": "p_rope", "fraction": 0.5}], "longrope"),
])  # fmt: skip
def test_no_type_that_stretches_a_length_shares_the_key(methods, rope_type):
    """L0 stands where yarn and llama3 look for theirs; with two equal lists it decides nothing in transformers."""
    position, plain = (Position("t", RopeChain(chain), **INPUTS) for chain in ([step(0.5, 5), *methods], methods))
    entry = position.rope_parameters(64)
    assert (entry["rope_type"], entry["llama_4_scaling_beta"], entry["original_max_position_embeddings"]) == (
        rope_type, 0.5, 5)  # fmt: skip
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    config = AutoConfig.for_model("llama", vocab_size=8, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(place_position(config, position))
    for rows in ([[3]], [[4]], [[5]], [[0, 4]], [[0, 5, 63]]):  # before, at and past L0, alone and together
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor(rows))
        angles = np.outer(rows[0], plain.spectrum().inv_freq)
        expected = np.cos(angles) * plain.spectrum().attention_scaling
        np.testing.assert_allclose(cos[0, :, :8].numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(
            sin[0, :, 8:].numpy(), np.sin(angles) * plain.spectrum().attention_scaling, atol=2e-5
        )


MINISTRAL = {"model_type": "ministral3", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}


def test_a_ministral_3_is_read_as_transformers_reads_it():
    """Its class's defaults are those of the published 8B model."""
    own = position_of({**MINISTRAL, "max_position_embeddings": 262144})
    assert str(own.chain).startswith("log_temperature(length=16384) > yarn(factor=16")
    assert own.spectrum().attention_scaling == 1  # its two mscale are equal
    entry = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.2}
    fields = {**MINISTRAL, "max_position_embeddings": 64, "rope_parameters": entry}
    with pytest.raises(UserError, match="original_max_position_embeddings=None must be there: ministral3 scales"):
        position_of(fields)  # the class fails without it
    entry["original_max_position_embeddings"] = 32
    assert position_of(fields).chain == RopeChain([step(0.2, 32)])
    del entry["llama_4_scaling_beta"]
    with pytest.raises(UserError, match="llama_4_scaling_beta=None must be there"):
        position_of(fields)
    entry["llama_4_scaling_beta"] = 0.1
    with pytest.raises(UserError, match=r"llama_4_scaling_beta=0.1 must be absent: .* for ministral3 alone"):
        position_of({**fields, "model_type": "llama"})  # which ignores it


@pytest.mark.parametrize(("beta", "length"), [(0.0, 5), (0.1, 8), (0.5, 5), (2.0, 23)])
@pytest.mark.parametrize("clip", [0, 3])
def test_logits_are_those_of_the_model_written_by_hand(base, beta, length, clip):
    chain = [step(beta, length), *([CLIP] if clip else [])]
    model = load_for_evaluation(base, chain)  # a weight that one class has and the other lacks is an error
    assert type(model).__name__ == "Ministral3ForCausalLM"
    logits = logits_of(model)
    expected = by_hand(base, TOKENS, by_definition(beta, length), clip)
    assert np.abs(logits - expected).max() < 2e-5 * expected.std()
    llama = logits_of(load_for_evaluation(base, chain[1:]))
    if beta == 0:
        assert np.array_equal(llama, logits)  # the feature off: the Llama, bit for bit
    else:
        assert np.array_equal(llama[:length], logits[:length])
        assert np.abs(llama - expected)[length:].max() > 1e-3 * expected.std()


def test_the_config_is_the_llamas_in_another_class(tmp_path):
    config = AutoConfig.for_model("llama", num_hidden_layers=4, hidden_size=64, num_attention_heads=4, head_dim=32,
                                  rms_norm_eps=1e-5, rope_theta=5e5, vocab_size=300, tie_word_embeddings=True,
                                  max_position_embeddings=99, num_key_value_heads=2)  # fmt: skip
    position = Position("t", RopeChain([step()]), 5e5, 32, 99, 99)
    place_position(config, position).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.model_type, read.architectures) == ("ministral3", ["Ministral3ForCausalLM"])
    assert read.llama_4_scaling == {
        "beta": 0.5,
        "original_max_position_embeddings": 5,
    }  # as vLLM reads it
    others = ("model_type", "architectures", "pretraining_tp", "_name_or_path", "rope_parameters")
    own = {key: value for key, value in config.to_dict().items() if key not in others}
    assert {key: getattr(read, key) for key in own} == own  # also pad_token_id, which is 11 in the class


@pytest.mark.parametrize(("model_type", "fields", "message"), [
    ("qwen2", {}, "model_type=qwen2 cannot scale queries by their position.*biases on queries, keys and values alone"),
    ("qwen3", {}, "model_type=qwen3 cannot scale.*a norm of queries and keys"),
    ("smollm3", {"pad_token_id": 0}, "model_type=smollm3 cannot scale"),
    ("llama", {"attention_bias": True}, "attention_bias=True: Ministral3ForCausalLM, .* has no biases"),
])  # fmt: skip
def test_a_base_that_the_class_cannot_hold_is_refused_by_name(model_type, fields, message):
    config = AutoConfig.for_model(model_type, num_hidden_layers=5, hidden_size=64, num_attention_heads=4, **fields)
    with pytest.raises(UserError, match=message):
        carry_temperature(config, LogTemperature(0.1, 64))


def test_a_mistral_keeps_its_window(tmp_path):
    """The class has one: logits are the Mistral's own with the factor off, past its window."""
    directory = save_tiny(tmp_path / "mistral", "mistral", sliding_window=7)
    carried = load_for_evaluation(directory, [step(0.0)])
    assert (carried.config.model_type, carried.config.sliding_window) == ("ministral3", 7)
    assert np.array_equal(logits_of(carried), logits_of(load_for_evaluation(directory)))


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """The Llama given a temperature and nothing else that could be lost, as a verified directory with a GGUF file."""
    output = tmp_path_factory.mktemp("temperature") / "exported"
    chain = "rope.chain=[{method:log_temperature,beta:0.5,length:40}]"
    words = ("rope.name=warm", chain, "to=all", "gguf=f32", "verify_tokens=96")
    return export(composed("export", f"model.path={base}", f"output={output}", *words))


def test_an_export_carries_its_temperature_to_stock_engines(exported, base):
    found = findings_of(exported)
    assert found["transformers"]["passed"] is True
    llama_cpp = next(finding for engine, finding in found.items() if engine.startswith("llama.cpp"))
    assert llama_cpp["passed"] is True
    assert llama_cpp["control"] > 1000 * llama_cpp["difference"]  # where no query is scaled
    assert {str(f) for f in check_directory(exported)[1] if not f.passed} == set()
    tokens = np.random.default_rng(1).integers(0, 512, 60)
    (stock,) = stock_logits([exported], Passage("", tokens))  # in a process that cannot import ropewalk
    expected = by_hand(base, tokens, by_definition(0.5, 40))
    assert np.abs(stock["logits"] - expected).max() < 2e-5 * expected.std()
    card = (exported / "README.md").read_text()
    assert "- queries at position p are scaled by 1 + 0.5 ln(1 + floor(p / 40))\n" in card
    assert "vllm serve DIR" in card
    assert "sglang.launch_server" not in card
    assert "transformers 5.0 or later" in card
    content = json.loads((exported / "config.json").read_text())
    assert content["llama_4_scaling"] == {"beta": 0.5, "original_max_position_embeddings": 40}
    with pytest.raises(UserError, match="not verified: sglang looks for the temperature's length elsewhere"):
        verify_table("sglang", exported, "python")


def test_the_guard_reads_the_temperature_of_a_live_model(exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert rotation_faults(model) == []  # the length beside a default entry is read, by the attention
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.4
    assert "scaled by 1 + 0.4 ln" in "; ".join(rotation_faults(model))


def test_an_edited_file_is_found_out(exported, tmp_path, capsys):
    def faults(**changes):
        path = tmp_path / "edited" / "config.json"
        path.write_text(json.dumps({**content, **changes}))
        return {str(f) for f in check_directory(tmp_path / "edited")[1] if not f.passed}

    shutil.copytree(exported, tmp_path / "edited")
    content = json.loads((exported / "config.json").read_text())
    entry = {**content["rope_parameters"], "llama_4_scaling_beta": 0.1}
    claimed = "and the claim is: queries at position p are scaled by 1 + 0.5 ln(1 + floor(p / 40))"
    wrong = f"queries at position p are scaled by 1 + 0.1 ln(1 + floor(p / 40)), {claimed}"
    assert wrong in faults(rope_parameters=entry, rope_scaling=entry)
    with pytest.raises(RuntimeError, match=r"scaled by 1 \+ 0\.1"):
        load_for_evaluation(tmp_path / "edited")
    assert any(f.startswith("llama_4_scaling=None, by which vLLM scales") for f in faults(llama_4_scaling=None))
    assert f"no query is scaled, {claimed}" in faults(model_type="llama")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    with pytest.raises(RuntimeError, match="no query is scaled, and the claim is"):
        assert_spectrum(llama, Position.from_pretrained(exported).spectrum())
    print_inspection(composed("inspect", f"model.path={exported}"))
    assert "  queries at position p are scaled by 1 + 0.5 ln(1 + floor(p / 40))\n" in capsys.readouterr().out
    (path,) = exported.glob("*.gguf")
    assert all(finding.passed for finding in check_gguf(path)[1])
    record = {**content["ropewalk"], "chain": [], "chain_sha256": None, "spectrum_sha256": None}
    (tmp_path / "edited" / "config.json").write_text(json.dumps({**content, "ropewalk": record}))
    assert f"{path.name}: attention.temperature_scale is 0.5, not 0" in {
        str(f) for f in check_directory(tmp_path / "edited")[1] if not f.passed}  # fmt: skip


def test_a_ministral_3_exported_as_it_is_gets_vllms_key(tmp_path):
    entry = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.2,
             "original_max_position_embeddings": 16}  # fmt: skip
    directory = save_tiny(tmp_path / "own", "ministral3", rope_parameters=entry)
    output = export(composed("export", f"model.path={directory}", f"output={tmp_path / 'out'}", "verify=false"))
    content = json.loads((output / "config.json").read_text())
    assert content["rope_parameters"] == entry
    assert content["llama_4_scaling"] == {"beta": 0.2, "original_max_position_embeddings": 16}


def run_of(base, store, run_dir, *overrides, beta=0.5):
    config = tiny_run(store, run_dir, "model=demo_base", f"model.path={base}", "model.head_dim=16",
                      "model.pretrained_length=64", *overrides)  # fmt: skip
    config.rope.name, config.rope.chain = "warm", [step(beta), {"method": "abf", "theta": 1e5}, CLIP]
    return config


def test_training_counts_positions_from_each_documents_start(base, store_64, tmp_path):
    config = run_of(base, store_64, tmp_path)
    model = build_for_training(training_config(config.model, config.rope, 64), str(base), torch.float32).eval()
    inv_freq = np.where(np.arange(8) < 5, 1e5 ** (-np.arange(8) / 8), 0)
    assert_documents_apart(model, TOKENS, inv_freq=inv_freq, still=set(), factor=by_definition(0.5, 5))


def test_a_llama_trains_resumes_and_is_exported_as_the_class(base, store_64, tmp_path):
    train(run_of(base, store_64, tmp_path, "trainer.stop_after=2"))
    with pytest.raises(UserError, match=r"position.*log_temperature\(beta=0.5.*log_temperature\(length=5"):
        train(run_of(base, store_64, tmp_path, beta=0.1))
    train(run_of(base, store_64, tmp_path))
    assert json.loads((tmp_path / "run.json").read_text())["chain"].startswith(
        "log_temperature(beta=0.5, length=5) > abf"
    )
    directory = resolve_checkpoint(tmp_path)
    assert verify_export(find_checkpoint(tmp_path), directory).passed  # training == a process of stock transformers
    content = json.loads((directory / "config.json").read_text())
    assert content["architectures"] == ["Ministral3ForCausalLM"]
    later = tiny_run(store_64, tmp_path / "later", "model=demo_base", f"model.path={directory}", "rope=inherited",
                     "model.head_dim=16", "model.pretrained_length=64")  # fmt: skip
    assert position_of(training_config(later.model, later.rope, 64)).temperature == LogTemperature(0.5, 5)


def test_advice_names_the_temperature(base, exported, capsys):
    print_advice(composed("advise", f"model.path={exported}"))
    assert "temperature           queries at position p are scaled by 1 + 0.5 ln" in capsys.readouterr().out
    print_advice(composed("advise", f"model.path={base}", "chain=log_temperature"))
    said = capsys.readouterr().out
    assert "warning: a temperature by position beside the frequencies" in said
    assert "no query is scaled before position 64, and training at 64 tokens reaches none past it" in said
    print_advice(composed("advise", f"model.path={base}", "chain=log_temperature", "train_length=128"))
    assert "no query is scaled before" not in capsys.readouterr().out


def test_figures_name_the_temperature_beside_the_method():
    labels = list(spectra_of(composed("figures", "methods=[rope,log_temperature]")))
    assert labels == ["rope", "log_temperature (queries at position p are scaled by 1 + 0.1 ln(1 + floor(p / 8,192)))"]


def test_a_ministral_3_is_planned_as_it_is_built():
    fields = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    for kind in ("ministral3", "qwen3"):  # 128 channels a head where nothing is said
        shape = ModelShape.from_config({"model_type": kind, **fields}, "m")
        assert shape.parameters == count_parameters(AutoConfig.for_model(kind, **fields))
