"""What verifications share: real text, and processes that cannot import ropewalk."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import subprocess
import sys
import tempfile
import textwrap
import turtle
import typing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, AutoTokenizer

from ropewalk.export.findings import Unverifiable
from ropewalk.rope.position import position_of

MAX_TOKENS = 4096  # compared, unless the original length asks for more
MAX_ROWS = 512  # positions whose logits are compared


@dataclass(frozen=True)
class Probe:
    """What every engine is asked.

    Attributes:
        text: real text.
        tokens: of its beginning, int64 (n,).
        rows: positions whose logits are compared, int64 (at most MAX_ROWS,), the last one among them.
    """

    text: str
    tokens: NDArray[np.int64]
    rows: NDArray[np.int64]

    def shortened(self, most: int) -> Probe:
        """The first ``most`` tokens."""
        return make_probe(self.text, self.tokens[:most])


def probe_of(directory: Path, tokens: int | None = None) -> Probe:
    """Tokens of Python's standard library, for a Hugging Face directory with a tokenizer.

    Args:
        directory: the export.
        tokens: how many; None: to an eighth past the original length, and to twice the trained length or MAX_TOKENS.

    Raises:
        Unverifiable: where there is no tokenizer.
    """
    position = position_of(AutoConfig.from_pretrained(directory))
    wanted = tokens or max(min(2 * position.trained_length, MAX_TOKENS), position.pretrained_length * 9 // 8)
    if not (directory / "tokenizer.json").is_file():
        raise Unverifiable("not verified: no tokenizer.json, so no text can be read to it")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text, ids = "", []
    for module in _modules():
        text += inspect.getsource(module)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= wanted:
            break
    return make_probe(text, np.array(ids[:wanted], dtype=np.int64))


def _modules() -> list[ModuleType]:
    """About 200,000 tokens of a large tokenizer."""
    return [argparse, inspect, typing, turtle, ast, subprocess, textwrap, tempfile, json]


def make_probe(text: str, tokens: NDArray[np.int64]) -> Probe:
    """A probe of these tokens, its rows spread evenly."""
    rows = np.unique(np.linspace(0, len(tokens) - 1, min(len(tokens), MAX_ROWS)).astype(np.int64))
    return Probe(text, tokens, rows)


def run_probe(name: str, *arguments: str, python: str | None = None) -> str:
    """Run a probe file of this package by itself; returns what it printed.

    Raises:
        RuntimeError: with the end of its errors, where it fails.
    """
    command = [python or sys.executable, "-I", str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-2000:] or f"it ended with exit code {done.returncode}")
    return done.stdout


def stock_logits(directories: list[Path], probe: Probe) -> list[dict[str, NDArray[Any]]]:
    """Logits (rows, vocabulary) and two rows of frequencies (see stock_probe.py) from stock transformers."""
    return _ask("stock_probe.py", "stock transformers", directories, probe)


def llama_logits(files: list[Path], probe: Probe) -> list[dict[str, NDArray[Any]]]:
    """Logits (rows, vocabulary) and the text's tokens as llama.cpp makes them, for each GGUF file."""
    return _ask("llama_probe.py", "llama.cpp", files, probe)


def _ask(script: str, engine: str, models: list[Path], probe: Probe) -> list[dict[str, NDArray[Any]]]:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        np.save(root / "tokens.npy", probe.tokens)
        np.save(root / "rows.npy", probe.rows)
        found = {str(model): str(root / f"{place}.npz") for place, model in enumerate(models)}
        job = {"tokens": str(root / "tokens.npy"), "rows": str(root / "rows.npy"), "text": probe.text, "models": found}
        (root / "job.json").write_text(json.dumps(job), encoding="utf-8")
        try:
            run_probe(script, str(root / "job.json"))
        except RuntimeError as error:
            raise RuntimeError(f"{engine} could not run {', '.join(map(str, models))}:\n{error}") from None
        return [dict(np.load(path)) for path in found.values()]
