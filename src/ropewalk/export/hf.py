"""A model as a Hugging Face directory that stock transformers loads, written one shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ropewalk.errors import UserError
from ropewalk.export.output import SOURCE, check_replaceable, check_space, only_writer, read_json, written_beside
from ropewalk.export.portable import write_portable_config
from ropewalk.export.safetensors_files import total_bytes, write_weights
from ropewalk.export.source import Source, committed_checkpoint, trained_source
from ropewalk.files import copy_files, write_atomically
from ropewalk.runs.directory import MANIFEST, RunDirectory

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                    "spiece.model", "chat_template*")  # fmt: skip


def resolve_checkpoint(path: str | Path) -> Path:
    """A Hugging Face directory for a path: itself where it is one, else the export of a training checkpoint or run.

    A run's own ``export`` serves where it is of that checkpoint and is never replaced; any other checkpoint is exported
    once, to ``<run>/exports/<step>``.

    Raises:
        UserError: where ``path`` is none of the three.
    """
    path = Path(path)
    if (path / "config.json").is_file() and not (path / MANIFEST).exists() and list(path.glob("*.safetensors")):
        return path
    checkpoint = committed_checkpoint(path)
    run = RunDirectory.of(checkpoint)
    source = trained_source(checkpoint)
    if is_current(run.export, source, None):
        return run.export
    output = run.exports / checkpoint.name
    if not is_current(output, source, None):
        write_hf(source, output, None, overwrite=False)
    return output


def write_export(checkpoint: Path, output: Path, dtype: str | None, *, overwrite: bool) -> None:
    """Export a committed training checkpoint; see :func:`write_hf`."""
    write_hf(trained_source(checkpoint), output, dtype, overwrite=overwrite)


def write_hf(source: Source, output: Path, dtype: str | None, *, overwrite: bool) -> None:
    """Write weights (safetensors), config.json, generation_config.json and the tokenizer.

    They are written beside, in ``<output>.partial``, and renamed when whole.

    Args:
        source: what to export.
        output: directory; made anew.
        dtype: of the weights; None: the source's own.
        overwrite: whether an earlier export there may be replaced.

    Raises:
        UserError: where ``output`` holds files and may not be replaced, another export writes there, the disk is too
            small, or the tokenizer has more entries than the model has embeddings.
    """
    with only_writer(output):
        place_hf(source, output, dtype, overwrite=overwrite)


def place_hf(source: Source, output: Path, dtype: str | None, *, overwrite: bool) -> None:
    """The same for a caller that holds the output against others."""
    check_replaceable(output, overwrite)
    weights = source.open()
    planned = plan_weights(weights.shapes, weights.dtypes, dtype or source.dtype)
    check_space(output, total_bytes(list(planned.values())))
    tokenizer = source_tokenizer(source, planned)
    with written_beside(output) as partial:
        write_weights(partial, planned, weights.gather)
        source.config.dtype = _config_dtype(planned)
        write_portable_config(source.config, partial)
        write_generation_config(source, tokenizer, partial)
        copy_tokenizer_files(source.tokenizer, partial)
        identity = {**source.identity, "dtype": str(source.config.dtype).removeprefix("torch.")}
        write_atomically(partial / SOURCE, json.dumps(identity, indent=2) + "\n")


def plan_weights(
    shapes: Mapping[str, torch.Size], dtypes: Mapping[str, torch.dtype], dtype: str | None
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every weight to write; what counts (integers) keeps its dtype, buffers of RoPE are dropped."""
    wanted = None if dtype is None else getattr(torch, dtype)
    return {
        name: (shape, wanted if wanted is not None and dtypes[name].is_floating_point else dtypes[name])
        for name, shape in shapes.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def _config_dtype(planned: Mapping[str, tuple[torch.Size, torch.dtype]]) -> torch.dtype:
    """The dtype that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for shape, dtype in planned.values():
        sizes[dtype] = sizes.get(dtype, 0) + shape.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def source_tokenizer(source: Source, planned: Mapping[str, tuple[torch.Size, torch.dtype]]) -> Any:
    """The source's tokenizer, or None.

    Raises:
        UserError: where it makes tokens that the embedding has no row for.
    """
    if source.tokenizer is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    rows = next(shape[0] for name, (shape, _) in planned.items() if name.endswith("embed_tokens.weight"))
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {source.tokenizer} has {len(tokenizer)} entries and the model {rows} embeddings; they "
            "are not of one model: put the right tokenizer there, or resize the embeddings"
        )
    return tokenizer


def write_generation_config(source: Source, tokenizer: Any, directory: Path) -> None:
    """The base's own generation settings where they are at hand; special tokens are the tokenizer's, where there is
    one, since a config made from scratch names the library's defaults.
    """
    settings = read_json(source.origin / "generation_config.json") if source.run_dir is None else {}
    settings.pop("transformers_version", None)
    for key in _SPECIAL:
        own = getattr(tokenizer, key, None) if tokenizer is not None else None
        present = settings.get(key, getattr(source.config, key, None))
        if isinstance(present, list) and (own is None or own in present):
            own = present  # several ends of a turn, the tokenizer names one
        value = own if own is not None else present
        if value is not None:
            settings[key] = value
    write_atomically(directory / "generation_config.json", json.dumps(settings, indent=2) + "\n")


def copy_tokenizer_files(tokenizer: Path | None, directory: Path) -> None:
    """Copy a tokenizer with its chat template; say where there is none."""
    if tokenizer is None:
        print("no tokenizer beside the weights: the export has none, add one before serving it")
        return
    for pattern in _TOKENIZER_FILES:
        for path in sorted(tokenizer.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
            else:
                copy_files(path, directory / path.name)


def is_current(output: Path, source: Source, dtype: str | None) -> bool:
    """True if ``output`` was exported from exactly this source, in this dtype (None: in any)."""
    if not (output / SOURCE).is_file() or not (output / "config.json").is_file():
        return False
    present = json.loads((output / SOURCE).read_text())
    return bool(present == {**source.identity, "dtype": dtype or present["dtype"]})
