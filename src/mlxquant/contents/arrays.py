"""Arrays where they lie: name, dtype, shape and place of each array in a safetensors or npz file, read one at a time
when asked for.

Listing a file reads its header and nothing else, so a checkpoint of any size is listed at once. Any safetensors dtype
is listed; those that NumPy can hold, and bfloat16 as float32, are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ArtifactError, reason
from ..files import tensor_layout
from ..files.archives import list_members, read_members
from ..files.explain import explain
from ..numerics.arrays import Array

AGAIN = "download or write it anew"
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DTYPES = {  # safetensors' names: ours, and the bytes of a value
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "F8_E4M3": ("float8_e4m3", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2), "I16": ("int16", 2), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4), "I32": ("int32", 4), "F32": ("float32", 4),
    "U64": ("uint64", 8), "I64": ("int64", 8), "F64": ("float64", 8),
}  # fmt: skip


@dataclass(frozen=True)
class StoredArray:
    """An array in a file: ``place`` is its offset in bytes in a safetensors file, its own name in an npz."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    place: int | str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def readable(self) -> bool:
        """Whether ``read`` can give its values: 8-bit floats, complex numbers, text and pickled objects are only
        listed.
        """
        try:
            return self.dtype == "bfloat16" or np.dtype(self.dtype).kind in "biuf"
        except TypeError:  # no dtype of NumPy's
            return False

    def read(self, stride: int = 1) -> Array:
        """The values, bfloat16 as float32, of every ``stride``-th entry of the first axis.

        Raises ArtifactError when the file has changed since it was listed, or on a dtype that is only listed.
        """
        if not self.readable:
            raise ArtifactError(f"{self.file}: {self.name} is {self.dtype}, which can be listed and not read")
        try:
            values = self._from_npz(self.place) if isinstance(self.place, str) else self._mapped(self.place)
        except OSError as error:
            raise explain(error, self.file) from error
        except DAMAGED as error:
            raise ArtifactError(f"{self.file}: {self.name} is not readable ({reason(error)}); {AGAIN}") from error
        some = values[::stride] if values.ndim else values
        return (some.astype(np.uint32) << 16).view(np.float32) if self.dtype == "bfloat16" else np.array(some)

    def _mapped(self, offset: int) -> Array:
        stored = np.dtype(np.uint16 if self.dtype == "bfloat16" else self.dtype)
        if not self.size:
            return np.empty(self.shape, stored)
        return np.memmap(self.file, stored, "r", offset, self.shape)

    def _from_npz(self, member: str) -> Array:
        return read_members(self.file, AGAIN, lambda name: name == member)[member]


def list_arrays(path: Path) -> tuple[list[StoredArray], dict[str, str]]:
    """The arrays of a ``.safetensors`` or ``.npz`` file in the order of the file, and its metadata (an npz has none).

    Raises ArtifactError on a missing or damaged file.
    """
    try:
        return (_list_npz(path), {}) if path.suffix == ".npz" else _list_safetensors(path)
    except OSError as error:
        raise explain(error, path) from error
    except DAMAGED as error:
        form = "an npz" if path.suffix == ".npz" else "a safetensors"
        raise ArtifactError(f"{path}: not {form} file, or a damaged one ({reason(error)}); {AGAIN}") from error


def _list_safetensors(path: Path) -> tuple[list[StoredArray], dict[str, str]]:
    with path.open("rb") as file:
        head = tensor_layout.read_header(file, size := path.stat().st_size)
    entries = tensor_layout.entries(head)
    metadata = {
        str(key): str(value) for key, value in (entries.pop(tensor_layout.METADATA, None) or {}).items()
    }  # MLX writes null for none
    arrays, position = [], 0
    for start, end, name in tensor_layout.in_file(entries):
        shape = tuple(entries[name]["shape"])
        dtype, width = DTYPES.get(entries[name]["dtype"], (entries[name]["dtype"].lower(), None))
        if start != position or end < start or (width is not None and end - start != width * math.prod(shape)):
            raise ValueError(f"{name} is not where the one before it ends, or not as long as its shape")
        arrays.append(StoredArray(name, dtype, shape, end - start, path, len(head) + start))
        position = end
    if len(head) + position != size:
        raise ValueError(f"{size - len(head)} bytes of arrays found, {position} expected")
    return arrays, metadata


def _list_npz(path: Path) -> list[StoredArray]:
    return [StoredArray(m.name, str(m.dtype), m.shape, m.nbytes, path, m.name) for m in list_members(path, AGAIN)]
