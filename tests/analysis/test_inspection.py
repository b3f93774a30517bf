"""What a model rotates with, read off stock classes, beside what its config promises."""

import hashlib
import json

import numpy as np
import pytest
import torch
from helpers import composed, save_tiny, tiny_run
from ranks import run_ranks
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from visual_stores import make_store, video_run

from ropewalk.analysis.inspection import describe, print_inspection, rotations
from ropewalk.model.rotary import inspect_config
from ropewalk.rope import Position, RopeChain
from ropewalk.training.trainer import train


def inspected(directory, capsys, *overrides):
    found = print_inspection(composed("inspect", f"model.path={directory}", *overrides))
    return found, capsys.readouterr().out


def edit(directory, **changes):
    file = directory / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_directory_rotates_as_stock_transformers_builds_it(tmp_path, capsys):
    (rotation,), said = inspected(save_tiny(tmp_path), capsys)
    stock = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq
    assert torch.equal(rotation.inv_freq, stock)
    assert rotation.sha256 == hashlib.sha256(stock.numpy().tobytes()).hexdigest()
    assert "model.rotary_emb: default, 8 pairs, float32, attention scaling 1, at 64 tokens" in said
    assert "chain: plain RoPE, from base 1e4 (read off the stock entry)" in said
    assert "stock transformers rotates with it" in said
    assert "5 do not finish a turn" in said  # 64 tokens, base 1e4, 16 channels: pairs 3 to 7
    assert said.count("e-0") + said.count("e+00") >= 8  # every frequency is there


def test_the_reference_codes_keys_are_named_as_without_effect(tmp_path, capsys):
    edit(save_tiny(tmp_path), use_cope=True, cope_clip_n=4)
    (rotation,), said = inspected(tmp_path, capsys)
    assert (rotation.inv_freq > 0).all()
    assert "'use_cope': True, 'cope_clip_n': 4} in config.json: CoPE's published code reads these" in said
    assert "stock engines ignore them" in said


def test_metadata_that_the_stock_entry_contradicts_is_told(tmp_path, capsys):
    position = Position("cope4", RopeChain.parse("cope(clip=4)"), 1e4, 16, 64, 64)
    edit(save_tiny(tmp_path), rope_parameters=position.rope_parameters(64), ropewalk=position.metadata())
    (rotation,), said = inspected(tmp_path, capsys)
    assert rotation.inv_freq[-1] == 0
    assert "chain: cope(clip=4), from base 1e4 (from its metadata)" in said
    assert "warning" not in said
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    for other in ({"rope_type": "default", "rope_theta": 1e4}, llama3):  # neither stops a pair
        edit(tmp_path, rope_parameters=other)
        assert "stock transformers does NOT rotate with this chain" in inspected(tmp_path, capsys)[1]


def test_a_type_that_follows_the_length_is_read_at_one(tmp_path, capsys):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    entry = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    edit(save_tiny(tmp_path), rope_parameters=entry)
    (short,), said = inspected(tmp_path, capsys, "length=32")
    assert "stock transformers rotates with it" in said
    (long,), said = inspected(tmp_path, capsys, "length=33")
    assert "stock transformers rotates with it" in said
    np.testing.assert_allclose(short.inv_freq / long.inv_freq, 4, rtol=1e-6)


def test_layers_that_differ_are_both_shown(tmp_path, capsys):
    two = {"layer_types": ["sliding_attention", "full_attention"]}
    found, said = inspected(save_tiny(tmp_path, "gemma3_text", **two), capsys)
    assert {r.module for r in found} == {
        "model.rotary_emb[full_attention]", "model.rotary_emb[sliding_attention]"
    }  # fmt: skip
    assert "stock transformers rotates with it" in said


def test_a_live_model_shows_what_a_cast_did(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # a training before it in this process
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path)).to(torch.bfloat16)
    (rotation,) = rotations(model, 64)
    assert rotation.inv_freq.dtype == torch.bfloat16
    assert rotation.equal_on_all_ranks is None
    assert "bfloat16" in describe(rotation)
    (truth,) = inspect_config(model.config, 64)
    assert rotation.sha256 != truth.sha256


@pytest.mark.slow
def test_ranks_are_compared(tmp_path):
    run_ranks(2, tmp_path, [], script="tests/analysis/inspect_ranks.py")


@pytest.mark.parametrize("is_video", [False, True])
def test_a_run_is_read_without_an_export(tmp_path, capsys, store_64, fixture_tokenizer, is_video):
    if is_video:
        videos = make_store(tmp_path / "store", fixture_tokenizer)
        train(video_run(videos, tmp_path / "run", "hope_video", "trainer.max_steps=2"))
    else:
        train(tiny_run(store_64, tmp_path / "run", "trainer.max_steps=1", "trainer.checkpoint_every=1"))
    _, said = inspected(tmp_path / "run", capsys)
    assert "stock transformers rotates with it" in said
    assert ("axes(layout=alternating" in said) == is_video
    assert not list((tmp_path / "run").rglob("*.safetensors.index.json")) + list((tmp_path / "run").glob("export*"))


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="is neither a run directory with a committed checkpoint"):
        print_inspection(composed("inspect", f"model.path={tmp_path}"))


@pytest.mark.parametrize(("name", "instead"), [
    ("llama3_8b", "inspect its checkpoint (model=meta-llama/Meta-Llama-3-8B), or"),
    ("demo_base", "inspect its checkpoint (model=outputs/demo/base/export), or"),
    ("demo", "inspect a checkpoint of it (model=RUN_OR_EXPORT_DIRECTORY), or"),
])  # fmt: skip
def test_a_name_in_configs_model_is_no_checkpoint(name, instead):
    with pytest.raises(ValueError, match=f"model={name} is a name in configs/model") as error:
        print_inspection(composed("inspect", f"model.path={name}"))
    assert instead in str(error.value)
    assert str(error.value).endswith(f"python scripts/analyze.py advise model={name}")
