"""Verification by vLLM and SGLang, where installed: their rotary tables against stock transformers'."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from ropewalk.export.findings import Finding, Unverifiable, judged
from ropewalk.export.verify.check_export import Claim
from ropewalk.export.verify.probing import run_probe
from ropewalk.model.rotary import chain_rotation, inspect_config

TOLERANCE = 1e-5  # of cos and sin, at the positions compared
POSITIONS = 65536  # compared at most


def verify_table(engine: str, directory: Path, python: str | None = None) -> Finding:
    """Compare one engine's table; see :func:`compare_tables`.

    Args:
        engine: vllm or sglang.
        directory: the export.
        python: interpreter of the engine's own environment; None: it is looked for beside this package.

    Raises:
        Unverifiable: where it is not installed, or cannot build a table here.
    """
    if python is None and importlib.util.find_spec(engine) is None:
        raise Unverifiable(f"not verified: {engine} is not installed")
    claim = Claim.of(directory)
    if "rope_type" not in claim.config.rope_parameters:
        raise Unverifiable("not verified: its layers rotate in more than one way")
    positions = min(POSITIONS, claim.config.max_position_embeddings)
    table = engine_table(engine, directory, positions, python)
    return compare_tables(table, rotary_table(claim.config, positions), claim.faults())


def engine_table(engine: str, directory: Path, positions: int, python: str | None = None) -> dict[str, NDArray[Any]]:
    """cos and sin, (positions, rotated channels / 2), as an engine rotates, and its version.

    Raises:
        Unverifiable: where it cannot.
    """
    try:
        return run_probe("table_probe.py", engine, [directory.resolve()], python, positions=positions)[0]
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        raise Unverifiable(f"not verified: {engine} could not build its table here ({reason})") from None


def compare_tables(
    table: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[np.float32]], faults: list[str]
) -> Finding:
    """An engine's table against transformers'; passed where they agree within tolerance.

    Its numbers: version of the engine, max_abs_difference of any cos or sin, attention scaling included, and
    positions, the rows compared, from position 0.
    """
    apart, positions = np.inf, len(expected["cos"])
    if all(table[name].shape == expected[name].shape for name in ("cos", "sin")):
        # np.max, since max() passes over a nan
        apart = float(np.max([np.abs(table[name] - expected[name]).max() for name in ("cos", "sin")]))
    return judged(
        apart <= TOLERANCE,
        f"the rotary table of version {table['version']} differs by at most {apart:.2e} from transformers' over "
        f"{positions:,} positions",
        faults,
        version=str(table["version"]),
        max_abs_difference=apart,
        positions=positions,
    )


def rotary_table(config: PreTrainedConfig, positions: int) -> dict[str, NDArray[np.float32]]:
    """cos and sin as stock transformers computes them, float32 (positions, rotated channels / 2), scaling included."""
    rotation = chain_rotation(inspect_config(config, positions))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), rotation.inv_freq)
    return {
        "cos": (angles.cos() * rotation.attention_scaling).numpy(),
        "sin": (angles.sin() * rotation.attention_scaling).numpy(),
    }
