"""Layers without rotation: in a chain, in a config, in stock SmolLM3, against a Llama written out by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import composed, save_tiny, tiny_run
from llama_by_hand import assert_documents_apart, llama_by_hand
from transformers import AutoConfig, AutoModelForCausalLM, SmolLM3Config

from ropewalk.analysis import print_advice
from ropewalk.analysis.capture import observe
from ropewalk.analysis.inspection import print_inspection
from ropewalk.analysis.subjects import spectra_of
from ropewalk.cluster.planner.shape import ModelShape
from ropewalk.config.groups import RopeConfig
from ropewalk.config.groups import TestTimeConfig as TimeConfig
from ropewalk.data import PackedStore
from ropewalk.errors import UserError
from ropewalk.evaluation.evaluated_checkpoint import settings_by_length
from ropewalk.export import export, resolve_checkpoint
from ropewalk.export.gguf.gguf_file import write_gguf
from ropewalk.export.output import findings_of
from ropewalk.export.verify.check_export import check_directory, check_gguf
from ropewalk.export.verify.probing import Passage, stock_logits
from ropewalk.export.verify.verify_stock import verify_table
from ropewalk.model.load import build_for_training, count_parameters, load_for_evaluation, training_config
from ropewalk.model.rotary import assert_spectrum, carry_layers, place_position
from ropewalk.rope import Position, RopeChain
from ropewalk.rope.nope_layers import NopeLayers
from ropewalk.rope.position import position_of
from ropewalk.training import find_checkpoint, train

THETA = 1e4
CLIP = {"method": "hardclip", "clip": 3}


def nope(**arguments):
    return {"method": "nope_layers", **arguments}


def by_hand(directory, tokens, still, clip=0):
    """The same of a tiny Llama's directory, plain RoPE with ``clip`` pairs stopped."""
    inv_freq = THETA ** (-np.arange(8) / 8)
    inv_freq[8 - clip :] = 0
    weights = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    return llama_by_hand(weights, tokens, inv_freq, still)


@pytest.fixture(scope="module")
def base(tmp_path_factory, fixture_tokenizer):
    """A random Llama of five layers, with a tokenizer."""
    directory = save_tiny(tmp_path_factory.mktemp("nope") / "base", num_hidden_layers=5)
    shutil.copytree(fixture_tokenizer, directory, dirs_exist_ok=True)
    return directory


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7])
def test_the_interval_is_smollm3s_own(every):
    own = SmolLM3Config(num_hidden_layers=9, no_rope_layer_interval=every).no_rope_layers
    assert NopeLayers(every=every).stock_keys(9) == {"no_rope_layers": own, "no_rope_layer_interval": every}
    numbers = tuple(layer for layer, rotates in enumerate(own) if not rotates)
    assert NopeLayers(layers=numbers).stock_keys(9) == {"no_rope_layers": own}


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "every=None and layers=None; give one"), ({"every": 4, "layers": [3]}, r"every=4 and layers=\(3,\); give one"),
    ({"every": 0}, r"every=0 must be 1"), ({"layers": [3, 1]}, r"layers=\[3, 1\] must be numbers of layers"),
    ({"layers": [1, 1]}, "each once and in order"), ({"layers": [-1]}, "from 0"),
    ({"every": 6}, "every=6 names a layer that a model of 5 does not have"),
    ({"layers": [2, 5]}, r"layers=\[2, 5\] names a layer that a model of 5"),
])  # fmt: skip
def test_layers_that_cannot_be_are_refused(arguments, message):
    config = AutoConfig.for_model("llama", num_hidden_layers=5, hidden_size=64, num_attention_heads=4)
    with pytest.raises(UserError, match=message):
        place_position(config, Position("n", RopeChain([nope(**arguments)]), THETA, 16, 64, 64))


def test_the_step_in_a_chain():
    chain = RopeChain.parse("nope_layers(every=4) > abf(theta=1e7) > cope(clip=20)")
    assert str(chain) == "nope_layers(every=4) > abf(theta=1e7) > cope(clip=20)"
    assert RopeChain.parse(str(chain)) == chain
    assert chain.sha256 != chain.frequencies().sha256
    position = Position("n", chain, 5e5, 128, 8192, 65536)
    assert position.sha256 != Position("n", chain.frequencies(), 5e5, 128, 8192, 65536).sha256
    assert np.array_equal(position.spectrum().inv_freq, chain.frequencies().spectrum(
        head_dim=128, theta=5e5, pretrained_length=8192, trained_length=65536).inv_freq)  # fmt: skip
    assert position.rope_parameters(65536)["rope_type"] == "longrope"
    with pytest.raises(UserError, match="nope_layers stands once in a chain, before every other method"):
        RopeChain.parse("abf(theta=1e7) > nope_layers(every=4)")
    with pytest.raises(UserError, match="a chain has axes and nope_layers, and no stock model class carries both"):
        RopeChain.parse("axes(layout=bands, positions=mrope) > nope_layers(every=4)")


