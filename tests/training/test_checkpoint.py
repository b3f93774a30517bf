"""A checkpoint exists when its manifest does, and is only what its manifest says."""

import json
import shutil

import pytest
import torch
from helpers import tiny_run

from ropewalk.training import find_checkpoint, train, verify_checkpoint
from ropewalk.training.checkpoint import check_contract, check_world_size, checkpoint_directory
from ropewalk.training.record import read_metrics


@pytest.fixture(scope="module")
def finished(store_64, tmp_path_factory):
    """A run of four steps, saved after the second and the fourth."""
    run_dir = tmp_path_factory.mktemp("finished")
    train(tiny_run(store_64, run_dir))
    return run_dir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_newest_committed_is_found(copied):
    assert find_checkpoint(copied) == checkpoint_directory(copied, 4)
    (checkpoint_directory(copied, 4) / "manifest.json").unlink()  # a death before the commit
    assert find_checkpoint(copied) == checkpoint_directory(copied, 2)
    (checkpoint_directory(copied, 2) / "manifest.json").unlink()
    assert find_checkpoint(copied) is None


def test_manifest_lists_every_file(finished):
    checkpoint = find_checkpoint(finished)
    manifest = verify_checkpoint(checkpoint)
    on_disk = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    assert any("optim_states" in name for name in on_disk)
    assert manifest["step"] == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(copied, damage):
    checkpoint = find_checkpoint(copied)
    victim = next(checkpoint.rglob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-1])
    else:
        victim.unlink()
    with pytest.raises(ValueError, match=r"optim_states.pt is (missing|not the file that was saved)"):
        verify_checkpoint(checkpoint)


def test_a_path_out_of_the_root_is_not_followed(copied):
    manifest = find_checkpoint(copied) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../run.json"] = {"bytes": 1, "sha256": ""}
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="leads out of"):
        verify_checkpoint(manifest.parent)


def test_contract_names_what_differs():
    saved = {"seed": 0, "max_steps": 4}
    check_contract(saved, {"seed": 0, "max_steps": 4}, [])
    with pytest.raises(ValueError, match=r"seed was 0, is 1.*trainer.accept=\[seed\]"):
        check_contract(saved, {"seed": 1, "max_steps": 4}, [])
    check_contract(saved, {"seed": 1, "max_steps": 4}, ["seed"])
    with pytest.raises(ValueError, match="names no contract entry"):
        check_contract(saved, saved, ["sede"])


def test_another_world_size_is_refused(finished):
    checkpoint = find_checkpoint(finished)
    manifest = verify_checkpoint(checkpoint)
    check_world_size(checkpoint, manifest, 1)
    with pytest.raises(ValueError, match="saved by 1 ranks and this run has 2; resume with 1"):
        check_world_size(checkpoint, manifest, 2)


def test_damage_stops_a_resume_and_its_mend_works(store_64, copied):
    newest = find_checkpoint(copied)
    next(newest.rglob("*model_states.pt")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not the file that was saved.*rename .*manifest.json"):
        train(tiny_run(store_64, copied))
    (newest / "manifest.json").rename(newest / "manifest.json.bad")
    train(tiny_run(store_64, copied))  # from step 2
    assert verify_checkpoint(find_checkpoint(copied))["step"] == 4


def test_what_is_committed_is_not_overwritten(store_64, copied):
    before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"trainer.resume=false, but .* holds step-00000004"):
        train(tiny_run(store_64, copied, "trainer.resume=false"))
    assert (copied / "metrics.jsonl").read_text() == before


def test_accepted_optimizer_settings_take_effect(store_64, copied):
    changes = ["trainer.adam_beta2=0.5", "trainer.weight_decay=0.5", "trainer.accept=[optimizer,max_steps]"]
    train(tiny_run(store_64, copied, "trainer.max_steps=5", *changes))
    groups = next(
        value["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
        for path in find_checkpoint(copied).rglob("*optim_states.pt")
        for value in [torch.load(path, weights_only=False)]
    )
    assert [(group["betas"], group["weight_decay"]) for group in groups] == [((0.9, 0.5), 0.5), ((0.9, 0.5), 0.0)]


@pytest.mark.parametrize(("override", "entry"), [
    ("trainer.seed=7", "seed"), ("trainer.learning_rate=0.5", "schedule"), ("trainer.max_steps=8", "max_steps"),
    ("trainer.weight_decay=0.3", "optimizer"), ("trainer.global_batch_size=8", "global_batch_size"),
    ("trainer.overfit_one_batch=true", "overfit_one_batch"), ("model.theta=5e5", "position"),
])  # fmt: skip
def test_resume_refuses_another_run(store_64, copied, override, entry):
    with pytest.raises(ValueError, match=rf"not the one that was saved: {entry}[.\w]* was .*accept=\[{entry}\]"):
        train(tiny_run(store_64, copied, override))


def test_resume_refuses_another_chain(store_64, copied):
    config = tiny_run(store_64, copied)
    config.rope.chain = [{"method": "abf", "theta": 1e5}]
    with pytest.raises(ValueError, match=r"position.chain was 'rope', is 'abf.theta=1e5.'.*accept="):
        train(config)


def test_interrupted_equals_uninterrupted_bit_for_bit(store_64, finished, tmp_path):
    """Stop after three steps, go on: metrics and every saved tensor are those of the run that was not stopped."""
    run_dir = tmp_path / "stopped"
    train(tiny_run(store_64, run_dir, "trainer.stop_after=3"))
    (checkpoint_directory(run_dir, 3) / "manifest.json").unlink()  # and dies while saving: back to step 2
    train(tiny_run(store_64, run_dir))
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate")
    rows, expected = read_metrics(run_dir), read_metrics(finished)
    assert [[row[k] for k in keys] for row in rows] == [[row[k] for k in keys] for row in expected]
    ours, theirs = (load_states(d) for d in (run_dir, finished))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def load_states(run_dir):
    """Every tensor of the newest checkpoint's shards: masters and both moments."""
    found = {}

    def walk(prefix, value):
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                walk(f"{prefix}.{index}", item)

    for path in sorted(find_checkpoint(run_dir).rglob("*.pt")):
        walk(path.name, torch.load(path, weights_only=False))
    assert any("exp_avg_sq" in name for name in found)
    return found


def test_a_finished_run_is_left_alone(store_64, finished, capsys):
    train(tiny_run(store_64, finished))
    assert "nothing left to do" in capsys.readouterr().out
