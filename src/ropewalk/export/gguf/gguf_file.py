"""A Hugging Face directory as one GGUF file, written a few rows of one weight at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ropewalk.errors import UserError
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
from ropewalk.export.output import SOURCE, check_space, read_json
from ropewalk.files import fsync_path
from ropewalk.model.hf_directory import StoredWeights
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
    config = AutoConfig.from_pretrained(directory)
    own = gguf_position(position_of(config), config.max_position_embeddings)
    position = instead or own
    family = family_of(config, own)
    kind, file_type = TYPES[gguf_type(wanted, config)]
    layout, weights = Layout(config, family), StoredWeights(directory)
    planned = {layout.name(name): (name, shape, kind_of(shape, kind)) for name, shape in weights.shapes.items()}
    check_space(path, sum(_bytes(shape, kind) for _, shape, kind in planned.values()))
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, family.arch)
    add_architecture(writer, config, family)
    add_position(writer, position)
    add_tokenizer(writer, directory, config.vocab_size)
    _add_general(writer, config, directory, path, file_type)
    if position.factors is not None:
        writer.add_tensor_info(FACTORS, position.factors.shape, position.factors.dtype, position.factors.nbytes)
    for name, (_, shape, kind) in planned.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _bytes(shape, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        if position.factors is not None:
            _write(writer, file, [position.factors])
        for original, _, kind in planned.values():
            _write(
                writer, file, (_encoded(rows, kind) for rows in _chunks(layout.arranged(original, weights[original])))
            )
        writer.close()
        fsync_path(partial)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); make room, or name another output") from error
    partial.replace(path)


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
        writer.add_string(ORIGIN, (directory / SOURCE).read_text())


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


def check_same(path: Path, directory: Path) -> None:
    """Raise UserError where a GGUF file was not made from this very export."""
    present = json.loads(gguf_fields(path)[0].get(ORIGIN, "null"))
    if present != read_json(directory / SOURCE):
        raise UserError(f"{path} is of another export; name another output or allow it with overwrite=true")
