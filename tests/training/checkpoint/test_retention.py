"""Which checkpoints go: the rule against hand-made directories, and once through real runs."""

import json
import shutil

import pytest
from helpers import tiny_run

from ropewalk.training import find_checkpoint, train, verify_checkpoint
from ropewalk.training.saver import prune_checkpoints


def checkpoint(run_dir, step, *, committed=True, content=b"weights"):
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "shard.bin").write_bytes(content)
    if committed:
        files = {"shard.bin": {"bytes": len(b"weights"), "sha256": "not looked at"}}
        (directory / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    return directory


def steps(run_dir):
    return [int(path.name.removeprefix("step-")) for path in sorted((run_dir / "checkpoints").iterdir())]


@pytest.mark.parametrize(("keep_last", "keep_every", "kept"), [
    (None, None, [10, 20, 30, 40, 50]), (1, None, [50]), (2, None, [40, 50]), (9, None, [10, 20, 30, 40, 50]),
    (1, 20, [20, 40, 50]), (2, 30, [30, 40, 50]),
])  # fmt: skip
def test_the_newest_and_the_milestones_are_kept(tmp_path, keep_last, keep_every, kept):
    for step in (10, 20, 30, 40, 50):
        checkpoint(tmp_path, step)
    gone = prune_checkpoints(tmp_path, keep_last, keep_every)
    assert steps(tmp_path) == kept
    assert sorted(int(path.name[5:]) for path in gone) == sorted({10, 20, 30, 40, 50} - set(kept))


def test_a_damaged_checkpoint_neither_counts_nor_goes(tmp_path):
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 40, content=b"cut")
    (checkpoint(tmp_path, 50) / "shard.bin").unlink()
    (checkpoint(tmp_path, 60) / "manifest.json").write_text('{"format"')
    prune_checkpoints(tmp_path, 1, None)
    assert steps(tmp_path) == [30, 40, 50, 60]  # 30 is the newest that is whole


def test_torn_directories_before_the_newest_go_and_one_being_written_stays(tmp_path):
    checkpoint(tmp_path, 10, committed=False)
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 30, committed=False)
    prune_checkpoints(tmp_path, 1, None)
    assert steps(tmp_path) == [20, 30]


def test_a_death_while_deleting_leaves_no_checkpoint_behind(tmp_path, monkeypatch):
    for step in (10, 20):
        checkpoint(tmp_path, step)

    def dies(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, 1, None)
    assert find_checkpoint(tmp_path).name == "step-00000020"
    assert not (tmp_path / "checkpoints" / "step-00000010" / "manifest.json").exists()
    prune_checkpoints(tmp_path, 1, None)
    assert steps(tmp_path) == [20]


def test_a_run_keeps_what_it_is_told_and_goes_on(tmp_path, store_64):
    run = tmp_path / "run"
    keep = ["trainer.keep_last=1", "trainer.keep_every=3", "trainer.checkpoint_every=1", "trainer.max_steps=5"]
    train(tiny_run(store_64, run, *keep, "trainer.stop_after=4"))
    assert steps(run) == [3, 4]
    train(tiny_run(store_64, run, *keep))
    assert steps(run) == [3, 5]
    assert verify_checkpoint(find_checkpoint(run))["step"] == 5


@pytest.mark.parametrize(("override", "message"), [
    ("trainer.keep_last=0", "trainer.keep_last=0 must be positive"),
    ("trainer.keep_every=2", r"keep_every=2 without trainer\.keep_last: nothing is deleted"),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused(tmp_path, store_64, override, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(store_64, tmp_path / "run", override))
