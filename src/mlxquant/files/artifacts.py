"""Files that can be trusted: versioned, checksummed, written whole or not at all.

Tensors are safetensors, facts are sorted JSON, paths inside are relative. A header says what a file is (``kind``, ``version``), and a
sha256 covers everything in it, so a truncated or bit-flipped file is refused with one clear error instead of loading as noise.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from io import BufferedReader
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ArtifactError
from . import tensor_layout
from .array_memory import ArrayMemory
from .tensor_layout import DTYPES

VERSION = 1
KEY = "mlxquant"  # the one metadata key: safetensors keeps several in no fixed order, and equal runs must give equal bytes
NO_SHA256 = "0" * 64  # in the place of a file's own checksum while that is computed
PIECE = 2**24  # bytes of a file that are only checked, at a time


def explain(error: OSError, path: Path) -> ArtifactError:
    """An operating system's error as one of ours, with a remedy."""
    remedies = {
        errno.ENOSPC: "free some space or choose another disk",
        errno.EROFS: "choose a folder on a writable disk",
        errno.EACCES: "check the permissions or choose another place",
        errno.EPERM: "check the permissions or choose another place",
        errno.EEXIST: "a part of the path is a file; choose another place",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a part of the path is a file; choose another place",
        errno.EISDIR: "this is a folder; name a file",
    }
    return ArtifactError(f"{path}: {error.strerror or error}; {remedies.get(error.errno or 0, 'check the path')}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it is synced and renamed, on any failure removed."""
    path = Path(path)
    temporary: Path | None = None
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success it takes that name, on any failure it is removed.

    An existing folder is refused, or with ``force`` replaced in the last moment. A replacement that was killed half-way is undone by
    the next call.
    """
    path = Path(path).absolute()
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    try:
        if old.exists() and not path.exists():
            os.replace(old, path)
        refuse_existing(path, force)
        remove_folder(fresh)
        fresh.mkdir(parents=True)
        yield fresh
        if path.exists():
            remove_folder(old)
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        remove_folder(old)
    except OSError as error:
        raise explain(error, path) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


OURS = ("model.json", "report.json", "export.json")  # every folder that a command writes has one of these


def refuse_existing(path: Path, force: bool) -> None:
    """Raise ArtifactError when ``path`` exists and may not be replaced: never a file, nor a folder that is not one of ours."""
    if not path.absolute().name:
        raise ArtifactError(f"{path} cannot be replaced; choose a folder of its own")
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path} is a file; choose a folder")
    if not force:
        raise ArtifactError(f"{path} exists; choose another folder or pass --force to replace it")
    if any(path.iterdir()) and not any((path / name).exists() for name in OURS):
        raise ArtifactError(
            f"{path} was not written by mlxquant, so --force does not replace it; choose another folder or remove it yourself"
        )


def ensure_writable(folder: Path) -> None:
    """Fail now, not after an hour: raise ArtifactError unless a file can be created in ``folder`` (made if missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise explain(error, folder) from error


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
    hasher.update(tensor_layout.stored_bytes(value))
    return hasher.hexdigest()


def write_json(path: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Write facts under a header with their own checksum, atomically."""
    data = {"kind": kind, "version": VERSION, **facts}
    with atomic_file(path) as temporary:
        temporary.write_text(canonical({**data, "sha256": digest(data)}), encoding="utf-8")


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Read what ``write_json`` wrote; raises ArtifactError on a missing, damaged, foreign or newer file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise explain(error, path) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error}); the file is damaged, write it anew") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(data).__name__}; the file is not ours")
    _check_header(path, data, kind)
    found = data.pop("sha256", None)
    try:
        matches = found == digest(data)
    except (ValueError, RecursionError):  # what canonical JSON cannot hold was not written by us
        matches = False
    if not matches:
        raise ArtifactError(
            f"{path}: checksum {str(found)[:12]}… does not match the contents; the file was changed or damaged, write it anew"
        )
    return data


def _check_header(path: Path, header: Mapping[str, Any], kind: str) -> None:
    if header.get("kind") != kind:
        raise ArtifactError(
            f"{path}: expected a file of kind {kind!r}, found {header.get('kind')!r}; this is another program's or step's file"
        )
    if header.get("version") != VERSION:
        raise ArtifactError(
            f"{path}: written in version {header.get('version')!r}, this mlxquant reads version {VERSION}; install the matching release"
        )


def write_tensors(path: Path, kind: str, arrays: Mapping[str, mx.array], header: Mapping[str, Any] | None = None) -> None:
    """Write arrays as safetensors with a checksummed header, atomically and one at a time. Equal input gives equal bytes."""
    if unknown := {name: value.dtype for name, value in arrays.items() if value.dtype not in DTYPES}:
        raise ArtifactError(f"{path}: cannot store {unknown}; expected one of {[str(d) for d in DTYPES]}")
    facts = {"kind": kind, "version": VERSION, **(header or {})}
    blank = tensor_layout.header(arrays, {KEY: canonical({**facts, "sha256": NO_SHA256})})
    hasher = hashlib.sha256(blank)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(blank)
        for name in tensor_layout.in_order(arrays):
            raw = tensor_layout.stored_bytes(arrays[name])
            hasher.update(raw)
            file.write(raw)
        file.seek(0)
        file.write(tensor_layout.header(arrays, {KEY: canonical({**facts, "sha256": hasher.hexdigest()})}))


def read_tensors(path: Path, kind: str, sha256: str | None = None) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Read what ``write_tensors`` wrote: arrays and header. ``sha256`` is that of the whole file, where another file vouches for it;
    it is checked in place of the file's own, so that the bytes are read and hashed once.

    Raises ArtifactError on a missing, damaged, foreign or newer file, and on another than the one that is vouched for.
    """
    with _checked(Path(path), kind, sha256) as (file, entries, header, seen):
        return tensor_layout.read_arrays(file, entries, os.fstat(file.fileno()).st_size - file.tell(), seen), header


def read_progress(path: Path, kind: str, job: str, lost: str) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
    """As ``read_tensors`` what a run of the same ``job`` has left at ``path``; None where nothing is, or another job's.

    A damaged file raises ArtifactError with the ways out; ``lost`` says what is then done again.
    """
    if not path.exists():
        return None
    try:
        arrays, header = read_tensors(path, kind)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; or pass --no-resume, or remove the file: {lost}") from error
    return (arrays, header) if header["job"] == job else None


def verify_tensors(path: Path) -> dict[str, Any]:
    """The header of what ``write_tensors`` wrote, of any kind, after all bytes were read, in pieces, and found to be those that were
    written. Raises ArtifactError as ``read_tensors`` does.
    """
    with _checked(Path(path)) as (file, _, header, seen):
        while piece := file.read(PIECE):
            seen(piece)
        return header


@contextmanager
def _checked(
    path: Path, kind: str | None = None, sha256: str | None = None
) -> Iterator[tuple[BufferedReader, dict[str, Any], dict[str, Any], Callable[[bytes | memoryview], None]]]:
    """An open tensor file at its first tensor, its entries, our header in it, and the function that has to be shown all bytes of its
    tensors in order: afterwards these, with what stands before them, are checked.
    """
    try:
        with path.open("rb") as file:
            head = tensor_layout.read_header(file, path.stat().st_size)
            entries = tensor_layout.entries(head)
            header = json.loads(entries["__metadata__"][KEY])
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a tensor file of mlxquant, or a damaged one ({error!r}); write or download it anew") from error
    if hasher.hexdigest() != claimed:
        raise ArtifactError(
            f"{path}: checksum does not match the contents (expected {claimed[:12]}…, found {hasher.hexdigest()[:12]}…); "
            "write or download it anew"
        )


def load_parameters(module: nn.Module, arrays: Mapping[str, mx.array], source: str) -> None:
    """Put arrays into a module, in the dtypes that it has; raises ArtifactError on a missing, extra or misshapen tensor."""
    expected = dict(tree_flatten(module.parameters()))
    missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
    if missing or extra:
        counts = f"{len(missing)} and {len(extra)} in all"
        raise ArtifactError(
            f"{source}: does not fit the model: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'} ({counts})"
        )
    for name, value in expected.items():
        if arrays[name].shape != value.shape:
            raise ArtifactError(f"{source}: {name} has shape {arrays[name].shape}, the model expects {value.shape}")
    module.load_weights([(name, arrays[name].astype(value.dtype)) for name, value in expected.items()])


def compact(value: mx.array) -> mx.array:
    """float32 as float16 where that loses nothing; the result is not evaluated."""
    return value.astype(mx.float16) if value.dtype == mx.float32 and _fits_float16(value) else value


@ArrayMemory
def _fits_float16(value: mx.array) -> bool:
    return bool(mx.array_equal(value.astype(mx.float16).astype(mx.float32), value).item())


def relative_place(place: str, folder: Path) -> str:
    """A place as a file in ``folder`` may name it: a folder by its path from there, starting with a dot; a hub id, or "", as it is."""
    return os.path.join(".", os.path.relpath(place, folder)) if place and Path(place).is_dir() else place


def absolute_place(place: str, folder: Path) -> str:
    """The inverse of ``relative_place``."""
    return os.path.normpath(folder.absolute() / place) if place.startswith(".") else place


def remove_folder(path: Path) -> None:
    """Remove a folder of ours if it is there; raises ArtifactError when that fails."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise explain(error, path) from error
