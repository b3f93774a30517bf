"""Safetensors files of a model: read one weight at a time, written one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ropewalk.errors import UserError
from ropewalk.files import fsync_path, inside, write_atomically

INDEX = "model.safetensors.index.json"
SHARD_SIZE = "1GB"  # in memory while it is written; a weight that is larger is a shard by itself
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}


class Weights(Mapping[str, Tensor]):
    """Weights by name, none of them in memory until it is looked up.

    Attributes:
        shapes: of each weight.
        dtypes: of each weight as it is kept.
    """

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def gather(self, name: str, dtype: torch.dtype) -> Tensor:
        """One weight in ``dtype``."""
        return self[name].to(dtype)


class StoredWeights(Weights):
    """The weights of a Hugging Face directory under the names that stand there; each look-up reads that one."""

    def __init__(self, directory: Path) -> None:
        """Open the safetensors files of ``directory``; nothing is read yet.

        Raises:
            UserError: where there are none, or a file is missing or damaged.
        """
        self.shapes, self.dtypes = {}, {}
        self._files: dict[str, Path] = {}
        for file in weight_files(directory):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - it is not a mapping
                        part = opened.get_slice(name)
                        self._files[name], self.shapes[name] = file, torch.Size(part.get_shape())
                        self.dtypes[name] = _DTYPES[part.get_dtype()]
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read ({error}); copy it anew") from error
            except KeyError as error:
                raise UserError(f"{file} has weights of dtype {error}; use one of: {', '.join(_DTYPES)}") from None

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the model in ``directory``, in order.

    Raises:
        UserError: where there are none, or one that the index names is missing.
    """
    index = directory / INDEX
    if not index.is_file():
        single = directory / "model.safetensors"
        if not single.is_file():
            raise UserError(
                f"{directory} holds no model.safetensors and no {INDEX}; weights are read from safetensors alone "
                "(pickled .bin files are not opened): convert them with transformers' save_pretrained"
            )
        return [single]
    files = sorted({inside(directory, name) for name in json.loads(index.read_text())["weight_map"].values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{directory}: {INDEX} names {', '.join(missing)}, not there; copy them, or download again")
    return files


def write_weights(
    directory: Path,
    planned: Mapping[str, tuple[torch.Size, torch.dtype]],
    gather: Callable[[str, torch.dtype], Tensor],
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
        fsync_path(directory / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_atomically(directory / INDEX, json.dumps(index, indent=2) + "\n")


def total_bytes(planned: Sequence[tuple[torch.Size, torch.dtype]]) -> int:
    """Size of the weights on disk."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in planned)


def weight_faults(directory: Path, config: PreTrainedConfig) -> Iterator[str]:
    """Weights that are missing or have another shape, in words; only headers are read.

    A model whose weights transformers renames when it loads them (experts kept one by one) is not checked.
    """
    try:
        shapes = StoredWeights(directory).shapes
    except ValueError as error:
        yield str(error)
        return
    if get_checkpoint_conversion_mapping(config.model_type) is not None:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing = sorted(set(wanted) - set(shapes))
    other = sorted(name for name in set(wanted) & set(shapes) if wanted[name] != shapes[name])
    if missing:
        yield f"{len(missing)} weights are missing, {missing[0]} first"
    if other:
        yield f"{len(other)} weights have other shapes, {other[0]} first"
