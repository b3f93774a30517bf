"""Checksums of JSON, which stand in files that earlier versions wrote."""

import hashlib
import subprocess
import sys

from ropewalk.files import sha256_of_json


def test_json_is_hashed_with_sorted_keys_in_ascii():
    content = {"b": [1.5, "é"], "a": 1}
    spaced, compact = b'{"a": 1, "b": [1.5, "\\u00e9"]}', b'{"a":1,"b":[1.5,"\\u00e9"]}'
    assert sha256_of_json(content) == hashlib.sha256(spaced).hexdigest()
    assert sha256_of_json(content, compact=True) == hashlib.sha256(compact).hexdigest()


def test_the_module_needs_the_standard_library_alone():
    code = "import sys, ropewalk.files; sys.exit(any(name in sys.modules for name in ('blake3', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
