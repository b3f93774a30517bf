"""Proof that vLLM and SGLang, where installed, build the rotary table of stock transformers."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ropewalk.export.findings import Unverifiable, write_finding
from ropewalk.export.portable import rope_entry
from ropewalk.export.verify.probing import run_probe
from ropewalk.model.load import head_dim

TOLERANCE = 1e-5  # of cos and sin, at the positions compared
POSITIONS = 65536  # compared at most


@dataclass(frozen=True)
class TableVerification:
    """What the comparison of rotary tables found.

    Attributes:
        version: of the engine.
        max_abs_difference: largest difference of any cos or sin, attention scaling included.
        positions: rows compared, from position 0.
        passed: the difference is within tolerance.
    """

    version: str
    max_abs_difference: float
    positions: int
    passed: bool

    def __str__(self) -> str:
        verdict = "verified" if self.passed else "NOT VERIFIED"
        return (
            f"{verdict}: the rotary table of version {self.version} differs by at most {self.max_abs_difference:.2e} "
            f"from transformers' over {self.positions:,} positions"
        )


def verify_table(engine: str, directory: Path, python: str | None = None) -> TableVerification:
    """Compare one engine's table; the finding is recorded.

    Args:
        engine: vllm or sglang.
        directory: the export.
        python: interpreter of the engine's own environment; None: it is looked for beside this package.

    Raises:
        Unverifiable: where it is not installed, or cannot build a table here.
        RuntimeError: where its table differs.
    """
    if python is None and importlib.util.find_spec(engine) is None:
        raise Unverifiable(f"not verified: {engine} is not installed")
    config = AutoConfig.from_pretrained(directory)
    if "rope_type" not in config.rope_parameters:
        raise Unverifiable("not verified: its layers rotate in more than one way")
    positions = min(POSITIONS, config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "found.npz"
        ask_engine(engine, directory, positions, path, python)
        result = compare_tables(path, rotary_table(config, positions))
    write_finding(directory, engine, result)
    if not result.passed:
        raise RuntimeError(f"{directory}: {engine}: {result}")
    return result


def ask_engine(engine: str, directory: Path, positions: int, found: Path, python: str | None = None) -> None:
    """Have an engine write cos and sin of its first ``positions`` positions, and its version, to ``found``.

    Raises:
        Unverifiable: where it cannot.
    """
    try:
        run_probe("table_probe.py", engine, str(directory.resolve()), str(positions), str(found), python=python)
    except (RuntimeError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[-1]
        raise Unverifiable(f"not verified: {engine} could not build its table here ({said})") from None


def compare_tables(found: Path, expected: Mapping[str, NDArray[np.float32]]) -> TableVerification:
    """An engine's cos and sin, in a file of table_probe.py, against ours."""
    with np.load(found) as table:
        apart = np.inf
        if all(table[name].shape == expected[name].shape for name in ("cos", "sin")):
            # np.max, since max() passes over a nan
            apart = float(np.max([np.abs(table[name] - expected[name]).max() for name in ("cos", "sin")]))
        return TableVerification(str(table["version"]), apart, len(expected["cos"]), bool(apart <= TOLERANCE))


def rotary_table(config: PreTrainedConfig, positions: int) -> dict[str, NDArray[np.float32]]:
    """cos and sin as stock transformers computes them, float32 (positions, rotated channels / 2), scaling included."""
    entry = rope_entry(config)
    if entry["rope_type"] == "default":
        rotated = int(head_dim(config) * entry.get("partial_rotary_factor", 1.0))
        channels = torch.arange(0, rotated, 2, dtype=torch.int64).float()
        inv_freq, scaling = 1.0 / entry["rope_theta"] ** (channels / rotated), 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[entry["rope_type"]](config, device=torch.device("cpu"))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inv_freq)
    return {"cos": (angles.cos() * scaling).numpy(), "sin": (angles.sin() * scaling).numpy()}
