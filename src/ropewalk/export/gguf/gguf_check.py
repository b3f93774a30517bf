"""What a GGUF file says of position, against what its model's config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.export.gguf.gguf_file import METADATA, gguf_fields
from ropewalk.export.gguf.gguf_position import FACTORS, GgufPosition
from ropewalk.rope import Position
from ropewalk.rope.position import METADATA_KEY, position_of


def position_faults(path: Path, expected: GgufPosition) -> list[str]:
    """Where a GGUF file does not say ``expected``; empty where it does."""
    fields, tensors = gguf_fields(path)
    arch = fields["general.architecture"]
    faults = []
    base = fields.get(f"{arch}.rope.freq_base", 1e4)
    if not np.isclose(base, expected.freq_base, rtol=1e-6):
        faults.append(f"rope.freq_base is {base:g}, not {expected.freq_base:g}")
    faults += _factor_faults(tensors.get(FACTORS), expected)
    attention = fields.get(f"{arch}.rope.scaling.attn_factor", 1.0)
    if not np.isclose(attention, expected.attn_factor or 1.0, rtol=1e-6):
        faults.append(f"rope.scaling.attn_factor is {attention:g}, not {expected.attn_factor or 1.0:g}")
    return faults + _scaling_faults(fields, f"{arch}.rope.scaling.", expected)


def _factor_faults(found: Any, expected: GgufPosition) -> list[str]:
    if (found is None) != (expected.factors is None):
        return [f"{FACTORS} is {'missing' if found is None else 'there, and should not be'}"]
    if found is None or expected.factors is None:
        return []
    if found.shape != expected.factors.shape:
        return [f"{FACTORS} has {found.size} factors, not {expected.factors.size}"]
    wrong = np.flatnonzero(found != expected.factors)
    return [f"{FACTORS} differs at pairs {wrong.tolist()}"] if wrong.size else []


def _scaling_faults(fields: dict[str, Any], prefix: str, expected: GgufPosition) -> list[str]:
    faults = []
    for key in ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"):
        found, wanted = fields.get(prefix + key), expected.scaling.get(key)
        same = found == wanted or (isinstance(found, float) and wanted is not None and np.isclose(found, wanted))
        if not same and not (key == "type" and wanted is None and found == "none"):
            faults.append(f"rope.scaling.{key} is {found}, not {wanted}")
    return faults


def claimed_position(fields: dict[str, Any]) -> Position | None:
    """The position that a GGUF file's own metadata claims; None where it holds none of ours."""
    text = fields.get(METADATA)
    return position_of({METADATA_KEY: json.loads(text)}) if text else None
