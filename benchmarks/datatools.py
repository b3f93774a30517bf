"""ProLong's datatools (tokenize, then pack) in an environment of its own, for benchmarks/prepare.py."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("datatools-py==0.5", "tiktoken==0.14.0", "pandas<3")
# mosaicml-streaming imports torchvision for its picture datasets, which have no part in this.
PICTURES = {
    "__init__.py": "",
    "datasets.py": "class VisionDataset: ...\nclass CIFAR10: ...\n",
    "transforms/__init__.py": "",
    "transforms/functional.py": "to_tensor = None\n",
}


class Datatools:
    """Runs the two scripts on JSON lines, one process, Llama 3's tokenizer."""

    def __init__(self, scratch: Path, python: str | None, tokenizer: Path) -> None:
        """Make the environment where ``python`` does not name one."""
        self._scratch = scratch
        if python is None:
            subprocess.run([sys.executable, "-m", "venv", str(scratch / "venv")], check=True)
            python = str(scratch / "venv/bin/python")
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        self._python = python
        for name, text in PICTURES.items():
            path = scratch / "pictures/torchvision" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        code = "import datatools, os; print(os.path.dirname(datatools.__file__))"
        package = Path(self._run("-c", code).strip().splitlines()[-1])
        # The package on the registry leaves the file out that its script asks for.
        shutil.copyfile(tokenizer / "tokenizer.model", package / "scripts/tokenizers/llama3_tokenizer.model")

    def prepare(self, documents: Path, length: int) -> tuple[float, float]:
        """Seconds, and seconds of processors, of both scripts together."""
        tokens, packed = self._scratch / "datatools-tokens", self._scratch / "datatools-packed"
        for path in (tokens, packed):
            shutil.rmtree(path, ignore_errors=True)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        self._run("-m", "datatools.scripts.tokenize", str(documents), str(tokens), "-T", "llama3", "-w", "1")
        self._run(
            "-m", "datatools.scripts.pack", str(tokens), str(packed), "-l", str(length), "-T", "llama3", "-w", "1"
        )
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def _run(self, *arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self._scratch / "pictures")}
        done = subprocess.run(
            [self._python, *arguments], env=environment, cwd=self._scratch, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        return done.stdout
