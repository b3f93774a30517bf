"""Probes: engines that run in processes which cannot import ropewalk, and the text that they read."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import turtle
import typing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from ropewalk.data.order.batches import VisionInputs, collate
from ropewalk.data.order.visual_batches import VisualReader
from ropewalk.data.store.reader import PackedSequence
from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.data.store.visuals import Visual
from ropewalk.export.output import Unverifiable
from ropewalk.model.load import read_position
from ropewalk.model.vision import pixel_values, placeholders, tokens_per_second, tower_geometry
from ropewalk.rope.pair_axes import PairAxes

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
        vision: a video in the place of some of them, and the positions of all; None: text alone.
    """

    text: str
    tokens: NDArray[np.int64]
    vision: VisionInputs | None = None

    def cut(self, tokens: int) -> Passage:
        """Its first so many tokens, of text alone."""
        return Passage(self.text, self.tokens[:tokens])

    def with_video(self, config: PreTrainedConfig, axes: PairAxes) -> Passage:
        """The same with a video of noise in the place of the second eighth of its tokens.

        It has more frames than rows and columns, so that the rules for positions differ in the text behind it.

        Args:
            config: of the model that reads it.
            axes: of its chain, with the rule for positions; one temporal scale is drawn.

        Raises:
            Unverifiable: for fewer than 96 tokens.
        """
        frames, height, width = min(len(self.tokens) // 48, 16), 2, 3
        if frames < 2:
            raise Unverifiable(f"not verified: {len(self.tokens)} tokens hold no video and text around it; use 96")
        tower, (_, placeholder) = tower_geometry(config), placeholders(config)
        shape = (frames * tower.temporal_patch_size, height * tower.pixels, width * tower.pixels, 3)
        content = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        visual = Visual(len(self.tokens) // 8, frames, height, width, content, frame_seconds=0.5)
        tokens = self.tokens.copy()
        tokens[visual.start : visual.end] = placeholder
        ends, trained = np.array([len(tokens)], np.int32), np.ones(len(tokens), bool)
        row = collate([PackedSequence(tokens.astype(np.uint32), ends, trained, (visual,))])
        reader = VisualReader(axes, 0, tower, placeholders(config), tokens_per_second(config), needs_pixels=True)
        return replace(self, tokens=tokens, vision=reader.completed(row).vision)

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


def stock_logits(directories: list[Path], *passages: Passage) -> list[dict[str, NDArray[Any]]]:
    """Logits (rows, vocabulary) and two rows of frequencies (see stock_probe.py) from stock transformers.

    One process for all: of each directory those of every passage, in their order.
    """
    answers = run_probe("stock_probe.py", "stock transformers", directories, texts=[_inputs(text) for text in passages])
    return [
        {name: answer[f"{name}{number}"] for name in ("logits", "inv_freq")}
        for answer in answers
        for number in range(len(passages))
    ]


def _inputs(passage: Passage) -> dict[str, NDArray[Any]]:
    text: dict[str, NDArray[Any]] = {"tokens": passage.tokens, "rows": passage.rows}
    if passage.vision is not None:
        assert passage.vision.patches is not None
        assert passage.vision.grids is not None
        text |= {
            "position_ids": passage.vision.positions.numpy(),
            "pixel_values_videos": pixel_values(passage.vision.patches, torch.float32).numpy(),
            "video_grid_thw": passage.vision.grids.numpy(),
        }
    return text


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
    # beside the export, where there is space: of 128k tokens 2,048 rows are a gigabyte, and /tmp may be memory
    beside = models[0].absolute().parent
    where = beside if os.access(beside, os.W_OK) else None  # None: the system's, as for an export at a mount's root
    with tempfile.TemporaryDirectory(dir=where, prefix=".verification-") as scratch:
        root = Path(scratch)
        numbers = count()

        def saved(array: NDArray[Any]) -> str:
            path = str(root / f"{next(numbers)}.npy")
            np.save(path, array, allow_pickle=False)
            return path

        answers = {str(model): str(root / f"{i}.npz") for i, model in enumerate(models)}
        content = json.dumps({"engine": engine, **job, "models": answers}, default=saved)
        (root / "job.json").write_text(content, encoding="utf-8")
        command = [python or sys.executable, "-I", str(Path(__file__).with_name(script)), str(root / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip()[-2000:] or f"it ended with exit code {done.returncode}"
            raise RuntimeError(f"{engine} could not run {', '.join(answers)}:\n{reason}")
        return [dict(np.load(path)) for path in answers.values()]
