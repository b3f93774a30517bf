"""Directories as people have them: each fault of config.json or weights is one line that names it."""

import json

import numpy as np
import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ropewalk.config.groups import RopeConfig
from ropewalk.errors import UserError
from ropewalk.export.source import converted_source
from ropewalk.export.verify.check_export import Claim
from ropewalk.model.hf_directory import StoredWeights, read_config, weight_report
from ropewalk.model.load import load_for_evaluation

ENTRY = {"rope_theta": 1e4, "rope_type": "default"}
REFUSED = [
    ({"max_position_embeddings": "64"}, r"max_position_embeddings='64' must be a whole number of tokens"),
    ({"max_position_embeddings": 64.0}, r"refuses it.*max_position_embeddings.*64\.0"),
    ({"rope_parameters": {**ENTRY, "rope_type": "ntk", "factor": 4.0}}, "rope_type='ntk' is not read as a chain"),
    (
        {"rope_parameters": {**ENTRY, "rope_type": "linear", "factor": "4.0"}},
        r"factor='4\.0' must be a positive number",
    ),
    ({"vocab_size": "512"}, "refuses it.*vocab_size.*512"),
    ({"model_type": "my_new_model"}, "model_type='my_new_model', which transformers .* does not know: use"),
    (
        {"model_type": "internlm2", "auto_map": {"AutoConfig": "configuration_x.X"}},
        r"its own code \(auto_map\) is never",
    ),
    ({"model_type": None}, "model_type=None, which transformers"),
    ({"model_type": ["llama"]}, r"model_type=\['llama'\] must be one name"),
    ({"dtype": "auto"}, "dtype='auto' must be one of bfloat16, .*; write that of its weights"),
    ({"torch_dtype": "torch.bfloat16"}, r"torch_dtype='torch\.bfloat16' must be one of"),
    ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' must be one of"),
    ({"dtype": 16}, "dtype=16 must be one of"),
]


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model")


def edited(model, **fields):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return model


def test_a_config_that_can_be_read_two_ways_is_warned_of_once_wherever_it_is_read(model, capsys):
    edited(model, rope_parameters={**ENTRY, "rope_type": "linear", "factor": 4.0}, max_sequence_length=None)  # Vicuna's
    load_for_evaluation(model, length=64)
    read_config(model)
    warning = "linear scaling by 4 is read in the convention of Gemma 3, from 16 tokens to max_position_embeddings=64"
    assert capsys.readouterr().err.count(warning) == 1


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_config_that_cannot_be_read_is_one_line_for_every_reader(model, fields, message):
    edited(model, **fields)
    readers = (
        read_config,
        lambda path: Claim.of(path).faults(),
        load_for_evaluation,
        lambda path: converted_source(str(path), RopeConfig("none")),
    )
    for reader in readers:
        with pytest.raises(UserError, match=message) as error:
            reader(model)
        assert "\n" not in str(error.value)
        assert str(model) in str(error.value)


def test_code_beside_a_known_type_is_not_run_and_does_not_ask(model, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    edited(model, auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    (model / "configuration_x.py").write_text("raise SystemExit('it ran')")
    (model / "modeling_x.py").write_text("raise SystemExit('it ran')")
    assert load_for_evaluation(model).config.model_type == "llama"


def test_phi3_s_first_name_for_longrope_is_read(tmp_path):
    model = save_tiny(tmp_path, "phi3", head_dim=8, pad_token_id=1, eos_token_id=1)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    edited(model, rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "su", **factors},
           original_max_position_embeddings=32)  # fmt: skip
    assert read_config(model).rope_parameters["rope_type"] == "longrope"


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}])
def test_quantized_weights_are_refused(model, quantization):
    edited(model, quantization_config=quantization)
    for reader in (load_for_evaluation, lambda path: converted_source(str(path), RopeConfig("none"))):
        with pytest.raises(UserError, match=f"quantized .quantization_config: {quantization['quant_method']}.; name"):
            reader(model)