def test_the_checkpoints_own_layers_stay_until_a_chain_names_others():
    own = RopeChain.parse("nope_layers(every=4) > cope(clip=20)")
    assert str(RopeChain.parse("abf(theta=1e7)").after(own)) == "nope_layers(every=4) > abf(theta=1e7)"
    assert str(own.extended([nope(layers=[])])) == "nope_layers(layers=[]) > cope(clip=20)"


def test_a_test_time_step_that_goes_first_keeps_the_chain():
    """What a setting appends is handed to engines, so it must give the setting's chain when appended again."""
    position = Position("p", RopeChain.parse("abf(theta=1e5)"), THETA, 16, 64, 64)
    rope = RopeConfig(name="n", chain=[nope(every=2), CLIP])
    (setting,) = settings_by_length(position, rope, TimeConfig("none"), [64])
    assert str(setting.chain) == "nope_layers(every=2) > abf(theta=1e5) > hardclip(clip=3)"
    assert position.extended(setting.extra).chain == setting.chain


def test_a_smollm3_is_read_as_transformers_reads_it():
    fields = {"model_type": "smollm3", "num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4,
              "rope_theta": 5e6, "max_position_embeddings": 64}  # fmt: skip
    assert str(position_of(fields).chain) == "nope_layers(every=4)"  # the class's default
    assert str(position_of({**fields, "no_rope_layer_interval": 3}).chain) == "nope_layers(every=3)"
    assert str(position_of({**fields, "no_rope_layers": [1] * 8}).chain) == "rope"
    flags = [0, 1, 1, 1, 0, 0, 1, 1, 0]  # one more than layers: the class ignores it
    assert str(position_of({**fields, "no_rope_layers": flags}).chain) == "nope_layers(layers=[0, 4, 5])"
    for wrong in ([1, 0], [2] * 8):
        with pytest.raises(UserError, match=r"no_rope_layers=.* must be a list of 0 and 1, one for each of the 8"):
            position_of({**fields, "no_rope_layers": wrong})


TOKENS = np.random.default_rng(0).integers(0, 512, 24)


@pytest.mark.parametrize(("step", "still"), [
    (nope(layers=[]), ()), (nope(every=4), (3,)), (nope(every=2), (1, 3)), (nope(layers=[0, 2]), (0, 2)),
    (nope(every=1), range(5)),
])  # fmt: skip
@pytest.mark.parametrize("clip", [0, 3])
def test_logits_are_those_of_the_model_written_by_hand(base, step, still, clip):
    chain = [step, *([CLIP] if clip else [])]
    model = load_for_evaluation(base, chain)  # a weight that SmolLM3 lacked, or that the Llama lacks, is an error
    assert type(model).__name__ == "SmolLM3ForCausalLM"
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    expected = by_hand(base, TOKENS, set(still), clip)
    assert np.abs(logits - expected).max() < 2e-5 * expected.std()
    llama = load_for_evaluation(base, chain[1:])
    with torch.no_grad():
        rotating = llama(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    if still == ():
        assert np.array_equal(rotating, logits)  # the feature off: the Llama, bit for bit
    else:
        assert np.abs(rotating - expected).max() > 0.05 * expected.std()
    if step["every" if "every" in step else "layers"] == 1:
        stopped = load_for_evaluation(base, [{"method": "p_rope", "fraction": 0.0}])
        with torch.no_grad():
            assert np.array_equal(stopped(input_ids=torch.from_numpy(TOKENS)[None]).logits[0].numpy(), logits)


def test_the_config_is_the_llamas_in_another_class(tmp_path):
    config = AutoConfig.for_model("llama", num_hidden_layers=4, hidden_size=64, num_attention_heads=4, head_dim=32,
                                  rms_norm_eps=1e-5, rope_theta=5e5, vocab_size=300, tie_word_embeddings=False,
                                  attention_bias=True, max_position_embeddings=99)  # fmt: skip
    carried = carry_layers(config, NopeLayers(layers=(1,)))
    carried.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.model_type, read.no_rope_layers, read.architectures) == ("smollm3", [1, 0, 1, 1], [
        "SmolLM3ForCausalLM"])  # fmt: skip
    others = ("model_type", "architectures", "pretraining_tp", "_name_or_path")
    own = {key: value for key, value in config.to_dict().items() if key not in others}
    assert {key: getattr(read, key) for key in own} == own  # also pad_token_id, which is 128004 in the class


