"""A conversion without a method is the model that was given, whatever its entry, files and generation settings are."""

import json
import shutil

import pytest
import torch
from helpers import save_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ropewalk.config.groups import RopeConfig
from ropewalk.export.hf import write_hf
from ropewalk.export.source import converted_source
from ropewalk.export.verify.verify_stock import verify_stock

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
KEPT = RopeConfig("default")


PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def model_with(directory, entry, tokenizer=None, **fields):
    save_tiny(directory, head_dim=16, max_position_embeddings=256, **fields)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": entry}))
    if tokenizer is not None:
        shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    return directory


def converted(model, output, rope=KEPT):
    source = converted_source(str(model), rope)
    write_hf(source, output, None, overwrite=False)
    return source


def logits(directory, tokens):
    ids = torch.arange(tokens)[None] % 60
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits


@pytest.mark.parametrize("entry", [DYNAMIC, LONGROPE, YARN], ids=["dynamic", "longrope", "yarn"])
def test_a_stock_entry_stands_as_it_is_and_gives_the_same_logits_at_every_length(tmp_path, entry):
    model = model_with(tmp_path / "model", entry)
    converted(model, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["rope_parameters"] == {**entry, **content["rope_parameters"]}
    assert content["max_position_embeddings"] == 256
    for tokens in (48, 200, 500):
        assert torch.equal(logits(model, tokens), logits(tmp_path / "out", tokens))


@pytest.mark.parametrize("entry", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_verification_reads_both_sides_of_a_change_with_length(tmp_path, entry, fixture_tokenizer):
    model = model_with(tmp_path / "model", entry, fixture_tokenizer)
    source = converted(model, tmp_path / "out")
    finding = verify_stock(source, tmp_path / "out", 400)
    assert finding.passed, finding
    switch = entry.get("original_max_position_embeddings", 256)
    assert finding.numbers["short_tokens"] < switch < finding.numbers["tokens"]
    # the same spectrum at the trained length alone, as the whole of a stock entry: another model
    compiled = source.position.rope_parameters(256)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": compiled, "rope_scaling": None}))
    assert verify_stock(source, tmp_path / "out", 400).passed is False


def test_a_single_file_beside_other_shards_is_an_error(tmp_path):
    model = model_with(tmp_path / "model", PLAIN, seed=1)
    other = AutoModelForCausalLM.from_pretrained(model_with(tmp_path / "other", PLAIN, seed=2))
    other.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    same = AutoModelForCausalLM.from_pretrained(model)
    same.save_pretrained(tmp_path / "same", max_shard_size="20KB")
    for path in (tmp_path / "same").glob("model*"):
        (model / path.name).write_bytes(path.read_bytes())
    converted(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    for path in (tmp_path / "shards").glob("model*"):
        (model / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors beside the shards .* they differ in lm_head\.weight"):
        converted_source(str(model), KEPT)


def test_a_stored_copy_of_a_tied_head_and_unread_weights_are_left_out_by_name(tmp_path, capsys):
    model = model_with(tmp_path / "model", PLAIN, tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head, "v.bias": head[0].clone()}, model / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    converted(model, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "left out: lm_head.weight, stored beside the weight that it is tied to" in printed
    assert "left out: 1 weights that transformers does not read, v.bias" in printed
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()
    save_file({**weights, "lm_head.weight": head + 1}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is stored beside model\.embed_tokens\.weight and differs"):
        converted_source(str(model), KEPT)


def test_a_family_that_transformers_renames_is_whole(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=64
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    converted(tmp_path / "model", tmp_path / "out")
    ours, given = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "model"))
    assert ours.keys() == given.keys()
    assert "embed_out.weight" in ours
    assert torch.equal(logits(tmp_path / "model", 32), logits(tmp_path / "out", 32))


def test_generation_settings_are_kept_and_contradictions_are_named(tmp_path, capsys, fixture_tokenizer):
    model = model_with(tmp_path / "model", PLAIN, fixture_tokenizer)
    given = {"eos_token_id": [7, 8], "pad_token_id": 99999, "temperature": 0.5}
    (model / "generation_config.json").write_text(json.dumps(given))
    converted(model, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["temperature"]) == ([7, 8], 0.5)
    assert "pad_token_id" not in settings
    printed = capsys.readouterr().out
    assert "eos_token_id=[7, 8] is kept, though the tokenizer's is" in printed
    assert "pad_token_id=99999 is not within the 512 tokens: left out" in printed
    assert "temperature without do_sample=true is kept" in printed
