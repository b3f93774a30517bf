"""Commands one after the other, each forked from a process that has the imports done.

A command of its own takes several times as long to import torch and transformers as to do its work at a test's size.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from helpers import PYTHONPATH, alone_environment


def run_commands(commands: Sequence[Sequence[str]], root: Path | None = None) -> list[str]:
    """What each ``python WORDS`` has printed; fails the test where one fails.

    ``root``: another repository to run them in, with its sources; None: this one, where the test is.
    """
    sources = [] if root is None else [str(root / "src")]
    environment = {**alone_environment(), "PYTHONPATH": os.pathsep.join([*sources, PYTHONPATH])}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(commands), cwd=root, capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


def main() -> None:
    """Run the commands of stdin, print what they have printed; the first that fails ends it with its output."""
    import preload  # noqa: F401

    printed = []
    for words in json.load(sys.stdin):
        with tempfile.TemporaryFile("w+") as output:
            pid = os.fork()
            if pid == 0:
                os.dup2(output.fileno(), 1)
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
                return  # to the interpreter's own end
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            printed.append(output.read())
        if status:
            sys.exit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}: {printed[-1]}")
    print(json.dumps(printed))


if __name__ == "__main__":
    main()
