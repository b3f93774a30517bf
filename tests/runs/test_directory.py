"""A run directory's layout: which checkpoints are committed, which is the newest, and what their manifests say."""

import json
import shutil
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from ropewalk.errors import UserError
from ropewalk.runs.directory import (
    RunDirectory,
    checkpoint_at,
    damaged_name,
    read_manifest,
)
from ropewalk.runs.record import recorded_at


def commit(run: Path, step: int, content: str = '{"format": 1}') -> Path:
    checkpoint = run / f"checkpoints/step-{step:08d}"
    (checkpoint / "zero").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(content)
    return checkpoint


def test_paths_stay_relative_to_a_relative_root_and_are_not_assigned_to():
    run = RunDirectory(Path("outputs/a"))
    assert run.metrics == Path("outputs/a/metrics.jsonl")
    assert run.start_record == Path("outputs/a/start/start.json")
    assert run.checkpoint(7) == Path("outputs/a/checkpoints/step-00000007")
    assert run.refused_at(7) == Path("outputs/a/refused/step-00000007.json")
    assert run.heartbeat(12) == Path("outputs/a/heartbeats/rank_00012.txt")
    with pytest.raises(FrozenInstanceError):
        run.metrics = Path("elsewhere")


def test_the_newest_checkpoint_is_the_last_that_has_a_manifest(tmp_path):
    run = RunDirectory(tmp_path)
    assert (run.newest_checkpoint(), run.committed_step(), run.committed_checkpoints()) == (None, None, [])
    first, second = commit(tmp_path, 2), commit(tmp_path, 10)
    run.checkpoint(12).mkdir()  # its save is not finished
    damaged_name(second).mkdir()
    for name in ("step-00000010.bak", "step-00000010 (copy)", "step-final"):  # of a user's hand
        shutil.copytree(second, second.with_name(name))
    assert run.saved_checkpoints() == [first, second, run.checkpoint(12)]
    assert run.committed_checkpoints() == [first, second]
    assert (run.newest_checkpoint(), run.committed_step()) == (second, 10)


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(tmp_path):
    checkpoint = commit(tmp_path, 4)
    names = []
    for _ in range(3):
        path = damaged_name(checkpoint)
        path.mkdir()
        names.append(path.name)
    assert names == ["damaged-step-00000004", "damaged-step-00000004-2", "damaged-step-00000004-3"]


def test_a_checkpoint_is_named_by_itself_or_by_its_run(tmp_path):
    checkpoint = commit(tmp_path / "run", 2)
    assert checkpoint_at(tmp_path / "run") == checkpoint_at(str(checkpoint)) == checkpoint
    store = tmp_path / "store"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    assert checkpoint_at(store) is None


def test_a_checkpoint_behind_a_link_is_found_in_its_run(tmp_path):
    checkpoint = commit(tmp_path / "run", 2)
    (tmp_path / "link").symlink_to(checkpoint)
    assert RunDirectory.of(tmp_path / "link") == RunDirectory((tmp_path / "run").resolve())


@pytest.mark.parametrize(("content", "said"), [
    ("{", "is not the manifest that was written"), ('{"format": 9}', "has format 9; this version reads 1"),
    ("[]", "is not the manifest that was written"), ("[" * 100_000, "is not the manifest that was written"),
])  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_a_user_error(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        read_manifest(commit(tmp_path, 1, content))


@pytest.mark.parametrize("edited", ["    max_steps: 4", "  max_steps:  4  # a short run"])
def test_a_config_that_was_edited_still_plans_its_steps(tmp_path, edited):
    commit(tmp_path, 4)
    (tmp_path / "config.yaml").write_text(f"trainer:\n{edited}\n")
    assert RunDirectory(tmp_path).is_finished()


@pytest.mark.parametrize("content", [b"a:\n\tb: 1", b"a: 1\na: 2", b"a: ${b}", b"a: \xe9", b"- a"])
def test_a_config_that_cannot_be_read_is_a_user_error(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml (cannot be read|is not a mapping).*; correct it, or move"):
        recorded_at(tmp_path)


def test_a_directory_without_a_manifest_was_never_committed(tmp_path):
    with pytest.raises(UserError, match="never committed"):
        read_manifest(tmp_path)
    manifest = {"format": 1, "step": 3}
    assert read_manifest(commit(tmp_path, 3, json.dumps(manifest))) == manifest
