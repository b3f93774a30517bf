"""A checkpoint's directory with another spectrum in its config, for engines that read nothing but files."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

from ropewalk.evaluation.settings import Setting
from ropewalk.export.portable import place_portable, write_portable_config
from ropewalk.files import write_atomically
from ropewalk.rope.position import METADATA_KEY, position_of


def scaled_copy(directory: Path, target: Path, setting: Setting, length: int) -> Path:
    """Links to the files of ``directory`` in ``target``, and a config.json compiled for ``setting`` at ``length``.

    The entry is written as an export's is, for the engine's own transformers of either form: version 4 alone would take
    base 10,000 and no scaling. Metadata of ours stays out: it would describe the checkpoint without the scaling.

    Args:
        directory: Hugging Face directory.
        target: directory, made if absent.
        setting: spectrum of the length.
        length: tokens that the copy serves at least.
    """
    config = AutoConfig.from_pretrained(directory)
    position = position_of(config)
    place_portable(config, position, max(config.max_position_embeddings, length), setting.extra, length)
    delattr(config, METADATA_KEY)
    target.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        link = target / file.name
        if file.name != "config.json" and file.is_file():
            link.unlink(missing_ok=True)  # of another checkpoint, maybe
            link.symlink_to(file.resolve())
    write_portable_config(config, target)
    write_atomically(target / "scaling.txt", f"{setting.chain} at {length} tokens\n")
    return target
