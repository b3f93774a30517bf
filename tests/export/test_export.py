"""An export is what the checkpoint computes, in a process that has never heard of us; a spoiled one is found out."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import composed, save_tiny, tiny_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ropewalk.export import export, resolve_checkpoint, verify_export, write_export
from ropewalk.export.zero_weights import ZeroWeights
from ropewalk.rope import RopeChain
from ropewalk.rope.position import position_of
from ropewalk.training import find_checkpoint, train

CHAIN = [{"method": "abf", "theta": 1e5}, {"method": "cope", "clip": 4}]


@pytest.fixture(scope="module")
def trained(store_64, tmp_path_factory):
    """Two steps with CoPE from a checkpoint whose weights are large enough for positions to matter."""
    root = tmp_path_factory.mktemp("trained")
    base = save_tiny(root / "base", tie_word_embeddings=True)
    config = tiny_run(store_64, root / "run", "model=demo_base", f"model.path={base}", "model.head_dim=16",
                      "model.pretrained_length=64", "trainer.max_steps=2")  # fmt: skip
    config.rope.chain = CHAIN
    train(config)
    return root / "run"


@pytest.fixture
def exported(trained, tmp_path):
    write_export(find_checkpoint(trained), tmp_path / "export", None, overwrite=False)
    return tmp_path / "export"


def test_stock_transformers_agrees(trained, exported):
    found = verify_export(find_checkpoint(trained), exported)
    assert found.passed
    assert json.loads((exported / "verification.json").read_text())["spectrum_equal"] is True
    assert found.numbers["tokens"] == 128


def test_control_plain_rope_would_not_agree(trained, exported):
    """The same weights read as plain RoPE: the comparison above could not have passed by being blind to positions."""
    change_entry(exported, {"rope_type": "default", "rope_theta": 1e5})
    with pytest.raises(RuntimeError, match=r"NOT VERIFIED.*frequencies DIFFER"):
        verify_export(find_checkpoint(trained), exported)
    found = json.loads((exported / "verification.json").read_text())
    assert found["max_abs_difference"] > 0.01 * found["logit_std"]  # ten times the tolerance


@pytest.mark.parametrize("spoil", ["short_factor", "long_factor", "attention_factor", "weight"])
def test_a_spoiled_export_fails(trained, exported, spoil):
    if spoil == "weight":
        weights = load_file(exported / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"].mul_(1.01)
        save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    else:
        entry = json.loads((exported / "config.json").read_text())["rope_parameters"]
        if spoil == "attention_factor":
            entry[spoil] = 1.05
        else:
            entry[spoil][5] *= 1.01
        change_entry(exported, entry)
    with pytest.raises(RuntimeError, match="NOT VERIFIED"):
        verify_export(find_checkpoint(trained), exported)


def test_an_export_that_claims_another_chain_fails(trained, exported):
    """Its logits are right; whoever reads its metadata would be misled."""
    content = json.loads((exported / "config.json").read_text())
    position = replace(position_of(content), chain=RopeChain([CHAIN[0], {"method": "cope", "clip": 5}]))
    (exported / "config.json").write_text(json.dumps({**content, "ropewalk": position.metadata()}))
    with pytest.raises(RuntimeError, match=r"NOT VERIFIED.*frequencies equal; .* other than the claimed chain"):
        verify_export(find_checkpoint(trained), exported)


def change_entry(directory, entry):
    """In both forms: the older one has the last word in transformers 5."""
    content = json.loads((directory / "config.json").read_text())
    content |= {"rope_parameters": entry, "rope_scaling": entry, "rope_theta": entry["rope_theta"]}
    (directory / "config.json").write_text(json.dumps(content))


def test_directory_is_complete(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    weights = load_file(exported / "model.safetensors")
    assert "lm_head.weight" not in weights  # tied
    assert not any("rotary" in name for name in weights)
    config = json.loads((exported / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["ropewalk"]["chain"] == RopeChain(CHAIN).to_list()
    assert "auto_map" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_weights_are_the_masters(trained, exported):
    """fp32 masters, gathered by DeepSpeed's own tool the eager way."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    masters = get_fp32_state_dict_from_zero_checkpoint(str(find_checkpoint(trained)), tag="zero")
    weights = load_file(exported / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(weight, masters[f"lm.{name}"])


def test_bf16_export_is_the_rounded_weights(trained, tmp_path):
    write_export(find_checkpoint(trained), tmp_path, "bfloat16", overwrite=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    masters = ZeroWeights(find_checkpoint(trained), tied=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name].bfloat16())
    assert verify_export(find_checkpoint(trained), tmp_path).passed


def test_large_weights_are_sharded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ropewalk.export.hf.SHARD_SIZE", "40KB")
    write_export(find_checkpoint(trained), tmp_path, None, overwrite=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert shards == {path.name for path in tmp_path.glob("*.safetensors")}
    assert verify_export(find_checkpoint(trained), tmp_path).passed


def test_resolve_takes_all_three_kinds(trained, exported, tmp_path):
    assert resolve_checkpoint(exported) == exported
    run = shutil.copytree(trained, tmp_path / "run")
    made = resolve_checkpoint(run)
    assert made == run / "export"  # of a finished run, so that its weights lie there once
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    assert resolve_checkpoint(find_checkpoint(run)).samefile(made)
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp  # current: not written again
    with pytest.raises(ValueError, match="is neither a run directory"):
        resolve_checkpoint(tmp_path)
    unfinished = shutil.copytree(trained, tmp_path / "unfinished")
    config = (unfinished / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(config.replace("max_steps: 2", "max_steps: 3"))
    assert resolve_checkpoint(unfinished) == unfinished / "exports" / "step-00000002"


def test_a_runs_own_export_serves_and_is_never_replaced(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    export(composed("export", f"checkpoint={run}"))
    assert resolve_checkpoint(run) == run / "export"
    record = run / "export" / "export.json"
    record.write_text(record.read_text().replace('"step": 2', '"step": 1'))  # as if of another checkpoint
    assert resolve_checkpoint(run) == run / "exports" / "step-00000002"
    assert (run / "export" / "verification.json").exists()


def test_a_killed_export_is_made_again(trained, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ropewalk.export.hf.copy_tokenizer_files", killed)  # weights and config are written by then
        with pytest.raises(KeyboardInterrupt):
            write_export(find_checkpoint(trained), tmp_path / "out", None, overwrite=False)
    assert not (tmp_path / "out").exists()
    write_export(find_checkpoint(trained), tmp_path / "out", None, overwrite=False)
    assert verify_export(find_checkpoint(trained), tmp_path / "out").passed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_overwritten_unasked(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty"):
        write_export(find_checkpoint(trained), tmp_path, None, overwrite=False)
    with pytest.raises(ValueError, match="is not an earlier export"):
        write_export(find_checkpoint(trained), tmp_path, None, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_damaged_shard_is_not_unpickled(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    next(find_checkpoint(run).rglob("*model_states.pt")).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="is not the file that was saved"):
        export(composed("export", f"checkpoint={run}"))


def test_command(trained, tmp_path, capsys):
    export(composed("export", f"checkpoint={trained}", f"output={tmp_path / 'out'}"))
    said = capsys.readouterr().out
    assert "exported" in said
    assert "verified: stock transformers, unable to import ropewalk" in said
    with pytest.raises(ValueError, match="dtype=int8 is not known"):
        export(composed("export", f"checkpoint={trained}", "dtype=int8"))
