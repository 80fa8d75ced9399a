"""Files that can be trusted: versioned, checksummed, written whole or not at all.

Tensors are safetensors, facts are sorted JSON, paths inside are relative. A header says what a file is (``kind``,
``version``), and a sha256 covers everything in it, so a truncated or bit-flipped file is refused with one clear error
instead of loading as noise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ArtifactError, reason
from . import tensor_layout
from .atomic import atomic_file
from .explain import explain
from .schema import MismatchError, Schema, anything, json_value
from .tensor_layout import DTYPES

VERSION = 1
# the one metadata key: safetensors keeps several in no fixed order, and equal runs must give equal bytes
KEY = "mlxquant"
NO_SHA256 = "0" * 64  # in the place of a file's own checksum while that is computed
PIECE = 2**24  # bytes of a file that are only checked, at a time


def canonical(data: Any) -> str:
    """JSON with sorted keys: equal data, equal bytes."""
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def versions() -> dict[str, str]:
    """What code made a result."""
    return {package: version(package) for package in ("mlxquant", "mlx")}


def plain(data: Any) -> Any:
    """Plain data as it comes back from JSON: tuples become lists, keys become strings."""
    return json.loads(canonical(data))


def digest(data: Any) -> str:
    """sha256 of plain data, by its canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes; raises ArtifactError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise explain(error, path) from error


def array_digest(value: mx.array) -> str:
    """sha256 over dtype, shape and bytes of an array."""
    hasher = hashlib.sha256(f"{value.dtype}{value.shape}".encode())
    hasher.update(tensor_layout.raw_bytes(value))
    return hasher.hexdigest()


