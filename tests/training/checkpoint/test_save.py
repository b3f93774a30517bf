"""A checkpoint exists when its manifest does, and is only what its manifest says."""

import json
import re
import resource
import shutil

import pytest
import torch
from helpers import load_states, tiny_run
from omegaconf import OmegaConf
from ranks import start_ranks, tiny_arguments

from ropewalk.runs.directory import RunDirectory
from ropewalk.runs.metrics_file import read_metrics
from ropewalk.training import find_checkpoint, saver, train, verify_checkpoint
from ropewalk.training.checkpoint.save import SaveFailed, _files_of


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
    assert find_checkpoint(copied) == RunDirectory(copied).checkpoint(4)
    (RunDirectory(copied).checkpoint(4) / "manifest.json").unlink()  # a death before the commit
    assert find_checkpoint(copied) == RunDirectory(copied).checkpoint(2)
    (RunDirectory(copied).checkpoint(2) / "manifest.json").unlink()
    assert find_checkpoint(copied) is None


def test_manifest_lists_every_file(finished):
    checkpoint = find_checkpoint(finished)
    manifest = verify_checkpoint(checkpoint)
    on_disk = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk
    assert any("optim_states" in name for name in on_disk)
    assert manifest["step"] == 4


def test_the_manifest_has_the_resolved_config(store_64, finished):
    """All of it, as config.yaml has it."""
    recorded = verify_checkpoint(find_checkpoint(finished))["state"]["config"]
    assert recorded == OmegaConf.to_container(OmegaConf.load(finished / "config.yaml"))
    assert recorded["data"]["store"] == str(store_64.root)


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


@pytest.mark.parametrize("damage", ["shard", "manifest", "lost"])
def test_damage_is_told_and_the_checkpoint_before_is_used(store_64, copied, capsys, damage):
    newest = find_checkpoint(copied)
    if damage == "shard":
        next(newest.rglob("*model_states.pt")).write_bytes(b"")
    elif damage == "lost":
        next(newest.rglob("*optim_states.pt")).unlink()
    else:
        (newest / "manifest.json").write_text('{"format": 1, "fi')
    left = sorted(str(path.relative_to(newest)) for path in newest.rglob("*"))
    expected = [row["loss"] for row in read_metrics(copied)]
    train(tiny_run(store_64, copied))  # from step 2
    told = capsys.readouterr().out
    assert re.search(
        r"warning: \S+ is (missing|not the (file|manifest)).*kept as damaged-step-00000004, .* from step-00000002", told
    )
    assert "from step 2" in told
    aside = newest.with_name("damaged-step-00000004")
    assert sorted(str(path.relative_to(aside)) for path in aside.rglob("*")) == left
    assert verify_checkpoint(newest)["step"] == 4  # saved anew
    assert [row["loss"] for row in read_metrics(copied)] == expected


