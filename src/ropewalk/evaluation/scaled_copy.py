"""A checkpoint's directory with another spectrum in its config, for engines that read nothing but files."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from ropewalk.evaluation.settings import Setting
from ropewalk.files import write_atomically
from ropewalk.model import write_config
from ropewalk.rope.position import position_of
from ropewalk.rotary import place_position


def scaled_copy(directory: Path, target: Path, setting: Setting, length: int) -> Path:
    """Links to the files of ``directory`` in ``target``, and a config.json compiled for ``setting`` at ``length``.

    The entry is the stock one, so any engine that serves an export serves this. Metadata of ours stays out: it would
    describe the checkpoint without the scaling.

    Args:
        directory: Hugging Face directory.
        target: directory, made if absent.
        setting: spectrum of the length.
        length: tokens that the copy serves at least.
    """
    config = AutoConfig.from_pretrained(directory)
    position = position_of(config)
    config.max_position_embeddings = max(config.max_position_embeddings, length)
    place_position(config, position, setting.extra, length)
    if hasattr(config, "ropewalk"):
        del config.ropewalk
    target.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        link = target / file.name
        if file.name != "config.json" and file.is_file():
            link.unlink(missing_ok=True)  # of another checkpoint, maybe
            link.symlink_to(file.resolve())
    write_config(config, target / "config.json")
    write_atomically(target / "scaling.txt", f"{setting.chain} at {length} tokens\n")
    return target
