"""What a model really rotates with in stock transformers: ``python scripts/analyze.py inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from ropewalk.analysis.subjects import declared_path, is_declared, locate
from ropewalk.config.analysis import InspectConfig
from ropewalk.errors import UserError
from ropewalk.model.rotary import spectrum_tolerance
from ropewalk.model.rotations import (
    Rotation,
    inspect_config,
    rotations,  # noqa: F401  documented under this name
)
from ropewalk.rope.chain import in_words
from ropewalk.rope.hf_config import REFERENCE_KEYS
from ropewalk.rope.notation import print_value
from ropewalk.rope.position import METADATA_KEY, position_of, read_config_json

PER_LINE = 8  # frequencies


def print_inspection(config: InspectConfig) -> list[Rotation]:
    """Print what ``config.model.path`` rotates with, its chain, and where the two disagree.

    Raises:
        UserError: for a model that cannot be read.
    """
    if is_declared(config.model.path) and not Path(config.model.path).exists():
        raise UserError(_declared(config.model.path))
    directory = locate(config.model.path)
    read_config_json(directory)  # its errors are for people
    stock = AutoConfig.from_pretrained(directory)
    content = stock.to_dict()
    text = content.get("text_config") or content
    length = config.length or int(text["max_position_embeddings"])
    found = inspect_config(stock, length)
    for rotation in found:
        print(describe(rotation), flush=True)
    for line in _compare_with_chain(content, found, length):
        print(line, flush=True)
    return found


def _declared(name: str) -> str:
    """Why a name in configs/model is no checkpoint, and what to say in its place."""
    path = declared_path(name)
    instead = f"its checkpoint (model={path})" if path else "a checkpoint of it (model=RUN_OR_EXPORT_DIRECTORY)"
    return (
        f"model={name} is a name in configs/model, whose few facts show no rotation; inspect {instead}, or ask "
        f"for advice, which needs those facts alone: python scripts/analyze.py advise model={name}"
    )


def describe(rotation: Rotation) -> str:
    """A rotation as text: type, dtype, hash, and every frequency."""
    values = rotation.inv_freq.detach().cpu().double().numpy()
    equal = {None: "", True: ", equal on all ranks", False: ", NOT EQUAL ON ALL RANKS"}[rotation.equal_on_all_ranks]
    rows = [values[i : i + PER_LINE] for i in range(0, values.size, PER_LINE)]
    stopped = int((values == 0).sum())
    return "\n".join(
        [
            f"{rotation.module}: {rotation.rope_type}, {values.size} pairs, {str(rotation.inv_freq.dtype)[6:]}, "
            f"attention scaling {rotation.attention_scaling:.7g}, at {rotation.length:,} tokens{equal}",
            f"  sha256 {rotation.sha256}",
            f"  {stopped} stopped; {int((values * rotation.length < 2 * np.pi).sum())} do not finish a turn",
            *(f"  {i * PER_LINE:>3}  {'  '.join(f'{v:.6e}' for v in row)}" for i, row in enumerate(rows)),
        ]
    )


def _compare_with_chain(content: Mapping[str, Any], found: list[Rotation], length: int) -> Iterator[str]:
    """The chain, and every place where the config promises what stock engines do not do."""
    try:
        position = position_of(content)
    except ValueError as error:
        yield f"chain: none ({error})"
        return
    source = "from its metadata" if content.get(METADATA_KEY) else "read off the stock entry"
    yield f"chain: {in_words(position.chain)}, from base {print_value(position.theta)} ({source})"
    yield f"  sha256 {position.chain.sha256}"
    spectrum = position.spectrum(length=length)
    exact = spectrum.inv_freq
    # where layers differ, the chain is that of the full-attention ones
    rotation = next((r for r in found if "full_attention" in r.module), found[0])
    stock = rotation.inv_freq.double().numpy()
    fits = stock.shape == exact.shape and np.array_equal(stock == 0, exact == 0)
    worst = float(np.max(np.abs(stock - exact)[exact > 0] / exact[exact > 0], initial=0.0)) if fits else np.inf
    if (
        fits
        and worst <= spectrum_tolerance(spectrum, rotation.rope_type)
        and np.isclose(rotation.attention_scaling, spectrum.attention_scaling, rtol=1e-6)
    ):
        yield f"  stock transformers rotates with it: largest relative difference {worst:.1e}"
    else:
        yield (
            "warning: stock transformers does NOT rotate with this chain; its rope_parameters were changed beside the "
            "metadata, or the chain depends on the input's length and was compiled at another"
        )
    present = {key: content[key] for key in REFERENCE_KEYS if key in content}
    if present:
        yield (
            f"warning: {present} in config.json: CoPE's published code reads these, stock engines ignore them and "
            "rotate as printed above"
        )
