"""Checksums of JSON, which stand in files that earlier versions wrote."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from ropewalk import files
from ropewalk.errors import UserError
from ropewalk.files import (
    check_space,
    check_writable,
    copy_files,
    only_writer,
    read_object,
    replace_atomically,
    sha256_of_json,
    write_atomically,
    writing,
)


def test_json_is_hashed_with_sorted_keys_in_ascii():
    content = {"b": [1.5, "é"], "a": 1}
    spaced, compact = b'{"a": 1, "b": [1.5, "\\u00e9"]}', b'{"a":1,"b":[1.5,"\\u00e9"]}'
    assert sha256_of_json(content) == hashlib.sha256(spaced).hexdigest()
    assert sha256_of_json(content, compact=True) == hashlib.sha256(compact).hexdigest()


def test_the_module_needs_the_standard_library_alone():
    code = "import sys, ropewalk.files; sys.exit(any(name in sys.modules for name in ('blake3', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


HOLDER = """
import sys, time
from pathlib import Path
from ropewalk.files import only_writer
with only_writer(Path(sys.argv[1]), "output=o"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes ``tmp_path / "o"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "o")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_directory_has_one_writer_until_it_is_gone(tmp_path, holder, capsys):
    with (
        pytest.raises(UserError, match=rf"output=o is being written by process {holder.pid} on .*; wait for it or end"),
        only_writer(tmp_path / "o", "output=o"),
    ):
        pass
    with only_writer(tmp_path / "o", "output=o", "share-1-owner.json"):  # another part of it
        pass
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and its parent has not asked for it yet
    with only_writer(tmp_path / "o", "output=o"):
        said = capsys.readouterr().out
        assert said.startswith(f"output=o: process {holder.pid} on ")
        assert said.endswith(", which was writing it, is gone; its work is taken over\n")
        assert said.count("\n") == 1
    assert list((tmp_path / "o").iterdir()) == []


def of_another_node(directory, seconds_ago):
    directory.mkdir(exist_ok=True)
    claim = directory / "owner.json"
    claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "id": "x"}))
    os.utime(claim, (time.time() - seconds_ago,) * 2)
    return claim


def test_a_writer_of_another_node_lives_while_its_file_is_renewed(tmp_path, monkeypatch, capsys):
    claim = of_another_node(tmp_path / "o", 100)  # less than two minutes: it is watched
    timer = threading.Timer(0.5, os.utime, [claim])
    timer.start()
    with pytest.raises(UserError, match="process 1 on elsewhere"), only_writer(tmp_path / "o", "output=o"):
        pass
    timer.join()
    of_another_node(tmp_path / "o", 121)  # and not renewed
    with only_writer(tmp_path / "o", "output=o"):
        assert json.loads(claim.read_text())["pid"] == os.getpid()
    of_another_node(tmp_path / "o", 121).write_text("torn {")
    os.utime(claim, (0, 0))
    with only_writer(tmp_path / "o", "output=o"):
        pass
    monkeypatch.setattr(files, "DEAD_AFTER", 1.5)
    for seconds_ago in (0, -9999):  # of a clock that was ahead
        of_another_node(tmp_path / "o", seconds_ago)
        began = time.monotonic()
        with only_writer(tmp_path / "o", "output=o"):
            assert time.monotonic() - began > 1.4
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "output=o: process 1 on elsewhere has begun to write it; watched for a sign of life",
        "output=o: process 1 on elsewhere, which was writing it, is gone; its work is taken over",
    ]


def test_the_file_of_an_owner_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BEAT", 0.05)
    with only_writer(tmp_path, "output=o"):
        os.utime(tmp_path / "owner.json", (0, 0))
        time.sleep(0.5)
        assert time.time() - (tmp_path / "owner.json").stat().st_mtime < 5


def test_copies_are_data_not_modes(tmp_path):
    """A store that may only be read leaves a run that can be resumed."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c.txt").write_text("c")
    (tmp_path / "a/b/c.txt").chmod(0o444)
    (tmp_path / "a/b").chmod(0o555)
    for _ in range(2):
        copy_files(tmp_path / "a", tmp_path / "copy")
    assert (tmp_path / "copy/b/c.txt").read_text() == "c"
    assert (tmp_path / "copy/b").stat().st_mode & 0o200
    assert (tmp_path / "copy/b/c.txt").stat().st_mode & 0o200


def test_text_is_utf_8_whatever_the_locale():
    """A call without encoding= would take the locale's."""
    for path in Path(files.__file__).parent.rglob("*.py"):
        assert not re.search(r"\.read_text\(\)|\.open\(\"[wa]\"\)", path.read_text(encoding="utf-8")), path


