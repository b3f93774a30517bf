"""A model as a Hugging Face directory that stock transformers loads, written one shard at a time."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from ropewalk.config.train import VISION_MODEL_TYPES
from ropewalk.data.store.tokenizer_files import open_tokenizer
from ropewalk.errors import UserError
from ropewalk.export.output import SOURCE, check_replaceable, only_export, written_beside
from ropewalk.export.portable import write_portable_config
from ropewalk.export.source import Source, committed_checkpoint, trained_source
from ropewalk.files import check_space, copy_files, fsync_path, open_like_directory, read_object, write_atomically
from ropewalk.model.hf_directory import INDEX, Weights
from ropewalk.runs.directory import MANIFEST, RunDirectory

SHARD_SIZE = "1GB"  # in memory while it is written; a weight that is larger is a shard by itself
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                    "spiece.model", "chat_template*")  # fmt: skip


def resolve_checkpoint(path: str | Path, *, of_vision: bool = False) -> Path:
    """A Hugging Face directory for a path: itself where it is one, else the export of a training checkpoint or run.

    A run's own ``export`` serves where it is of that checkpoint and is never replaced. The last checkpoint of a
    finished run without one is exported there; any other once, to ``<run>/exports/<step>``.

    Args:
        path: directory.
        of_vision: the model must be of images and videos; else of text.

    Raises:
        UserError: where ``path`` is none of the three, or is of a model of the other kind.
    """
    path = Path(path)
    if (path / "config.json").is_file() and not (path / MANIFEST).exists() and list(path.glob("*.safetensors")):
        _check_kind(path, str(read_object(path / "config.json").get("model_type")), of_vision)
        return path
    checkpoint = committed_checkpoint(path)
    run = RunDirectory.of(checkpoint)
    source = trained_source(checkpoint)
    _check_kind(checkpoint, source.config.model_type, of_vision)
    if is_current(run.export, source, None):
        return run.export
    is_last = not run.export.exists() and checkpoint == run.newest_checkpoint() and run.is_finished()
    output = run.export if is_last else run.exports / checkpoint.name
    if not is_current(output, source, None):
        write_hf(source, output, None, overwrite=False)
    return output


def _check_kind(path: Path, model_type: str, of_vision: bool) -> None:
    if model_type in VISION_MODEL_TYPES and not of_vision:
        raise UserError(
            f"{path} is of images and videos ({model_type}), which evaluation reads by suite=vniah alone, and generate "
            "and geometry not at all; name a model of text, or export it (scripts/export.py) and evaluate it elsewhere"
        )
    if of_vision and model_type not in VISION_MODEL_TYPES:
        raise UserError(
            f"{path} reads text alone ({model_type}), and suite=vniah shows it videos; name a model of type "
            f"{' or '.join(VISION_MODEL_TYPES)}, or another suite"
        )


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
    with only_export(output):
        place_hf(source, output, dtype, overwrite=overwrite, may_be_nan=True)  # which an evaluation reports


def place_hf(source: Source, output: Path, dtype: str | None, *, overwrite: bool, may_be_nan: bool = False) -> None:
    """The same for a caller that holds the output against others.

    Raises:
        UserError: see write_hf; also for a weight that is not finite, unless ``may_be_nan``. Nothing is left then.
    """
    check_replaceable(output, overwrite)
    tokenizer = source_tokenizer(source)
    generation = generation_settings(source, tokenizer)
    weights = source.open()
    planned = plan_weights(weights.shapes, weights.dtypes, dtype or source.dtype)
    needed = total_bytes(list(planned.values()))
    check_space(f"output={output}", output, needed)
    with written_beside(output, needed) as partial:
        gather = weights.gather if may_be_nan else functools.partial(_finite, source.origin, weights)
        write_weights(partial, planned, gather)
        for part in (source.config, *(getattr(source.config, name) for name in source.config.sub_configs)):
            part.dtype = _config_dtype(planned)
        write_portable_config(source.config, partial)
        write_atomically(partial / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        copy_tokenizer_files(source.tokenizer, partial)
        identity = {**source.identity, "dtype": str(source.config.dtype).removeprefix("torch.")}
        write_atomically(partial / SOURCE, json.dumps(identity, indent=2) + "\n")


def _finite(origin: Path, weights: Weights, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One weight in ``dtype``, every number of it finite."""
    weight = weights.gather(name, dtype)
    if dtype.is_floating_point and (count := int((~weight.isfinite()).sum())):
        overflows = f", which are too large for {str(dtype).removeprefix('torch.')}: export in another dtype"
        fix = "; name an earlier checkpoint, or a whole copy of the model"
        raise UserError(
            f"{origin}: {name} holds {count:,} numbers of {weight.numel():,} that are NaN or infinite"
            f"{overflows if bool(weights[name].isfinite().all()) else fix}"
        )
    return weight


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


