"""A model that was not trained here, given a method: the same weights, a spectrum, and nothing else."""

import json
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from helpers import alone_environment, composed, save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ropewalk.config.groups import RopeConfig
from ropewalk.errors import UserError
from ropewalk.export import export
from ropewalk.export.hf import write_hf
from ropewalk.export.output import findings_of
from ropewalk.export.source import converted_source
from ropewalk.export.verify.check_export import check_directory
from ropewalk.model.load import load_for_evaluation

CLIP = RopeConfig(name="clip", chain=[{"method": "hardclip", "clip": 3}])


@pytest.fixture
def model(tmp_path, fixture_tokenizer):
    directory = save_tiny(tmp_path / "model", rope_theta=1e5)
    shutil.copytree(fixture_tokenizer, directory, dirs_exist_ok=True)
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 3], "temperature": 0.6, "do_sample": true}')
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    return directory


def test_conversion_by_command(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))  # as a /tmp that takes nothing
    before = (model / "config.json").read_text()
    output = export(composed("export", f"model.path={model}", "rope.name=clip",
                             "rope.chain=[{method:hardclip,clip:3}]", f"output={tmp_path / 'out'}"))  # fmt: skip
    assert "verified: stock transformers" in capsys.readouterr().out
    assert findings_of(output)["transformers"]["passed"] is True
    assert all(finding.passed for finding in check_directory(output)[1])
    assert (model / "config.json").read_text() == before
    card = (output / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "the method was applied as it is" in card
    settings = json.loads((output / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [1, 3], "temperature": 0.6, "do_sample": True, "bos_token_id": 0}


def test_a_model_in_the_working_directory_keeps_its_name(model, tmp_path, monkeypatch):
    """Without it the export would be the directory of all exports, and later ones would lie in it."""
    monkeypatch.chdir(model)
    made = export(composed("export", "model.path=.", "verify=false", f"paths.output_dir={tmp_path / 'o'}"))
    assert made == tmp_path / "o/exports/model"


@pytest.mark.parametrize(
    ("value", "dtype", "to", "fault"),
    [
        (float("nan"), None, "hf", "NaN or infinite; name an earlier checkpoint, or a whole copy of the model"),
        (float("-inf"), None, "gguf", "NaN or infinite; name an earlier checkpoint"),
        (1e5, "float16", "all", "NaN or infinite, which are too large for float16: export in another dtype"),
    ],
)
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(model, tmp_path, value, dtype, to, fault):
    weights, name = load_file(model / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    weights[name][3, :2] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.iterdir())
    words = [f"model.path={model}", f"output={tmp_path / 'out'}", f"to={to}", *([f"dtype={dtype}"] if dtype else [])]
    with pytest.raises(UserError, match=f"{name} holds 2 numbers of {weights[name].numel():,} that are {fault}"):
        export(composed("export", *words))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_failed_verification_ends_the_command_with_a_line(model, tmp_path):
    output = export(composed("export", f"model.path={model}", f"output={tmp_path / 'out'}", "verify=false"))
    weights = load_file(output / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "scripts/export.py", f"model={model}", f"output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone_environment())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"error: {output}: transformers: NOT VERIFIED: stock transformers" in done.stderr
    assert "- transformers: NOT VERIFIED" in (output / "README.md").read_text()
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "model_type", ["mistral", "qwen2", "qwen3", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text"]
)
def test_every_family_is_converted(tmp_path, model_type):
    directory = save_tiny(tmp_path / "model", model_type, eos_token_id=1, pad_token_id=1, num_hidden_layers=6,
                          tie_word_embeddings=model_type.startswith("gemma"))  # fmt: skip
    write_hf(converted_source(str(directory), CLIP), tmp_path / "out", None, overwrite=False)
    load_for_evaluation(tmp_path / "out")  # asserts the spectrum
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(directory / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _, findings = check_directory(tmp_path / "out")
    assert [finding.text for finding in findings if not finding.passed] == ["no tokenizer.json"]
    clipped = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.rotary_emb
    name = "full_attention_inv_freq" if hasattr(clipped, "full_attention_inv_freq") else "inv_freq"
    assert (getattr(clipped, name)[-3:] == 0).all()


def test_weights_of_several_dtypes_keep_theirs(model, tmp_path):
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v.bfloat16() if k != name else v for k, v in weights.items()}, model / "model.safetensors")
    write_hf(converted_source(str(model), CLIP), tmp_path / "out", None, overwrite=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[name], weights[name])
    assert all(found[k].dtype == torch.bfloat16 for k in weights if k != name)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    write_hf(converted_source(str(model), CLIP), tmp_path / "half", "float16", overwrite=False)
    assert {v.dtype for v in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}


def test_a_scaling_reaches_its_length(model, tmp_path):
    yarn = RopeConfig(name="yarn", chain=[{"method": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}])
    write_hf(converted_source(str(model), yarn), tmp_path / "out", None, overwrite=False)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_type"] == "longrope"  # the one form that all versions read alike


@pytest.mark.parametrize(("arguments", "message"), [
    (["checkpoint=x", "model.path=y"], "checkpoint=x and model=y are both set"),
    (["checkpoint=x", "rope=cope20"], "rope=cope20 is for model="),
    (["model.path=MODEL", "test_time=auto"], "test_time=auto scales inputs past the trained length alone"),
    (["model.path=MODEL", "dtype=int8"], "dtype=int8 is not known"),
    (["model.path=MODEL", "to=onnx"], "to=onnx is not known; use one of: hf, gguf, all"),
    (["model.path=MODEL", "to=gguf", "gguf=q4_0", "verify=false"], "gguf=q4_0 is not written; use one of: f32"),
    (["model.path=nowhere"], "model=nowhere is not a directory; name a Hugging Face directory or a hub id"),
    (["model.path=MODEL", "rope=cope20"], "clip=20 is not within the 8 pairs"),
])  # fmt: skip
def test_bad_input(model, tmp_path, arguments, message):
    given = [argument.replace("MODEL", str(model)) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        export(composed("export", *given, f"output={tmp_path / 'out'}"))
    assert not list((tmp_path / "out").glob("*.safetensors")) if (tmp_path / "out").exists() else True


def test_pickled_weights_are_not_opened(model, tmp_path):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled .bin files are not opened"):
        converted_source(str(model), CLIP)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"), "1 weights are missing, model.layers.1"),
    (lambda weights: weights.update({"model.norm.weight": torch.ones(31)}), "1 weights have other shapes, model.norm"),
])  # fmt: skip
def test_a_model_that_is_not_whole_is_refused(model, spoil, said):
    weights = load_file(model / "model.safetensors")
    spoil(weights)
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ValueError, match=f"does not fit its own config.json: {said}.*; copy it again, whole"):
        converted_source(str(model), CLIP)


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    weights = load_file(model / "model.safetensors")
    cut = {k: v[:500].contiguous() if v.shape[0] == 512 else v for k, v in weights.items()}
    save_file(cut, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"has 512 entries and the model 500 embeddings"):
        write_hf(converted_source(str(model), CLIP), tmp_path / "out", None, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached(model, monkeypatch):
    from ropewalk.export.command import push

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"push_to_hub=a/b failed .*is whole: log in with"):
        push(model, "a/b", private=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="model=a/b is neither a Hugging Face directory nor a hub model"):
        converted_source("a/b", CLIP)
