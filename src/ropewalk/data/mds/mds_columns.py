"""Columns of MosaicML's MDS format, version 2: how the bytes of a value become a value."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ropewalk.errors import UserError

Decode = Callable[[memoryview], Any]

# An array whose dtype is not in the header starts with one byte for it: bits a value, +1 signed, +2 floating.
_DTYPES = {
    **{8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 18: "<f2"},
    **{32: "<u4", 33: "<i4", 34: "<f4", 64: "<u8", 65: "<i8", 66: "<f8"},
}
_SHAPE_DTYPES = ("u1", "<u2", "<u4", "<u8")
_SCALARS = {np.dtype(code).name: np.dtype(code) for code in _DTYPES.values()}


def column_decoder(encoding: str) -> Decode:
    """The decoder of a column's encoding as index.json writes it: ``str``, ``int``, ``ndarray:uint32:4,2``, ``pkl``...

    Decoders take the value's bytes. Arrays come out as views of them, read-only where the bytes are.

    Raises:
        UserError: for an encoding that is not read here (images).
    """
    if encoding in _DECODERS:
        return _DECODERS[encoding]
    if encoding in _SCALARS:
        dtype = _SCALARS[encoding]
        return lambda data: np.frombuffer(data, dtype)[0]
    if encoding.split(":", maxsplit=1)[0] == "ndarray":
        return _array_decoder(encoding)
    raise UserError(
        f"MDS encoding {encoding!r} is not read here; known: {', '.join([*_DECODERS, *_SCALARS])}, "
        "ndarray[:dtype[:shape]]"
    )


def _array_decoder(encoding: str) -> Decode:
    """``ndarray``, ``ndarray:dtype`` or ``ndarray:dtype:shape``; what the name leaves out stands before the values."""
    _, *named = encoding.split(":")
    if len(named) > 2 or (named and named[0] not in _SCALARS):
        raise UserError(f"MDS encoding {encoding!r} is not ndarray[:dtype[:shape]] with one of: {', '.join(_SCALARS)}")
    static_dtype = _SCALARS[named[0]] if named else None
    static_shape = tuple(map(int, named[1].split(","))) if len(named) == 2 else None

    def decode(data: memoryview) -> NDArray[Any]:
        start, dtype, shape = 0, static_dtype, static_shape
        if dtype is None:
            dtype, start = np.dtype(_DTYPES[data[0]]), 1
        if shape is None:
            rank, width = data[start] >> 2, 1 << (data[start] & 3)
            start += 1
            shape = tuple(np.frombuffer(data, _SHAPE_DTYPES[width.bit_length() - 1], rank, start).tolist())
            start += rank * width
        if len(data) - start != math.prod(shape) * dtype.itemsize:
            raise UserError(
                f"{len(data) - start} bytes of values are not the {shape} of {dtype.name} that {encoding} announces"
            )
        return np.frombuffer(data, dtype, offset=start).reshape(shape)

    return decode


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def _pickled(data: memoryview) -> Any:
    return _checked(_IntegerUnpickler(io.BytesIO(data)).load())


_DECODERS: dict[str, Decode] = {
    "bytes": bytes,
    "str": _text,
    "int": lambda data: int(np.frombuffer(data, "<i8")[0]),
    "str_int": lambda data: int(_text(data)),
    "str_float": lambda data: float(_text(data)),
    "str_decimal": lambda data: Decimal(_text(data)),
    "json": lambda data: json.loads(_text(data)),
    "pkl": _pickled,
}


class _IntegerUnpickler(pickle.Unpickler):
    """Reads lists, tuples, ints and numpy integer arrays; every other class or function is refused by name.

    What it hands to the pickle machine are our own functions, so that no dtype but an integer one is ever made.
    """

    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get((module.replace("numpy._core", "numpy.core"), name))
        if admitted is None:
            raise UserError(
                f"a pkl column names {module}.{name}; only lists, tuples, ints and numpy integer arrays are read, "
                "since unpickling anything else can run code"
            )
        return admitted


def _integer_dtype(code: Any, *rest: Any) -> np.dtype[Any]:
    if not isinstance(code, str) or code.lstrip("<>|=")[:1] not in ("i", "u", "b"):
        raise UserError(f"a pkl column holds an array of dtype {code!r}; only integer arrays are read")
    return np.dtype(code, *rest)


def _empty_array(*_: Any) -> NDArray[Any]:
    """The array that numpy's own _reconstruct makes before the state is set."""
    return np.empty(0, np.int8)


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: str, *_: Any) -> NDArray[Any]:
    return np.frombuffer(buffer, dtype).reshape(shape, order="F" if order == "F" else "C")


def _integer_scalar(dtype: Any, data: bytes) -> int:
    return int(np.frombuffer(data, dtype)[0])


def _bytes(text: str, encoding: str) -> bytes:
    """How the older protocols write bytes."""
    if encoding != "latin1":
        raise UserError(f"a pkl column encodes bytes as {encoding!r}; pickle writes latin1")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    ("numpy", "dtype"): _integer_dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): _integer_scalar,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
}


def _checked(value: Any) -> Any:
    """``value`` if it is made of what is admitted and of nothing else."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _checked(item)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu":
            raise UserError(f"a pkl column holds an array of dtype {value.dtype}; only integer arrays are read")
    elif not isinstance(value, int):
        raise UserError(
            f"a pkl column holds a {type(value).__name__}; only lists, tuples, ints and numpy integer arrays are read"
        )
    return value