@pytest.mark.parametrize(("model_type", "message"), [
    ("qwen2", "biases on queries, keys and values alone"), ("qwen3", "a norm of queries and keys"),
    ("olmo2", "has not its layers"),
])  # fmt: skip
def test_a_base_that_the_class_cannot_hold_is_refused_by_name(model_type, message):
    config = AutoConfig.for_model(model_type, num_hidden_layers=5, hidden_size=64, num_attention_heads=4)
    with pytest.raises(UserError, match=f"model_type={model_type} cannot leave layers without rotation.*{message}"):
        carry_layers(config, NopeLayers(every=4))


def test_a_mistral_is_carried_without_its_window():
    config = AutoConfig.for_model("mistral", num_hidden_layers=4, hidden_size=64, num_attention_heads=4)
    with pytest.raises(UserError, match=r"sliding_window=4096: .*would attend to everything"):
        carry_layers(config, NopeLayers(every=4))
    config.sliding_window = None
    assert carry_layers(config, NopeLayers(every=4)).no_rope_layers == [1, 1, 1, 0]


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """The Llama given nope_layers(every=4), as a verified directory with a GGUF file."""
    output = tmp_path_factory.mktemp("nope") / "exported"
    words = ("rope.name=nope4", "rope.chain=[{method:nope_layers,every:4}]", "to=all", "gguf=f32", "verify_tokens=96")
    return export(composed("export", f"model.path={base}", f"output={output}", *words))


def test_an_export_carries_its_layers_to_stock_engines(exported, base):
    found = findings_of(exported)
    assert found["transformers"]["passed"] is True
    assert next(finding for engine, finding in found.items() if engine.startswith("llama.cpp"))["passed"] is True
    assert {str(f) for f in check_directory(exported)[1] if not f.passed} == set()
    (stock,) = stock_logits([exported], Passage("", TOKENS))  # in a process that cannot import ropewalk
    expected = by_hand(base, TOKENS, {3})
    assert np.abs(stock["logits"] - expected).max() < 2e-5 * expected.std()
    card = (exported / "README.md").read_text()
    assert "- layers (of 5, from 0) without rotation: 3\n" in card
    assert "vllm serve DIR" in card
    assert "sglang.launch_server" not in card
    assert "transformers 4.53 or later" in card


def test_an_edited_config_is_found_out(exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "edited")
    path = tmp_path / "edited" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "no_rope_layers": [1, 1, 1, 1, 0]}))
    fault = "layers without rotation: 4, the claimed chain's 3"
    assert fault in {str(f) for f in check_directory(tmp_path / "edited")[1] if not f.passed}
    with pytest.raises(RuntimeError, match=fault):
        load_for_evaluation(tmp_path / "edited")
    path.write_text(json.dumps({**content, "model_type": "llama"}))
    assert "every layer rotates, and the claim is: one layer in 4 without rotation" in {
        str(f) for f in check_directory(tmp_path / "edited")[1] if not f.passed}  # fmt: skip
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    with pytest.raises(RuntimeError, match="every layer rotates"):
        assert_spectrum(llama, Position.from_pretrained(tmp_path / "edited").spectrum())
    print_inspection(composed("inspect", f"model.path={exported}"))
    assert "layers without rotation: 3\n" in capsys.readouterr().out


def test_a_gguf_file_says_the_layers_by_its_architecture(exported, tmp_path):
    (path,) = exported.glob("*.gguf")
    assert all(finding.passed for finding in check_gguf(path)[1])
    shutil.copytree(exported, tmp_path / "all", ignore=shutil.ignore_patterns("*.gguf", "README.md"))
    content = json.loads((tmp_path / "all" / "config.json").read_text())
    del content["ropewalk"]
    (tmp_path / "all" / "config.json").write_text(json.dumps({**content, "no_rope_layers": [1] * 5}))
    write_gguf(tmp_path / "all", tmp_path / "all" / "all.gguf", "f32")  # all layers rotate: a llama
    assert {str(f) for f in check_directory(tmp_path / "all")[1] if not f.passed} == set()
    shutil.copy(path, tmp_path / "all" / "all.gguf")
    assert "all.gguf: layers that llama.cpp's smollm3 leaves without rotation: 3, not none" in {
        str(f) for f in check_directory(tmp_path / "all")[1] if not f.passed}  # fmt: skip


