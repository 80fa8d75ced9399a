"""Files and folders that are written whole or not at all, and places that stay right when a folder moves."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError
from .explain import explain
from .lock import Owner, left_by_a_kill, locked


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it is synced and renamed, on any failure removed. What killed
    runs left under such names goes, and what another run is writing stays.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        remove_temporaries(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{Owner.here().tag}.", suffix=".tmp", dir=path.parent)
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


def remove_temporaries(path: Path) -> None:
    """Remove what runs that were killed while they wrote ``path`` have left beside it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if left_by_a_kill(left.name.removeprefix(f".{path.name}.").split(".")[0]):
            left.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def partial_folder(out: Path) -> Path:
    """Where an unfinished job for ``out`` keeps its progress."""
    out = _followed(out)
    return out.with_name(out.name + ".partial")


def _followed(path: Path) -> Path:
    """A folder's own place, where ``path`` is a link to it: the link stays what it is, and who writes through it meets
    who does not.
    """
    return Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()


@dataclass(frozen=True)
class _Names:
    """A folder that is written whole, and what stands beside it while that is done."""

    path: Path

    def _beside(self, suffix: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{suffix}")

    @property
    def fresh(self) -> Path:
        """What is to take the name."""
        return self._beside("new")

    @property
    def old(self) -> Path:
        """What has had the name."""
        return self._beside("old")

    @property
    def used(self) -> Path:
        """The progress that the fresh folder was made from."""
        return self._beside("used")


_finishing: set[Path] = set()  # folders that this process is to write, whose progress then goes


@contextmanager
def claimed(path: Path, force: bool = False, finishing: bool = False) -> Iterator[None]:
    """Be the only run that is to write the folder ``path``, until the block ends; what a run that was killed in the
    middle of that has left is put right first.

    Args:
        path: The folder.
        force: Whether it may replace one of ours.
        finishing: Whether its ``partial_folder`` goes in the same moment in which it is written.

    Raises:
        ArtifactError: When the folder exists and may not be replaced, another run has claimed it, or nothing can be
            written there.
    """
    path = _followed(path)
    if not path.name:
        raise _no_folder(path)
    with locked(path):
        _settle(_Names(path))
        refuse_existing(path, force)
        if finishing:
            _finishing.add(path)
        try:
            yield
        finally:
            if finishing:
                _finishing.discard(path)


def _settle(names: _Names) -> None:
    """Undo a replacement that was killed half-way, or bring it to its end where the new folder has the name already."""
    try:
        if names.used.exists() and names.fresh.exists() and not (work := partial_folder(names.path)).exists():
            os.replace(names.used, work)
        if names.old.exists() and not names.path.exists():
            os.replace(names.old, names.path)
    except OSError as error:
        raise explain(error, names.path) from error
    for left in (names.used, names.old, names.fresh):
        remove_folder(left)


@contextmanager
def atomic_folder(path: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success it takes that name, on any failure it is removed.

    An existing folder is refused, or with ``force`` replaced in the last moment. A replacement that was killed half-way
    is undone by the next call. Raises ArtifactError also when another run is writing that folder.
    """
    path = _followed(Path(path))
    with claimed(path, force):
        names = _Names(path)
        try:
            names.fresh.mkdir()
            yield names.fresh
            _take_name(names)
        except OSError as error:
            raise explain(error, path) from error
        finally:
            shutil.rmtree(names.fresh, ignore_errors=True)


def _take_name(names: _Names) -> None:
    """Give the fresh folder its name. What it replaces and what it was made from step aside first, and go last: a kill
    in between leaves either all as it was or nothing but what ``_settle`` removes.
    """
    aside = {names.path: names.old}
    if names.path in _finishing:
        aside[partial_folder(names.path)] = names.used
    moved = []
    try:
        for place, other in aside.items():
            if place.exists():
                moved.append((place, other))
                os.replace(place, other)
        os.replace(names.fresh, names.path)
    except BaseException:
        if names.fresh.exists():
            for place, other in moved:
                if other.exists():
                    os.replace(other, place)
        raise
    for _, other in moved:
        remove_folder(other)


OURS = (
    "model.json",
    "report.json",
    "export.json",
    "pipeline.json",
)  # every folder that a command writes has one of these


def refuse_existing(path: Path, force: bool) -> None:
    """Raise ArtifactError when ``path`` exists and may not be replaced: never a file, nor a folder that is not one of
    ours.
    """
    if not path.absolute().name:
        raise _no_folder(path)
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


def _no_folder(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} cannot be replaced; choose a folder of its own")


def ensure_writable(folder: Path) -> None:
    """Fail now, not after an hour: raise ArtifactError unless a file can be created in ``folder`` (made if missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise explain(error, folder) from error


def relative_place(place: str, folder: Path) -> str:
    """A place as a file in ``folder`` may name it: a folder or a file by its path from there, starting with a dot; a
    hub id, or "", as it is.
    """
    return os.path.join(".", os.path.relpath(place, folder)) if place and Path(place).exists() else place


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
