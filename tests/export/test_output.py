"""Exports do not meet: one writer a directory, enough disk, and a full disk leaves what stood."""

import errno
import json
import os

import pytest
from safetensors import SafetensorError

from ropewalk.errors import UserError
from ropewalk.export.output import begin_adding, check_addable, only_export, written_beside


def test_two_exports_at_once(tmp_path):
    busy = rf"output=.*out is being written by process {os.getpid()} on .*; wait for it or end it"
    with (
        only_export(tmp_path / "out"),
        only_export(tmp_path / "other"),
        pytest.raises(UserError, match=busy),
        only_export(tmp_path / "out"),
    ):
        pass
    with only_export(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").write_text("stands")
    with pytest.raises(UserError, match=r"output=.*out cannot be written \(No space left on device: .*1.07 GB needed"):
        fill(tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot be written \(Error while serializing: No space left .*1.07 GB needed"):
        fill(tmp_path / "out", SafetensorError("Error while serializing: No space left on device"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "before").read_text() == "stands"


def test_files_are_added_to_their_own_export_alone(tmp_path):
    check_addable(tmp_path / "out", {"step": 2}, overwrite=False)
    (tmp_path / "export.json").write_text('{"step": 1, "dtype": "gguf"}')
    check_addable(tmp_path, {"step": 1}, overwrite=False)
    with pytest.raises(ValueError, match="holds another export"):
        check_addable(tmp_path, {"step": 2}, overwrite=False)
    (tmp_path / "export.json").rename(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="is not empty and is not an earlier export"):
        check_addable(tmp_path, {"step": 2}, overwrite=True)


def test_what_another_step_left_goes_and_what_this_one_left_stays(tmp_path):
    source = tmp_path / "export.json"
    source.write_text('{"step": 1, "dtype": "float32"}')  # a Hugging Face export
    for name in ("a-f16.gguf", "verification.json"):
        (tmp_path / name).write_text("{}")
    begin_adding(tmp_path, {"step": 1}, overwrite=True)
    assert json.loads(source.read_text()) == {"step": 1, "dtype": "float32"}
    assert len(list(tmp_path.iterdir())) == 3
    begin_adding(tmp_path, {"step": 2}, overwrite=True)
    assert json.loads(source.read_text()) == {"step": 2, "dtype": "gguf"}
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]
    begin_adding(tmp_path / "new", {"step": 2}, overwrite=False)
    assert json.loads((tmp_path / "new" / "export.json").read_text())["step"] == 2


def fill(output, error=None):
    with written_beside(output, 2**30) as partial:
        (partial / "half").write_text("x")
        raise error or OSError(errno.ENOSPC, "No space left on device")