@pytest.mark.parametrize(("chain", "message"), [
    ("[{method:nope_layers,every:2}]", r"layers without rotation: 1, 3; llama.cpp's smollm3 leaves out every fourth"),
    ("[{method:nope_layers,every:4},{method:hardclip,clip:3}]", "llama.cpp's smollm3 reads no rope_freqs.weight"),
])  # fmt: skip
def test_layers_that_llama_cpp_has_no_key_for_are_refused(base, tmp_path, chain, message):
    words = [f"model.path={base}", "rope.name=n", f"rope.chain={chain}", f"output={tmp_path / 'out'}", "to=all"]
    with pytest.raises(UserError, match=message):
        export(composed("export", *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_without_a_table_of_their_own_prove_nothing(exported, engine):
    with pytest.raises(UserError, match=f"not verified: {engine} "):
        verify_table(engine, exported, "python")


def run_of(base, store: PackedStore, run_dir, *overrides, every=2):
    config = tiny_run(store, run_dir, "model=demo_base", f"model.path={base}", "model.head_dim=16",
                      "model.pretrained_length=64", *overrides)  # fmt: skip
    config.rope.name, config.rope.chain = "nope", [nope(every=every), {"method": "abf", "theta": 1e5}, CLIP]
    return config


def test_training_isolates_documents_and_leaves_the_layers_alone(base, store_64, tmp_path):
    config = run_of(base, store_64, tmp_path)
    model = build_for_training(training_config(config.model, config.rope, 64), str(base), torch.float32).eval()
    assert type(model).__name__ == "SmolLM3ForCausalLM"
    inv_freq = np.where(np.arange(8) < 5, 1e5 ** (-np.arange(8) / 8), 0)
    assert_documents_apart(model, TOKENS, inv_freq=inv_freq, still={1, 3})


def test_a_llama_trains_and_resumes_as_the_class_that_carries_its_layers(base, store_64, tmp_path):
    train(run_of(base, store_64, tmp_path, "trainer.stop_after=2"))
    with pytest.raises(UserError, match=r"position.*nope_layers\(every=2\).*nope_layers\(every=3\)"):
        train(run_of(base, store_64, tmp_path, every=3))
    train(run_of(base, store_64, tmp_path))
    assert json.loads((tmp_path / "run.json").read_text())["chain"].startswith("nope_layers(every=2) > abf")
    directory = resolve_checkpoint(tmp_path)
    content = json.loads((directory / "config.json").read_text())
    assert (content["architectures"], content["no_rope_layers"]) == (["SmolLM3ForCausalLM"], [1, 0, 1, 0, 1])
    assert find_checkpoint(tmp_path).name.endswith("4")
    later = tiny_run(store_64, tmp_path / "later", "model=demo_base", f"model.path={directory}", "rope=inherited",
                     "model.head_dim=16", "model.pretrained_length=64")  # fmt: skip
    assert position_of(training_config(later.model, later.rope, 64)).layers == NopeLayers(every=2)


def test_geometry_sees_layers_that_do_not_rotate(base):
    model, seen = load_for_evaluation(base, [nope(every=4)]), {}
    observe(model, torch.from_numpy(TOKENS), range(5), lambda heads: seen.update({heads.layer: torch.equal(
        heads.queries["before"], heads.queries["after"])}))  # fmt: skip
    assert seen == {0: False, 1: False, 2: False, 3: True, 4: False}


def test_advice_names_the_layers(base, exported, capsys):
    print_advice(composed("advise", f"model.path={exported}"))
    said = capsys.readouterr().out
    assert "layers                one layer in 4 without rotation; all numbers below are of the others" in said
    print_advice(composed("advise", f"model.path={base}", "chain=nope4"))
    assert "warning: layers without rotation: all counts are of the layers that rotate" in capsys.readouterr().out


def test_figures_name_the_layers_beside_the_method():
    spectra = spectra_of(composed("figures", "methods=[rope,nope4]"))
    assert list(spectra) == ["rope", "nope4 (one layer in 4 without rotation)"]


def test_a_smollm3_is_planned_as_it_is_built():
    fields = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip
    config = AutoConfig.for_model("smollm3", **fields)  # which ties its embeddings where nothing is said
    shape = ModelShape.from_config({"model_type": "smollm3", **fields}, "m")
    assert shape.parameters == count_parameters(config)
