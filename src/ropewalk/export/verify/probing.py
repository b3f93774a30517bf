"""Probes: engines that run in processes which cannot import ropewalk, and the text that they read."""

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.export.output import Unverifiable
from ropewalk.model.load import read_position

MAX_TOKENS = 4096  # compared, unless the original length asks for more
MAX_ROWS = 512  # positions whose logits are compared
# Python's standard library: about 200,000 tokens of a large tokenizer.
_MODULES = (argparse, inspect, typing, turtle, ast, subprocess, textwrap, tempfile, json)


@dataclass(frozen=True)
class Passage:
    """The text that every engine reads.

    Attributes:
        text: real text.
        tokens: of its beginning, int64 (n,).
    """

    text: str
    tokens: NDArray[np.int64]

    def cut(self, tokens: int) -> Passage:
        """Its first so many tokens."""
        return Passage(self.text, self.tokens[:tokens])

    @property
    def rows(self) -> NDArray[np.int64]:
        """Positions whose logits are compared, spread evenly to the last, int64 (at most MAX_ROWS,)."""
        return np.unique(np.linspace(0, len(self.tokens) - 1, min(len(self.tokens), MAX_ROWS)).astype(np.int64))


def read_passage(directory: Path, tokens: int | None = None) -> Passage:
    """Tokens of Python's standard library, for a Hugging Face directory with a tokenizer.

    Args:
        directory: the export.
        tokens: how many; None: to an eighth past the original length, and to twice the trained length or MAX_TOKENS.

    Raises:
        Unverifiable: where there is no tokenizer.
    """
    position = read_position(directory)
    wanted = tokens or max(min(2 * position.trained_length, MAX_TOKENS), position.pretrained_length * 9 // 8)
    if not (directory / "tokenizer.json").is_file():
        raise Unverifiable("not verified: no tokenizer.json, so no text can be read to it")
    tokenizer = open_tokenizer(directory)
    text, ids = "", []
    for module in _MODULES:
        text += inspect.getsource(module)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= wanted:
            break
    return Passage(text, np.array(ids[:wanted], dtype=np.int64))


def stock_logits(directories: list[Path], passage: Passage) -> list[dict[str, NDArray[Any]]]:
    """Logits (rows, vocabulary) and two rows of frequencies (see stock_probe.py) from stock transformers."""
    return run_probe("stock_probe.py", "stock transformers", directories, tokens=passage.tokens, rows=passage.rows)


def llama_logits(files: list[Path], passage: Passage) -> list[dict[str, NDArray[Any]]]:
    """Logits (rows, vocabulary) and the text's tokens as llama.cpp makes them, for each GGUF file."""
    return run_probe("llama_probe.py", "llama.cpp", files, tokens=passage.tokens, rows=passage.rows, text=passage.text)


def run_probe(
    script: str, engine: str, models: list[Path], python: str | None = None, **job: Any
) -> list[dict[str, NDArray[Any]]]:
    """The answers of a probe, arrays by name, one for each model.

    Args:
        script: a file beside this one, run by itself as ``python -I SCRIPT JOB.json``.
        engine: its name, for JOB.json and errors.
        models: what it loads; JOB.json's "models" has the file that each answer goes to, in numpy's npz.
        python: interpreter; None: this one.
        job: the rest of JOB.json; an array is saved as a .npy file, whose name then stands there.

    Raises:
        RuntimeError: with the end of the probe's errors, where it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, value in job.items():
            if isinstance(value, np.ndarray):
                job[name] = str(root / f"{name}.npy")
                np.save(job[name], value)
        answers = {str(model): str(root / f"{i}.npz") for i, model in enumerate(models)}
        (root / "job.json").write_text(json.dumps({"engine": engine, **job, "models": answers}), encoding="utf-8")
        command = [python or sys.executable, "-I", str(Path(__file__).with_name(script)), str(root / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip()[-2000:] or f"it ended with exit code {done.returncode}"
            raise RuntimeError(f"{engine} could not run {', '.join(answers)}:\n{reason}")
        return [dict(np.load(path)) for path in answers.values()]