def write_json(path: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Write facts under a header with their own checksum, atomically."""
    data = {"kind": kind, "version": VERSION, **facts}
    with atomic_file(path) as temporary:
        temporary.write_text(canonical({**data, "sha256": digest(data)}), encoding="utf-8")


def json_object(path: Path, again: str, foreign: str = "the file is not ours") -> dict[str, Any]:
    """The JSON object in a file, whoever wrote it. Raises ArtifactError where there is none: on a damaged file it says
    how to get it ``again``, on other JSON what to make of it, ``foreign``; OSError where the file cannot be read.
    """
    try:
        data = json_value(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not readable as JSON ({reason(error)}); the file is damaged, {again}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(data).__name__}; {foreign}")
    return data


def read_json(path: Path, kind: str, schema: Schema = anything, remedy: str = "write it anew") -> dict[str, Any]:
    """Read what ``write_json`` wrote; raises ArtifactError on a missing, damaged, foreign or newer file, and on facts
    that are not what the ``schema`` says, with the ``remedy``.
    """
    try:
        data = json_object(path, "write it anew")
    except OSError as error:
        raise explain(error, path) from error
    _check_header(path, data, kind)
    found = data.pop("sha256", None)
    try:
        matches = found == digest(data)
    except (ValueError, RecursionError):  # what canonical JSON cannot hold was not written by us
        matches = False
    if not matches:
        raise ArtifactError(
            f"{path}: checksum {str(found)[:12]}… does not match the contents; the file was changed or damaged, write"
            " it anew"
        )
    with understood(path, remedy):
        schema(data, "")
    return data


def _check_header(path: Path, header: Mapping[str, Any], kind: str) -> None:
    if header.get("kind") != kind:
        raise ArtifactError(
            f"{path}: expected a file of kind {kind!r}, found {header.get('kind')!r}; this is another program's or"
            " step's file"
        )
    if header.get("version") != VERSION:
        raise ArtifactError(
            f"{path}: written in version {header.get('version')!r}, this mlxquant reads version {VERSION}; install the"
            " matching release"
        )


def write_tensors(
    path: Path, kind: str, arrays: Mapping[str, mx.array], header: Mapping[str, Any] | None = None
) -> None:
    """Write arrays as safetensors with a checksummed header, atomically and one at a time. Equal input gives equal
    bytes.
    """
    if unknown := {name: value.dtype for name, value in arrays.items() if value.dtype not in DTYPES}:
        raise ArtifactError(f"{path}: cannot store {unknown}; expected one of {[str(d) for d in DTYPES]}")
    facts = {"kind": kind, "version": VERSION, **(header or {})}
    blank = tensor_layout.header(arrays, {KEY: canonical({**facts, "sha256": NO_SHA256})})
    hasher = hashlib.sha256(blank)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(blank)
        for name in tensor_layout.in_order(arrays):
            raw = tensor_layout.raw_bytes(arrays[name])
            hasher.update(raw)
            file.write(raw)
        file.seek(0)
        file.write(tensor_layout.header(arrays, {KEY: canonical({**facts, "sha256": hasher.hexdigest()})}))


def read_tensors(
    path: Path, kind: str, sha256: str | None = None, schema: Schema = anything
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Read what ``write_tensors`` wrote: arrays and header. ``sha256`` is that of the whole file, where another file
    vouches for it; it is checked in place of the file's own, so that the bytes are read and hashed once.

    Raises ArtifactError on a missing, damaged, foreign or newer file, on another than the one that is vouched for, and
    on a header that is not what the ``schema`` says.
    """
    with _checked(Path(path), kind, sha256) as (file, entries, header, seen):
        size = os.fstat(file.fileno()).st_size - file.tell()
        arrays = tensor_layout.read_arrays(file, entries, size, seen)
    with understood(path, "write it anew"):
        schema(header, "")
    return arrays, header


@contextmanager
def understood(path: Path, remedy: str) -> Iterator[None]:
    """Take apart what ``path`` says: an entry that is missing or of another type is one ArtifactError with the
    ``remedy``.
    """
    try:
        yield
    except MismatchError as error:
        raise ArtifactError(f"{path}: incomplete or foreign, {error}; {remedy}") from error
    except KeyError as error:
        raise ArtifactError(f"{path}: incomplete or foreign, {error} is missing; {remedy}") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ArtifactError(f"{path}: incomplete or foreign ({reason(error)}); {remedy}") from error


def kind_of(path: Path) -> str | None:
    """The kind that a file of ours says it is of, JSON or tensors; None where there is no file, or one that says none.

    Nothing is verified: this only tells which reader to ask, and that finds out whether the file is whole.
    """
    try:
        if path.suffix == ".json":
            header = json_value(path.read_text(encoding="utf-8"))
        else:
            with path.open("rb") as file:
                entries = tensor_layout.entries(tensor_layout.read_header(file, path.stat().st_size))
            header = json_value(entries["__metadata__"][KEY])
        return str(header["kind"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def verify_tensors(path: Path) -> dict[str, Any]:
    """The header of what ``write_tensors`` wrote, of any kind, after all bytes were read, in pieces, and found to be
    those that were written. Raises ArtifactError as ``read_tensors`` does.
    """
    with _checked(Path(path)) as (file, _, header, seen):
        while piece := file.read(PIECE):
            seen(piece)
        return header


@contextmanager
def _checked(
    path: Path, kind: str | None = None, sha256: str | None = None
) -> Iterator[tuple[BufferedReader, dict[str, Any], dict[str, Any], Callable[[bytes | memoryview], None]]]:
    """An open tensor file at its first tensor, its entries, our header in it, and the function that has to be shown all
    bytes of its tensors in order: afterwards these, with what stands before them, are checked.
    """
    try:
        with path.open("rb") as file:
            head = tensor_layout.read_header(file, path.stat().st_size)
            entries = tensor_layout.entries(head)
            header = json_value(entries["__metadata__"][KEY])
            claimed = str(header.pop("sha256"))
            _check_header(path, header, kind or header["kind"])
            if sha256 is None:
                head = head.replace(claimed.encode(), NO_SHA256.encode())
            else:
                claimed = sha256
            hasher = hashlib.sha256(head)
            yield file, entries, header, hasher.update
    except OSError as error:
        raise explain(error, path) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"{path}: not a tensor file of mlxquant, or a damaged one ({reason(error)}); write or download it anew"
        ) from error
    if hasher.hexdigest() != claimed:
        raise ArtifactError(
            f"{path}: checksum does not match the contents (expected {claimed[:12]}…, found"
            f" {hasher.hexdigest()[:12]}…); write or download it anew"
        )