def test_the_only_checkpoint_damaged_is_an_error(store_64, copied):
    shutil.rmtree(RunDirectory(copied).checkpoint(2))
    newest = find_checkpoint(copied)
    next(newest.rglob("*model_states.pt")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not the file that was saved.*no checkpoint before it; fix .* rename"):
        train(tiny_run(store_64, copied))
    assert find_checkpoint(copied) == newest


def test_a_disk_that_fills_costs_no_checkpoint(store_64, tmp_path, capsys):
    """A limit of 20 kB a file, as a full disk: the save of step 4 fails, training goes on, the last one stands."""
    run_dir = tmp_path / "run"
    arguments = ["trainer.max_steps=6", "trainer.checkpoint_every=2"]
    train(tiny_run(store_64, run_dir, *arguments, "trainer.stop_after=2"))
    real, limits = saver.start_save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(engine, run_dir, step, *rest):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if step == 4 else limits[0], limits[1]))
        try:
            return real(engine, run_dir, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "start_save", on_a_full_disk)
        train(tiny_run(store_64, run_dir, *arguments))
    told = capsys.readouterr().out
    assert re.search(
        r"warning: the checkpoint of step 4 could not be written \(rank 0: .*\); step-00000002 stands", told
    )
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step-00000002", "step-00000006"]
    assert len(read_metrics(run_dir)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
def test_one_rank_with_a_full_disk_fails_the_save_on_all(store_64, tmp_path, in_background):
    """Nobody waits for it in a barrier; the save at the end being the run's purpose, all exit with an error."""
    arguments = ["trainer.max_steps=3", f"trainer.save_in_background={in_background}"]
    with start_ranks(2, tmp_path / "logs", tiny_arguments(store_64, tmp_path, *arguments),
                     fault="files_of_20_kilobytes_on_rank_one") as ranks:  # fmt: skip
        assert ranks.wait() == [1, 1], ranks.output()
    told = ranks.logs[0].read_text()
    assert "warning: the checkpoint of step 2 could not be written (rank 1: " in told
    assert "the checkpoint of step 3 could not be written (rank 1: " in told
    assert find_checkpoint(tmp_path) is None
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_save_that_fails_at_the_end_is_an_error(store_64, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("in the way")
    with pytest.raises(SaveFailed, match=r"step 1 could not be written \(rank 0: .*; there is none before it"):
        train(tiny_run(store_64, run_dir, "trainer.stop_after=1"))


def test_a_directory_that_cannot_be_written_is_found_before_the_model_is_built(store_64, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run_dir=\S+ cannot be written \(Not a directory: .*name another"):
        train(tiny_run(store_64, tmp_path / "file" / "run"))


def test_what_is_committed_is_not_removed_by_a_save_that_fails(store_64, copied, monkeypatch):
    """Another process has committed the step meanwhile: an error, and its checkpoint stands."""
    newest = find_checkpoint(copied)
    aside = shutil.copytree(newest, copied / "aside")
    shutil.rmtree(newest)
    real = saver.start_save

    def late(*arguments):
        shutil.copytree(aside, newest)
        return real(*arguments)

    monkeypatch.setattr(saver, "start_save", late)
    with pytest.raises(SaveFailed, match=r"step-00000004 is committed already .* step-00000004 stands"):
        train(tiny_run(store_64, copied))
    assert verify_checkpoint(newest)["step"] == 4


def test_what_is_committed_is_not_overwritten(store_64, copied):
    before = (copied / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"resume.enabled=false, but .* holds step-00000004"):
        train(tiny_run(store_64, copied, "resume.enabled=false"))
    assert (copied / "metrics.jsonl").read_text() == before


def test_accepted_optimizer_settings_take_effect(store_64, copied):
    changes = ["trainer.adam_beta2=0.5", "trainer.weight_decay=0.5", "resume.accept=[optimizer,max_steps]"]
    train(tiny_run(store_64, copied, "trainer.max_steps=5", *changes))
    groups = next(
        value["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"]
        for path in find_checkpoint(copied).rglob("*optim_states.pt")
        for value in [torch.load(path, weights_only=False)]
    )
    assert [(group["betas"], group["weight_decay"]) for group in groups] == [((0.9, 0.5), 0.5), ((0.9, 0.5), 0.0)]


def test_what_was_accepted_stays_in_the_record(store_64, copied, capsys):
    """Under its step and in words; what was accepted for steps that are lost is forgotten with them."""
    declared = ["primary.pairs=[[a,b]]", "primary.length=64"]
    first = [*declared, "primary.difference=0.1", "trainer.max_steps=6", "resume.accept=[primary,max_steps]"]
    train(tiny_run(store_64, copied, *first, "trainer.stop_after=1"))
    told = capsys.readouterr().out
    assert "resume.accept=max_steps, from step 4 on: max_steps was 4, is 6" in told
    train(tiny_run(store_64, copied, *first, "primary.difference=0.2", "trainer.stop_after=1"))
    shutil.rmtree(RunDirectory(copied).checkpoint(6))
    train(tiny_run(store_64, copied, *first, "primary.difference=0.3"))
    accepted = json.loads(RunDirectory(copied).record.read_text())["accepted"]
    assert [(change["step"], change["entry"]) for change in accepted] == [
        (4, "max_steps"),
        (4, "primary"),
        (5, "primary"),
    ]
    assert accepted[1]["changes"] == [
        "primary.pairs was [], is [['a', 'b']]", "primary.length was None, is 64", "primary.difference was None, is 0.1"
    ]  # fmt: skip
    assert accepted[2]["changes"] == ["primary.difference was 0.1, is 0.3"]


@pytest.mark.parametrize(("override", "entry"), [
    ("trainer.seed=7", "seed"), ("trainer.learning_rate=0.5", "schedule"), ("trainer.max_steps=8", "max_steps"),
    ("trainer.weight_decay=0.3", "optimizer"), ("trainer.global_batch_size=8", "global_batch_size"),
    ("trainer.overfit_one_batch=true", "overfit_one_batch"), ("model.theta=5e5", "position"),
    ("trainer.z_loss=1e-4", "z_loss"), ("guards.spike_window=8", "guards"),
])  # fmt: skip
def test_resume_refuses_another_run(store_64, copied, override, entry):
    with pytest.raises(ValueError, match=rf"not the one that was saved: {entry}[.\w]* was .*accept=\[{entry}\]"):
        train(tiny_run(store_64, copied, override))


def test_entries_that_older_checkpoints_lack_count_as_the_default(store_64, copied, capsys):
    manifest = find_checkpoint(copied) / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["contract"].pop("z_loss") == 0.0
    assert content["contract"].pop("guards") == {"spike_window": None, "spike_deviations": None}
    manifest.write_text(json.dumps(content))
    for override, told in (("guards.spike_window=8", "guards.spike_window was None, is 8"),
                           ("trainer.z_loss=0.1", "z_loss was 0.0, is 0.1")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"not the one that was saved: {told}"):
            train(tiny_run(store_64, copied, override))
    train(tiny_run(store_64, copied))
    assert "nothing left to do" in capsys.readouterr().out


def test_what_a_spike_is_may_not_change_unless_accepted(store_64, tmp_path):
    window = "guards.spike_window=8"
    train(tiny_run(store_64, tmp_path, window, "trainer.stop_after=2"))
    lower = [window, "guards.spike_deviations=3"]
    with pytest.raises(ValueError, match=r"guards.spike_deviations was 6.0, is 3.0\..*accept=\[guards\]"):
        train(tiny_run(store_64, tmp_path, *lower))
    train(tiny_run(store_64, tmp_path, *lower, "resume.accept=[guards]"))
    assert len(read_metrics(tmp_path)) == 4


def test_what_only_ends_a_run_may_change(store_64, copied, capsys):
    """Until a guard ends it, a run has the losses of one that goes on; without a window no loss is a spike."""
    changes = ["guards.max_refused=9", "guards.spike_action=stop", "guards.spike_deviations=3"]
    train(tiny_run(store_64, copied, *changes))
    assert "nothing left to do" in capsys.readouterr().out


def test_resume_refuses_another_chain(store_64, copied):
    config = tiny_run(store_64, copied)
    config.rope.chain = [{"method": "abf", "theta": 1e5}]
    with pytest.raises(ValueError, match=r"position.chain was 'rope', is 'abf.theta=1e5.'.*accept="):
        train(config)


def test_interrupted_equals_uninterrupted_bit_for_bit(store_64, finished, tmp_path):
    """Stop after three steps, go on: metrics and every saved tensor are those of the run that was not stopped."""
    run_dir = tmp_path / "stopped"
    train(tiny_run(store_64, run_dir, "trainer.stop_after=3"))
    (RunDirectory(run_dir).checkpoint(3) / "manifest.json").unlink()  # and dies while saving: back to step 2
    train(tiny_run(store_64, run_dir))
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate")
    rows, expected = read_metrics(run_dir), read_metrics(finished)
    assert [[row[k] for k in keys] for row in rows] == [[row[k] for k in keys] for row in expected]
    ours, theirs = (load_states(d) for d in (run_dir, finished))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_is_left_alone(store_64, finished, capsys):
    train(tiny_run(store_64, finished))
    assert "nothing left to do" in capsys.readouterr().out


def test_what_another_rank_is_just_writing_is_not_taken_for_ones_own(tmp_path):
    """safetensors writes to a hidden file in the same directory, and renames it."""
    for name in ("config.json", "rng_rank_0.safetensors", "rng_rank_1.safetensors", ".tmpXzrxUb"):
        (tmp_path / name).touch()
    assert [path.name for path in _files_of(0, tmp_path)] == ["config.json", "rng_rank_0.safetensors"]
    assert [path.name for path in _files_of(1, tmp_path)] == ["rng_rank_1.safetensors"]
