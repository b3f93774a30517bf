"""Checksums of JSON, which stand in files that earlier versions wrote."""

import hashlib
import subprocess
import sys

from ropewalk.files import copy_data, sha256_of_json


def test_json_is_hashed_with_sorted_keys_in_ascii():
    content = {"b": [1.5, "é"], "a": 1}
    spaced, compact = b'{"a": 1, "b": [1.5, "\\u00e9"]}', b'{"a":1,"b":[1.5,"\\u00e9"]}'
    assert sha256_of_json(content) == hashlib.sha256(spaced).hexdigest()
    assert sha256_of_json(content, compact=True) == hashlib.sha256(compact).hexdigest()


def test_the_module_needs_the_standard_library_alone():
    code = "import sys, ropewalk.files; sys.exit(any(name in sys.modules for name in ('blake3', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_copy_of_a_read_only_directory_can_be_written_again(tmp_path):
    """Modes are compared, as root may write anywhere; a second copy over the first is what a resumed run makes."""
    (tmp_path / "store" / "part").mkdir(parents=True)
    for name in ("a.json", "part/b.json"):
        (tmp_path / "store" / name).write_text(name)
        (tmp_path / "store" / name).chmod(0o444)
    for name in ("part", "."):
        (tmp_path / "store" / name).chmod(0o555)
    for _ in range(2):
        copy_data(tmp_path / "store", tmp_path / "run")
    paths = [tmp_path / "run", *sorted((tmp_path / "run").rglob("*"))]
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["run", "run/a.json", "run/part", "run/part/b.json"]
    assert all(path.stat().st_mode & 0o200 for path in paths)
    assert (tmp_path / "run" / "part" / "b.json").read_text() == "part/b.json"