def test_two_writers_of_a_file_share_no_partial(tmp_path):
    """The second one begins and ends while the first is at it."""

    def write(partial):
        partial.write_text("first")
        write_atomically(tmp_path / "a.json", "second")
        assert partial.read_text() == "first"

    replace_atomically(tmp_path / "a.json", write)
    assert (tmp_path / "a.json").read_text() == "first"
    with pytest.raises(ZeroDivisionError):
        replace_atomically(tmp_path / "a.json", lambda partial: 1 / 0 if partial.write_text("x") else None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "o/x"), OSError(errno.EROFS, "Read-only file system", "o/x"),
        PermissionError(errno.EACCES, "Permission denied"), OSError("4096 requested and 0 written"),
        Exception("No space left on device (os error 28)"),
    ],
)  # fmt: skip
def test_an_error_of_the_disk_is_one_line(tmp_path, error):
    """Also numpy's and tokenizers', which have no number."""
    with (
        pytest.raises(UserError, match=r"output=o cannot be written \(.*: .*; about 2.5 GB needed, .* GB free\); free"),
        writing("output=o", tmp_path / "not/made", lambda: 2_500_000_000),
    ):
        raise error
    for other in (OSError(errno.EIO, "Input/output error"), ValueError("a fault of the program")):
        with pytest.raises(type(other)), writing("output=o", tmp_path):
            raise other


def test_a_disk_too_small_is_the_same_line(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 10**9))
    check_space("output=o", tmp_path / "not/made", 9 * 10**8)
    line = r"output=o cannot be written \(the disk is too small; about 2 GB needed, 1 GB free\); free space there, or"
    with pytest.raises(UserError, match=line):
        check_space("output=o", tmp_path / "not/made", 2 * 10**9)


def test_a_file_that_is_read_elsewhere_is_not_blamed_on_the_output(tmp_path):
    read = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "documents/a.txt"))
    with pytest.raises(PermissionError), writing("output=o", tmp_path / "o"):
        raise read
    beside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "o.partial/a"))
    with pytest.raises(UserError, match=r"output=o cannot be written"), writing("output=o", tmp_path / "o"):
        raise beside
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"output=o cannot be written \(Not a directory: "),
        only_writer(tmp_path / "file/below", "output=o"),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"{", "is not JSON"), (b"[]", "is not a JSON object"), (b"\xff", "is not JSON"), (b"[" * 100_000, "is not JSON")],
)
def test_a_file_that_holds_no_object_is_one_line(tmp_path, content, fault):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json {fault}.*; correct it, or move it away"):
        read_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
    assert read_object(tmp_path / "not there") == {}


def test_an_output_that_cannot_be_made_is_refused_and_nothing_is_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, tmp_path / "new" / "below", file):
        check_writable("output=o", path)
    with pytest.raises(UserError, match=r"output=o cannot be written \(Not a directory: .*file; .*another directory"):
        check_writable("output=o", file / "a" / "b")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_an_output_in_a_directory_of_others_is_refused(tmp_path):
    """Also where a directory above, as the tests' own, may not be entered."""
    if (child := os.fork()) == 0:  # for root every directory is open
        code = 2
        try:
            os.setgid(65534)
            os.setuid(65534)
            check_writable("output=o", tmp_path / "o")
        except UserError as error:
            code = int("output=o cannot be written (Permission denied: " in str(error))
        finally:
            os._exit(code)  # whatever is raised, no second process goes on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_the_file_that_becomes_an_output_is_a_part_of_it(tmp_path):
    report = tmp_path / "report.html"
    with pytest.raises(UserError, match="output=r cannot be written"), writing("output=r", report):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "report.html.1a2b3c4d.partial"))
    with pytest.raises(PermissionError), writing("output=r", report):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run" / "metrics.jsonl"))
