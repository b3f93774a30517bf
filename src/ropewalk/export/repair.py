"""The repair command: the config of a method, for a checkpoint whose config lacks the method it was trained with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ropewalk.config.export import RepairConfig
from ropewalk.errors import UserError
from ropewalk.export.output import only_writer, written_beside
from ropewalk.export.portable import place_portable, write_portable_config
from ropewalk.export.safetensors_files import StoredWeights
from ropewalk.export.source import local_model
from ropewalk.export.verify.check_export import Claim, print_check
from ropewalk.rope import Position, RopeChain

BACKUP = "config.json.before-repair"


def repair(config: RepairConfig) -> Path:
    """Write the config of ``config.rope`` for a model that was trained with it; the weights stay as they are.

    In a new directory the other files are hard links where the disk allows it, else copies. CoPE's own keys are taken
    out of the config: with them its published code would clip a second time.

    Returns:
        the repaired directory.

    Raises:
        UserError: where the config names a method already, or contradicts the given one, or a file would be
            overwritten.
        RuntimeError: where the result does not carry the method.
    """
    directory = local_model(config.model.path)
    claim = Claim.of(directory)
    position, stock = _position(config, claim), claim.config
    StoredWeights(directory)  # a repaired config beside half the weights helps nobody
    for key in claim.reference_keys:
        delattr(stock, key)
    place_portable(stock, position, stock.max_position_embeddings)
    output = _in_place(config, directory) if config.in_place else _new(config)
    with only_writer(output):
        if config.in_place:
            os.replace(shutil.copyfile(directory / "config.json", output / f"{BACKUP}.partial"), output / BACKUP)
            write_portable_config(stock, output)
        else:
            with written_beside(output) as partial:
                for path in directory.iterdir():
                    if path.is_file() and path.name != "config.json":
                        _link(path, partial / path.name)
                write_portable_config(stock, partial)
    print(f"repaired: {output}")
    if not print_check(str(output)):
        raise RuntimeError(f"{output} does not carry {position.chain} after all; see above")
    return output


def _position(config: RepairConfig, claim: Claim) -> Position:
    if claim.has_metadata:
        raise UserError(
            f"model={config.model.path} says its method already; check it: python scripts/export.py check "
            f"{config.model.path}"
        )
    chain = RopeChain.of(config.rope)
    if not chain.steps:
        raise UserError("rope is not set; name the method that the model was trained with (rope=cope20)")
    present = claim.position
    if present.chain.steps:
        raise UserError(
            f"model={config.model.path} says {present.chain} already, so nothing is lost; to apply a method to it: "
            f"python scripts/export.py model={config.model.path} rope={config.rope.name}"
        )
    base = chain.steps[0].arguments.get("theta") if chain.steps[0].method == "abf" else None
    if base is not None and base != present.theta:
        raise UserError(
            f"rope={config.rope.name} has base {base:g}, but config.json says rope_theta={present.theta:g}, the base "
            "it was trained at; name the method at that base ('rope.chain=[{method: cope, clip: 20}]'), or fix it"
        )
    length = present.trained_length
    return Position(
        name=config.rope.name,
        chain=chain,
        theta=present.theta,
        head_dim=present.head_dim,
        pretrained_length=config.pretrained_length or length,
        trained_length=length,
    )


def _in_place(config: RepairConfig, directory: Path) -> Path:
    if config.output is not None:
        raise UserError(f"in_place=true and output={config.output} are both set; give one of them")
    if not Path(config.model.path).is_dir():
        raise UserError(f"in_place=true needs a directory, and model={config.model.path} is the hub's; give output=DIR")
    if (directory / BACKUP).exists():
        raise UserError(f"{directory / BACKUP} is there from an earlier repair and is not overwritten; move it away")
    return directory


def _new(config: RepairConfig) -> Path:
    if config.output is None:
        raise UserError("output is not set; name a new directory, or change the config where it lies (in_place=true)")
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} is not empty; name a new directory")
    return output


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
