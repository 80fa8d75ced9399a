"""The arrays in an npz file, found out about before they are read: an archive of kilobytes can say that it holds
terabytes.

A member is as long as its header says, or the archive is refused; nothing is allocated by what a header claims alone.
Members may be compressed up to ``LARGEST`` bytes in all. What is not compressed is on the disk already, however much
that is: the members together are no longer than the file.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, reason
from .explain import explain

LARGEST = 2**31  # bytes of all compressed members once they are read
PIECE = 2**20  # bytes that are decompressed at a time
SUFFIX = ".npy"
DAMAGED = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, EOFError, RuntimeError, SyntaxError, TokenError,
    zipfile.BadZipFile, zlib.error, LZMAError,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """An array of an archive, by the header of its ``file``."""

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.file.removesuffix(SUFFIX)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def list_members(path: Path, again: str) -> list[Member]:
    """What an npz holds, in the order of the file; nothing but headers is read.

    Raises ArtifactError on a missing or damaged file and on one that would be too large; it says to get it ``again``.
    """
    with _opened(path, again) as archive:
        return [_member(archive, info) for info in archive.infolist()]


def read_members(
    path: Path, again: str, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an npz whose names are ``wanted``; the checksum of each is compared. Raises ArtifactError as
    ``list_members`` does, and on an array of objects.
    """
    with _opened(path, again) as archive:
        found = {}
        for info in archive.infolist():
            if wanted(info.filename.removesuffix(SUFFIX)):
                member = _member(archive, info)
                with archive.open(info) as file:
                    found[member.name] = np.lib.format.read_array(file, allow_pickle=False)
                    file.read(1)  # the checksum is compared at the end
        return found


def check_members(path: Path, again: str) -> None:
    """Read a whole npz, in pieces, and compare the checksums that its members have; raises ArtifactError as
    ``list_members`` does, and on the first that differs.
    """
    with _opened(path, again) as archive:
        for info in archive.infolist():
            _member(archive, info)
            with archive.open(info) as file:
                while file.read(PIECE):
                    pass


@contextmanager
def _opened(path: Path, again: str) -> Iterator[zipfile.ZipFile]:
    """An npz whose members are not too large; what is wrong with it, also later, is an ArtifactError."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [(info.compress_type == zipfile.ZIP_STORED, info.file_size) for info in archive.infolist()]
            if sum(size for stored, size in sizes if stored) > path.stat().st_size:
                raise ValueError("its arrays would be longer than the file")
            packed = sum(size for stored, size in sizes if not stored)
            if packed > LARGEST:
                raise ArtifactError(
                    f"{path}: its compressed arrays would take {packed} bytes, at most {LARGEST} are read; write it"
                    " anew with np.savez, which does not compress"
                )
            yield archive
    except OSError as error:
        raise explain(error, path) from error
    except DAMAGED as error:
        raise ArtifactError(f"{path}: not an npz file, or a damaged one ({reason(error)}); {again}") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    """Raises ValueError where a member is not as long as the array in it."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = read(file)
        except MemoryError as error:  # of Python's parser, by which NumPy reads a header
            raise ValueError("the header is nested too deeply") from error
        if not dtype.itemsize:
            raise ValueError(f"{info.filename[:80]!r} has values of no bytes")  # however many it claims
        member = Member(info.filename, dtype, shape)
        if min(shape, default=0) < 0 or (not dtype.hasobject and info.file_size - file.tell() != member.nbytes):
            raise ValueError(f"{member.name[:80]!r} is not as long as its shape")
        return member
