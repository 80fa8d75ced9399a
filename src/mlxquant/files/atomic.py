"""Files and folders that are written whole or not at all, and places that stay right when a folder moves."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArtifactError
from .explain import explain as explain


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

    An existing folder is refused, or with ``force`` replaced in the last moment. A replacement that was killed half-way
    is undone by the next call.
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
    """Raise ArtifactError when ``path`` exists and may not be replaced: never a file, nor a folder that is not one of
    ours.
    """
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
            f"{path} was not written by mlxquant, so --force does not replace it; choose another folder or remove it"
            " yourself"
        )


def ensure_writable(folder: Path) -> None:
    """Fail now, not after an hour: raise ArtifactError unless a file can be created in ``folder`` (made if missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise explain(error, folder) from error


def relative_place(place: str, folder: Path) -> str:
    """A place as a file in ``folder`` may name it: a folder by its path from there, starting with a dot; a hub id, or
    "", as it is.
    """
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