def test_buffers_of_every_dtype_and_an_attention_left_in_the_config_are_no_hindrance(model):
    """Masks of bool and counters of int32 lie in older checkpoints, and some name the kernel they were trained with."""
    file, config = model / "model.safetensors", edited(model, attn_implementation="flash_attention_2")
    extra = {"mask": torch.ones(3, dtype=torch.bool), "count": torch.ones(1, dtype=torch.int32)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    report = weight_report(model, read_config(config))
    assert (report.faults, report.unread) == ((), ("count", "mask"))


def damage_pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def damage_truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(("damage", "message"), [
    (damage_pointer, r"model\.safetensors is a Git LFS pointer, not the weights; fetch them"),
    (damage_truncated, r"model\.safetensors cannot be read .*copy it anew"),
])  # fmt: skip
def test_damaged_weights_are_one_line(model, damage, message):
    damage(model / "model.safetensors")
    for reader in (load_for_evaluation, lambda path: converted_source(str(path), RopeConfig("none"))):
        with pytest.raises(UserError, match=message):
            reader(model)


def test_a_missing_shard_and_a_broken_index_are_one_line(model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="40KB")
    shard = next(model.glob("model-00001*"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=rf"names {shard.name}, not there"):
        load_for_evaluation(model)
    shard.write_bytes(content)
    for content in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": 5}}'):
        (model / "model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match="is not an index of weights"):
            load_for_evaluation(model)


def test_a_weight_that_two_shards_have_is_the_same_in_both(model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="40KB")
    first, second, *_ = sorted(model.glob("model-0000*"))
    name, weight = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: weight}, second, {"format": "pt"})
    assert torch.equal(StoredWeights(model)[name], weight)
    save_file({**load_file(second), name: weight + 1}, second, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{first.name} and {second.name} both have {name}, and differ; delete"):
        load_for_evaluation(model)


def test_a_size_that_no_model_can_have_is_one_line(model):
    edited(model, num_key_value_heads=0)
    for reader in (load_for_evaluation, lambda path: weight_report(path, read_config(path))):
        with pytest.raises(UserError, match=r"model cannot be (read|loaded).*by zero"):
            reader(model)


def test_shards_in_the_hubs_cache_are_read(model, tmp_path):
    """Each file of a snapshot is a link to a blob; a name in the index still may not lead out of it."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="40KB")
    snapshot, blobs = tmp_path / "snapshots" / "rev", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    model.rename(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    weights = StoredWeights(snapshot)
    assert {name for name in weights} == set(loaded.state_dict())
    assert torch.equal(weights["lm_head.weight"], loaded.lm_head.weight)
    index = snapshot / "model.safetensors.index.json"
    index.unlink()
    index.write_text(json.dumps({"weight_map": {"a": "../../blobs/model-00001-of-00003.safetensors"}}))
    with pytest.raises(UserError, match="leads out of"):
        StoredWeights(snapshot)


def test_integers_are_not_weights(model):
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.uint8)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert weight_report(model, read_config(model)).faults == (
        f"1 weights are integers, as if quantized, {name} first",
    )
    with pytest.raises(UserError, match=f"has as integers, as quantized weights are kept: {name}"):
        load_for_evaluation(model)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("config.json", "[" * 100000, r"config\.json is not JSON"),
    ("generation_config.json", "{", r"generation_config\.json is not JSON .*; correct it, or delete it"),
    ("generation_config.json", "[]", r"generation_config\.json is not a JSON object; correct it, or delete it"),
])  # fmt: skip
def test_files_that_are_not_json_objects_are_one_line(model, name, content, message):
    (model / name).write_text(content)
    for reader in (load_for_evaluation, lambda path: converted_source(str(path), RopeConfig("none"))):
        with pytest.raises(UserError, match=message):
            reader(model)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": "../x.safetensors"}}'])
def test_an_index_without_shards_is_one_line(model, index):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(index)
    for reader in (load_for_evaluation, lambda path: converted_source(str(path), RopeConfig("none"))):
        with pytest.raises(UserError, match=r"is not an index of weights|leads out of"):
            reader(model)


def test_an_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a LoRA adapter without its base; merge it"):
        read_config(tmp_path)


def test_the_report_is_transformers_own(model):
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    others = {k: v for k, v in weights.items() if k != name}
    others["model.norm.weight"] = torch.zeros(7)
    save_file({**others, "v.bias": torch.zeros(3)}, model / "model.safetensors", metadata={"format": "pt"})
    report = weight_report(model, read_config(model))
    assert report.faults == (
        f"1 weights are missing, {name} first",
        "1 weights have other shapes, model.norm.weight first",
    )
    assert report.unread == ("v.bias",)
    assert len(StoredWeights(model)) == len(weights)


@pytest.mark.parametrize(("content", "message"), [
    ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 64,
      "attn_config": {"alibi": True}}, "model_type=mpt has no rotary module in transformers"),
    ({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 64}, "gpt2 has no rotary"),
    ({"model_type": "qwen2_vl", "text_config": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}},
     "transformers builds no qwen2_vl of this config.json: split"),
    ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 7, "long_factor": [1.0] * 9,
        "original_max_position_embeddings": 32}}, "transformers builds no llama of this config.json"),
])  # fmt: skip
def test_inspecting_a_model_without_a_rotation_of_its_own_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        Claim.of(tmp_path).rotations()


def test_a_wrapper_is_inspected_as_its_language_model(tmp_path):
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
            "intermediate_size": 64, "vocab_size": 64, "head_dim": 16}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    (rotation,) = Claim.of(tmp_path).rotations()
    np.testing.assert_allclose(rotation.inv_freq, 10000.0 ** (-np.arange(0, 16, 2) / 16), rtol=1e-6)
