"""Reads the tensors of a PyTorch checkpoint without PyTorch, and without running what is in it.

A checkpoint is a pickle, and a pickle may call anything. Here it may name the few things that ``find_class`` knows, of
which none does more than describe a tensor; whatever else it names ends in an error. Both layouts are read: the zip
archive of PyTorch ≥ 1.6, and the row of pickles before it, in which the weights of FID were published.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import ArtifactError
from ..numerics.arrays import Array

MAGIC = 0x1950A86A20F9469CFC6C  # how a checkpoint of the old layout begins
STORAGES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "DoubleStorage": np.float64, "LongStorage": np.int64}


@dataclass(frozen=True)
class _Slice:
    """A tensor before its bytes are at hand: where it lies in which storage."""

    storage: tuple[str, type]  # key and dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _describe(
    storage: tuple[str, type], offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any
) -> _Slice:
    return _Slice(storage, offset, tuple(shape), tuple(strides))


def _unwrapped(tensor: _Slice, *rest: Any) -> _Slice:
    return tensor


class _Reader(pickle.Unpickler):
    """An unpickler that knows what a dictionary of tensors needs and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describe
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _unwrapped
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of tensors needs")

    def persistent_load(self, reference: Any) -> tuple[str, type]:
        kind, dtype, key, *_ = reference
        if kind != "storage" or dtype not in STORAGES.values():
            raise pickle.UnpicklingError(f"it refers to {kind!r}, which is no storage")
        return str(key), dtype


def read_checkpoint(path: Path) -> dict[str, Array]:
    """Name to array of a saved ``state_dict``; ArtifactError on a file that is something else, or damaged."""
    try:
        with path.open("rb") as file:
            found = _from_zip(file) if zipfile.is_zipfile(file) else _from_pickles(file)
            return {str(name): value for name, value in found.items() if isinstance(value, np.ndarray)}
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise ArtifactError(
            f"{path}: not a PyTorch checkpoint of plain tensors, or a damaged one ({error}); download it again"
        ) from error


def _from_zip(file: BinaryIO) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("its members are compressed, which PyTorch's are not")  # to whatever size
        (table,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = table.removesuffix("data.pkl")
        with archive.open(table) as pickled:
            slices = _Reader(pickled).load()
        return _filled(slices, lambda key, dtype: np.frombuffer(archive.read(f"{folder}data/{key}"), dtype))


def _from_pickles(file: BinaryIO) -> dict[str, Any]:
    file.seek(0)
    if _Reader(file).load() != MAGIC:
        raise ValueError("it begins like no checkpoint")
    _Reader(file).load(), _Reader(file).load()  # the layout's version, and facts about the machine
    slices = _Reader(file).load()
    dtypes = {value.storage[0]: np.dtype(value.storage[1]) for value in slices.values() if isinstance(value, _Slice)}
    storages = {}
    for key in _Reader(file).load():
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key], count)
    return _filled(slices, lambda key, dtype: storages[key])


def _filled(slices: dict[str, Any], storage: Callable[[str, type], Array]) -> dict[str, Any]:
    return {
        name: _array(value, storage(*value.storage)) if isinstance(value, _Slice) else value
        for name, value in slices.items()
    }


def _array(value: _Slice, storage: Array) -> Array:
    size = math.prod(value.shape)
    last = (
        value.offset + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))
        if size
        else value.offset - 1
    )
    if min((value.offset, *value.shape, *value.strides)) < 0 or last >= storage.size:
        raise ValueError(f"a tensor of shape {value.shape} lies outside its storage")
    if size > storage.size:  # strides of 0 make any number of one
        raise ValueError(f"a tensor of shape {value.shape} is larger than its storage")
    strides = [s * storage.itemsize for s in value.strides]
    return np.array(np.lib.stride_tricks.as_strided(storage[value.offset :], value.shape, strides, writeable=False))
