"""A Hugging Face directory as one GGUF file, written a few rows of one weight at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from ropewalk.errors import UserError, in_one_line
from ropewalk.export.gguf.gguf_model import (
    FACTORS,
    GgufPosition,
    Layout,
    add_architecture,
    add_position,
    family_of,
    gguf_position,
    is_matrix,
)
from ropewalk.export.gguf.gguf_tokenizer import add_tokenizer
from ropewalk.export.output import SOURCE
from ropewalk.files import check_space, read_object, replace_atomically, writing
from ropewalk.model.hf_directory import StoredWeights, read_config
from ropewalk.rope.position import METADATA_KEY, position_of

_KIND = gguf.GGMLQuantizationType
_FILE = gguf.LlamaFileType
TYPES = {
    "f32": (_KIND.F32, _FILE.ALL_F32),
    "f16": (_KIND.F16, _FILE.MOSTLY_F16),
    "bf16": (_KIND.BF16, _FILE.MOSTLY_BF16),
    "q8_0": (_KIND.Q8_0, _FILE.MOSTLY_Q8_0),
}
_OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_CHUNK = 16 * 2**20  # weights converted at once
METADATA = f"{METADATA_KEY}.metadata"  # config.json's "ropewalk", as JSON
ORIGIN = f"{METADATA_KEY}.export"  # export.json of the directory that the file was made from


def gguf_type(wanted: str | None, config: PreTrainedConfig) -> str:
    """The type that the matrices of a file get; null follows the dtype of the directory.

    Raises:
        UserError: for one that is not written.
    """
    if wanted is None:
        return _OF_DTYPE[str(config.dtype).removeprefix("torch.")]
    if wanted not in TYPES:
        raise UserError(f"gguf={wanted} is not written; use one of: {', '.join(TYPES)}")
    return wanted


def write_gguf(directory: Path, path: Path, wanted: str | None, *, instead: GgufPosition | None = None) -> None:
    """Write the model of an exported directory to ``path``; beside first, renamed when whole.

    Args:
        directory: Hugging Face directory with its tokenizer.
        path: the file; replaced.
        wanted: f32, f16, bf16 or q8_0 for the matrices; None: as the directory.
        instead: write this position in place of the model's own: what a verification compares with.

    Raises:
        UserError: for a model, method or tokenizer that llama.cpp would not follow, or a disk too small.
    """
    config = read_config(directory)
    own = gguf_position(position_of(config), config.max_position_embeddings)
    position = instead or own
    family = family_of(config, own)
    kind, file_type = TYPES[gguf_type(wanted, config)]
    layout, weights = Layout(config, family), StoredWeights(directory)
    planned = {layout.name(name): (name, shape, kind_of(shape, kind)) for name, shape in weights.shapes.items()}
    needed = sum(_bytes(shape, kind) for _, shape, kind in planned.values())
    check_space(f"output={path.parent}", path.parent, needed)

    def write(partial: Path) -> None:
        writer = gguf.GGUFWriter(partial, family.arch)
        add_architecture(writer, config, family)
        add_position(writer, position)
        add_tokenizer(writer, directory, config.vocab_size)
        _add_general(writer, config, directory, path, file_type)
        if position.factors is not None:
            writer.add_tensor_info(FACTORS, position.factors.shape, position.factors.dtype, position.factors.nbytes)
        for name, (_, shape, kind) in planned.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), _bytes(shape, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        if position.factors is not None:
            _write(writer, file, [position.factors])
        for name, _, kind in planned.values():
            _write(writer, file, _converted(name, layout.arranged(name, weights[name]), kind))
        writer.close()

    with writing(f"output={path.parent}", path.parent, lambda: needed):
        replace_atomically(path, write)


def _converted(name: str, weight: Tensor, kind: Any) -> Iterator[NDArray[Any]]:
    """A weight in its type, some rows at a time.

    Raises:
        UserError: it holds numbers that are not finite, or float16 has none so large.
    """
    for rows in _chunks(weight):
        converted = _encoded(rows, kind)
        if not np.isfinite(rows).all() or (kind is _KIND.F16 and not np.isfinite(converted).all()):
            overflow = " in float16" if np.isfinite(rows).all() else ""
            raise UserError(
                f"{name} holds numbers that are NaN or infinite{overflow}; write another type (gguf=bf16), or name a "
                "model without them"
            )
        yield converted


def kind_of(shape: torch.Size, kind: Any) -> Any:
    """The type that a weight is stored in: float32 for vectors; Q8_0's blocks of 32 need rows of such lengths."""
    if not is_matrix(shape):
        return _KIND.F32
    return _KIND.F16 if kind is _KIND.Q8_0 and shape[-1] % 32 else kind


def _bytes(shape: torch.Size, kind: Any) -> int:
    return int(np.prod(quant_shape_to_byte_shape(tuple(shape), kind)))


def _chunks(tensor: Tensor) -> Any:
    """A weight as float32 arrays of some rows each."""
    rows = max(1, _CHUNK // max(1, tensor[0].numel()))
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows].float().contiguous().numpy()


def _encoded(rows: NDArray[np.float32], kind: Any) -> NDArray[Any]:
    if kind is _KIND.F32:
        return rows
    return rows.astype(np.float16) if kind is _KIND.F16 else quantize(rows, kind)


def _write(writer: gguf.GGUFWriter, file: Any, arrays: Any) -> None:
    written = 0
    for array in arrays:
        file.write(np.ascontiguousarray(array).data.cast("B"))
        written += array.nbytes
    writer.write_padding(file, written)


def _add_general(
    writer: gguf.GGUFWriter, config: PreTrainedConfig, directory: Path, path: Path, file_type: Any
) -> None:
    writer.add_name(path.stem)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    metadata = getattr(config, METADATA_KEY, None)
    if metadata:
        writer.add_string(METADATA, json.dumps(metadata))
    if (directory / SOURCE).is_file():
        writer.add_string(ORIGIN, (directory / SOURCE).read_text(encoding="utf-8"))


def gguf_fields(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """A GGUF file's metadata by key, long lists left out, and its rope tensors.

    Raises:
        UserError: where it is not a GGUF file, or is cut short.
    """
    if os.path.getsize(path) < 24:
        raise UserError(f"{path} is not a GGUF file: it is {os.path.getsize(path)} bytes long")
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")
        }
        tensors = {t.name: np.array(t.data) for t in reader.tensors if t.name.startswith("rope_")}
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}); make it anew") from error
    return fields, tensors


def read_field(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The JSON object in a field that this project writes into a GGUF file; empty where there is none.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(fields.get(name) or "{}")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the GGUF file's {name} is not JSON ({in_one_line(error)}); make the file anew") from error
    if not isinstance(content, dict):
        raise UserError(f"the GGUF file's {name} is not a JSON object; make the file anew")
    return content


def check_same(path: Path, directory: Path) -> None:
    """Raise UserError where a GGUF file was not made from this very export."""
    present = read_field(gguf_fields(path)[0], ORIGIN)
    if present != read_object(directory / SOURCE):
        raise UserError(f"{path} is of another export; name another output or allow it with overwrite=true")
