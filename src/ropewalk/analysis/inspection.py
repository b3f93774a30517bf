"""Inspection of a model's real rotation in stock transformers: ``python scripts/analyze.py inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ropewalk.analysis.subjects import declared_path, is_declared, locate
from ropewalk.config.analysis import InspectConfig
from ropewalk.errors import UserError
from ropewalk.export.verify.check_export import Claim
from ropewalk.model.rotary import (
    Rotation,
    chain_rotation,
    position_faults,
    rotations,  # noqa: F401  documented under this name
)
from ropewalk.rope.chain import in_words, print_value
from ropewalk.rope.nope_layers import describe_layers
from ropewalk.rope.pair_axes import axis_letters

PER_LINE = 8  # frequencies


def print_inspection(config: InspectConfig) -> list[Rotation]:
    """Print the rotation of ``config.model.path``, its chain, and the differences between the two.

    Raises:
        UserError: for a model that cannot be read.
    """
    if is_declared(config.model.path) and not Path(config.model.path).exists():
        raise UserError(_declared(config.model.path))
    claim = Claim.of(locate(config.model.path))
    modules = claim.rotations(config.length)
    for rotation in modules:
        print(describe(rotation), flush=True)
    for line in _compare_with_chain(claim, modules):
        print(line, flush=True)
    return modules


def _declared(name: str) -> str:
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
            *([] if rotation.axes is None else [f"  axes {axis_letters(rotation.axes)}, pair by pair"]),
            *([] if rotation.layers is None else [f"  layers without rotation: {describe_layers(rotation.layers)}"]),
            *([] if rotation.temperature is None else [f"  {rotation.temperature}"]),
            f"  {stopped} stopped; {int((values * rotation.length < 2 * np.pi).sum())} do not finish a turn",
            *(f"  {i * PER_LINE:>3}  {'  '.join(f'{v:.6e}' for v in row)}" for i, row in enumerate(rows)),
        ]
    )


def _compare_with_chain(claim: Claim, modules: list[Rotation]) -> Iterator[str]:
    rotation = chain_rotation(modules)
    try:
        position = claim.position
    except UserError as error:
        yield f"chain: none ({error})"
        return
    source = "from its metadata" if claim.has_metadata else "read off the stock entry"
    yield f"chain: {in_words(position.chain)}, from base {print_value(position.theta)} ({source})"
    yield f"  sha256 {position.chain.sha256}"
    for kind, own in position.other_layers.items():
        yield f"  {kind} layers keep their own: {in_words(own.chain)}, from base {print_value(own.theta)}"
    spectrum = position.spectrum(length=rotation.length)
    if position_faults(modules, position, rotation.length):
        yield (
            "warning: stock transformers does NOT rotate with this chain; its rope_parameters were changed beside the "
            "metadata, or the chain depends on the input's length and was compiled at another"
        )
    else:
        stock, exact = rotation.inv_freq.double().numpy(), spectrum.inv_freq
        worst = np.max(np.abs(stock - exact)[exact > 0] / exact[exact > 0], initial=0.0)
        yield f"  stock transformers rotates with it: largest relative difference {worst:.1e}"
    if claim.reference_keys:
        yield (
            f"warning: {claim.reference_keys} in config.json: CoPE's published code reads these, stock engines ignore "
            "them and rotate as printed above"
        )