def write_weights(
    directory: Path,
    planned: Mapping[str, tuple[torch.Size, torch.dtype]],
    gather: Callable[[str, torch.dtype], torch.Tensor],
) -> None:
    """Write a model as safetensors, with an index where it needs several files.

    One shard is in memory at a time.

    Args:
        directory: exists.
        planned: shape and dtype of each weight.
        gather: reads one weight in a dtype.
    """
    hollow = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in planned.items()}
    split = split_torch_state_dict_into_shards(
        hollow, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: gather(name, planned[name][1]).contiguous() for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
        del shard  # before the next one is gathered
        open_like_directory(directory / file)
        fsync_path(directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomically(directory / INDEX, json.dumps(index, indent=2) + "\n")


def total_bytes(planned: Sequence[tuple[torch.Size, torch.dtype]]) -> int:
    """Size of the weights on disk."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in planned)


def _config_dtype(planned: Mapping[str, tuple[torch.Size, torch.dtype]]) -> torch.dtype:
    """The dtype that most of the weights have."""
    sizes: dict[torch.dtype, int] = {}
    for shape, dtype in planned.values():
        sizes[dtype] = sizes.get(dtype, 0) + shape.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def source_tokenizer(source: Source) -> Any:
    """The source's tokenizer, or None.

    Raises:
        UserError: where it makes tokens that the embedding has no row for.
    """
    if source.tokenizer is None:
        return None
    tokenizer = open_tokenizer(source.tokenizer)
    rows = source.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer in {source.tokenizer} has {len(tokenizer)} entries and the model {rows} embeddings; they "
            "are not of one model: put the right tokenizer there, or resize the embeddings"
        )
    return tokenizer


def generation_settings(source: Source, tokenizer: Any) -> dict[str, Any]:
    """The content of generation_config.json; what contradicts the model is printed.

    A model that was not trained here keeps its own. A special token that it does not name, and every one of a training
    checkpoint, is the tokenizer's, where there is one, since a config made from scratch names the library's defaults.
    A token outside the vocabulary is left out.
    """
    settings = read_object(source.origin / "generation_config.json") if source.run_dir is None else {}
    settings.pop("transformers_version", None)
    given = {key for key in _SPECIAL if settings.get(key) is not None}
    text = source.config.get_text_config()
    for key in _SPECIAL:
        own = getattr(tokenizer, key, None) if tokenizer is not None else None
        present = settings.get(key, getattr(text, key, None))
        value = present if key in given or own is None else own
        if isinstance(present, list) and own in present:
            value = present  # several ends of a turn, the tokenizer names one
        ids = value if isinstance(value, list) else [value]
        unknown = [i for i in ids if i is not None and not (isinstance(i, int) and 0 <= i < text.vocab_size)]
        if unknown:
            print(f"generation_config.json: {key}={value} is not within the {text.vocab_size} tokens: left out")
            value = [i for i in ids if i not in unknown] or None
        elif key in given and own is not None and own not in ids:
            print(f"generation_config.json: {key}={value} is kept, though the tokenizer's is {own}")
        settings[key] = value
    sampling = [key for key in ("temperature", "top_p", "top_k") if settings.get(key) is not None]
    if sampling and settings.get("do_sample") is not True:
        print(f"generation_config.json: {', '.join(sampling)} without do_sample=true is kept; transformers ignores it")
    return {key: value for key, value in settings.items() if key not in _SPECIAL or value is not None}


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
    present = read_object(output / SOURCE)
    return bool(present == {**source.identity, "dtype": dtype or present.get("dtype")})
