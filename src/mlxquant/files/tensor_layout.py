"""The safetensors layout: which bytes of a file are which tensor. It is read and written piece by piece.

A file is 8 bytes with the length of the header, the header (JSON: names, dtypes, shapes, offsets), then the tensors
without gaps. The order is that of the safetensors crate: wide dtypes first, so that every tensor is aligned, and names
in order within a dtype. Who wants to know what is in a file, and whether to trust it, asks ``checked``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from io import BufferedReader
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import shortened
from . import schema

# In the order of a file. NumPy has no bfloat16: its bits travel as uint16.
DTYPES = {
    mx.uint64: ("U64", np.uint64),
    mx.float32: ("F32", np.float32),
    mx.uint32: ("U32", np.uint32),
    mx.int32: ("I32", np.int32),
    mx.bfloat16: ("BF16", np.uint16),
    mx.float16: ("F16", np.float16),
    mx.int8: ("I8", np.int8),
    mx.uint8: ("U8", np.uint8),
}
RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
STORED: dict[str, tuple[mx.Dtype, np.dtype[Any]]] = {
    name: (dtype, np.dtype(bits)) for dtype, (name, bits) in DTYPES.items()
}
ALIGNMENT = 8
METADATA = "__metadata__"  # the one entry that is no tensor
OFFSETS = schema.array_of(schema.whole(most=2**63 - 1), 2, 2)
ENTRY = schema.entries({"dtype": schema.text, "shape": schema.shape, "data_offsets": OFFSETS})


def raw_bytes(value: mx.array) -> memoryview:
    """The bytes of an array, uint8 [nbytes]; not a copy where the array is contiguous."""
    bits = np.asarray(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)
    return np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data


def in_order(arrays: Mapping[str, mx.array]) -> list[str]:
    """Names in the order of their bytes in a file."""
    return sorted(arrays, key=lambda name: (RANK[arrays[name].dtype], name))


def header(arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    """What stands before the tensors; the arrays are not evaluated."""
    entries: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name in in_order(arrays):
        value = arrays[name]
        start, end = end, end + value.nbytes
        entries[name] = {"dtype": DTYPES[value.dtype][0], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_header(file: BufferedReader, size: int) -> bytes:
    """The header of an open file of ``size`` bytes, which is left where the tensors start; raises ValueError on a
    damaged one.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 0 < length <= size - 8:
        raise ValueError("its header is longer than the file")
    return prefix + file.read(length)


def entries(header: bytes) -> dict[str, Any]:
    """What a header says, by name; raises ValueError when it is no header."""
    found = schema.json_value(header[8:])
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    return found


def in_file(entries: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """First byte, last byte and name of each tensor that a header lists, in the order of the file; raises ValueError on
    an entry that is none.
    """
    for name, entry in entries.items():
        if name != METADATA:
            ENTRY(entry, f"tensor {shortened(name, schema.LETTERS)}")
    return sorted((*entry["data_offsets"], name) for name, entry in entries.items() if name != METADATA)


def read_arrays(
    file: BufferedReader, entries: Mapping[str, Any], size: int, seen: Callable[[memoryview], object]
) -> dict[str, mx.array]:
    """The arrays of an open file that stands before ``size`` bytes of tensors; ``seen`` gets these bytes in order.

    Every byte is read once, into one buffer as large as the largest tensor. Raises ValueError, or TypeError and
    KeyError on entries that are not even of the right kind, when the entries do not describe ``size`` bytes without a
    gap.
    """
    tensors = in_file(entries)
    position = 0
    for start, end, name in tensors:
        (_, bits), shape = STORED[entries[name]["dtype"]], entries[name]["shape"]
        if start != position or end - start != math.prod(shape) * bits.itemsize:
            raise ValueError(f"tensor {name} is not where the one before it ends, or not as long as its shape")
        position = end
    if position != size:
        raise ValueError(f"{size} bytes of tensors found, {position} expected")
    buffer = np.empty(max((end - start for start, end, _ in tensors), default=0), np.uint8)
    arrays = {}
    for start, end, name in tensors:
        raw = buffer[: end - start]
        if file.readinto(raw.data) != end - start:
            raise ValueError(f"it ends inside of tensor {name}")
        seen(raw.data)
        stored, bits = STORED[entries[name]["dtype"]]
        arrays[name] = mx.array(raw.view(bits).reshape(entries[name]["shape"])).view(stored)  # mx.array copies
    return arrays
