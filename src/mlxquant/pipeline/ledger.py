"""A folder that grows file by file: what it was made from, what is in it so far, and whether it is complete.

The ledger is one JSON file in the folder. It is rewritten whenever files were added, so a killed step loses only what
it was working on, and a file that the ledger does not list, or lists with another checksum, is never used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..files import checked
from ..files.archives import read_members
from ..files.atomic import atomic_file, ensure_writable
from ..files.blas import Libraries, loaded_blas, same_blas
from ..files.checked import file_digest, read_json, understood, write_json
from ..files.explain import explain
from ..files.schema import Schema, anything, array_of, entries, flag, inside, table_of, text
from ..numerics.arrays import Array

BLAS = "blas"  # of an unfinished folder: what it is computed with
AGAIN = "run its step again with --force"
OWN = ("files", "complete", "made_from")  # the ledger's own entries; ``made_from`` names those that are facts
STRUCTURE = entries({"files": table_of(text, keys=inside), "complete": flag, "made_from": array_of(text)})


def write_npz(path: Path, arrays: Mapping[str, Array]) -> str:
    """Write arrays atomically as ``.npz``; equal arrays give equal bytes. Returns the file's sha256."""
    ordered: dict[str, Any] = {name: np.asarray(arrays[name]) for name in sorted(arrays)}
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **ordered)
    return file_digest(path)


def read_npz(path: Path, sha256: str) -> dict[str, Array]:
    """Read what ``write_npz`` wrote; raises ArtifactError when the file is missing, damaged or another one."""
    verify(path, sha256)
    return load_npz(path)


def verify(path: Path, sha256: str) -> None:
    """Raise ArtifactError unless a file has this checksum."""
    if (found := file_digest(path)) != sha256:
        raise ArtifactError(
            f"{path}: sha256 {found[:12]}… is not the {sha256[:12]}… that was written; it was changed, run its step"
            " again with --force"
        )


def load_npz(path: Path, prefix: str = "") -> dict[str, Array]:
    """The arrays of a verified file whose names start with ``prefix``; raises ArtifactError where it is no npz, or has
    other arrays than of numbers.
    """
    found = read_members(path, AGAIN, lambda name: name.startswith(prefix))
    if other := [name for name, value in found.items() if value.dtype.kind not in "fiub" or not value.dtype.isnative]:
        raise ArtifactError(
            f"{path}: {other[0]} is {found[other[0]].dtype}, no array of this machine's numbers; {AGAIN}"
        )
    return found


class Ledger:
    """The JSON file ``path`` of a folder: ``facts`` that determine its contents, ``notes`` on what came out, and
    ``files``, name to sha256, relative to it. Facts and notes stand side by side at the top of the file, under names of
    their own.
    """

    def __init__(
        self, path: Path, kind: str, facts: dict[str, Any], files: dict[str, str], notes: dict[str, Any], complete: bool
    ):
        self.path, self.kind, self.facts, self.files, self.notes, self.complete = (
            path,
            kind,
            facts,
            files,
            notes,
            complete,
        )
        self._blas: Libraries | None = None
        self._verified: set[str] = set()

    @property
    def folder(self) -> Path:
        return self.path.parent

    @classmethod
    def open(
        cls, path: Path, kind: str, facts: dict[str, Any], command: str, force: bool = False, resume: bool = True
    ) -> Ledger:
        """The ledger to go on with: the one at ``path`` when it was made from the same ``facts``, else a new one.

        ``force`` replaces a ledger of other facts, refused without it, and a finished one; an unfinished one of the
        same facts is gone on with also then, but not without ``resume``. Starting anew removes the files that the old
        ledger lists and nothing else. A new ledger is on disk from its first ``save`` on, so a step that fails before
        it has made anything leaves nothing that binds the next attempt. ``command`` names the step for the error.
        """
        facts = checked.plain(facts)
        ensure_writable(path.parent)
        if path.exists():
            try:
                old = cls.read(path, kind)
            except ArtifactError as error:  # what it lists is unknown, so --force may not replace it either
                raise ArtifactError(
                    f"{error}; choose another folder, or remove this file to let {command} start over"
                ) from error
            same = old.facts == facts
            if not force and not same:
                new, was = ({**some, **some.get("parents", {})} for some in (facts, old.facts))
                changed = sorted(k for k in new.keys() | was.keys() if k != "parents" and new.get(k) != was.get(k))
                raise ArtifactError(
                    f"{path}: was made with other settings or inputs ({', '.join(changed)}); choose another folder, "
                    f"or pass --force to let {command} start over"
                )
            if same and (not force if old.complete else resume):
                old._drop_lost()
                return old
            try:
                for name in old.files:
                    (path.parent / name).unlink(missing_ok=True)
                path.unlink()
            except OSError as error:
                raise explain(error, path.parent) from error
        return cls(path, kind, facts, {}, {}, False)

    @classmethod
    def read(
        cls,
        path: Path,
        kind: str,
        remedy: str = "run the step that writes it first",
        of_facts: Schema = anything,
        of_notes: Schema = anything,
    ) -> Ledger:
        """An existing ledger; raises ArtifactError when it is missing, damaged or another step's, or its facts and its
        notes are not what the schemas ``of_facts`` and ``of_notes`` say.
        """
        if not path.exists():
            raise ArtifactError(f"{path}: no such file; {remedy}")
        data = read_json(path, kind, STRUCTURE, remedy)
        with understood(path, remedy):
            files, complete, names = (data.pop(key) for key in OWN)
            blas = data.pop(BLAS, None)
            facts = {name: data.pop(name) for name in names}
            notes = {name: value for name, value in data.items() if name not in ("kind", "version")}
            of_facts(facts, "")
            of_notes(notes, "")
            ledger = cls(path, kind, facts, files, notes, complete)
            ledger._blas = blas
            return ledger

    def require_complete(self, command: str) -> Ledger:
        """Raise ArtifactError when the step that writes this folder was interrupted."""
        if not self.complete:
            raise ArtifactError(
                f"{self.path}: not finished ({len(self.files)} files so far); run '{command}' again, it resumes"
            )
        return self

    @property
    def sha256(self) -> str:
        """Of the ledger's own file, and so of everything that it lists: what children record as their parent."""
        return file_digest(self.path)

    def arrays(self, name: str, prefix: str = "") -> dict[str, Array]:
        """The arrays of a listed ``.npz`` file whose names start with ``prefix``; its checksum is verified the first
        time.
        """
        if name not in self.files:
            raise ArtifactError(
                f"{self.path}: lists no file {name!r}; it has {len(self.files)}, such as"
                f" {next(iter(self.files), 'none')!r}"
            )
        if name not in self._verified:
            verify(self.folder / name, self.files[name])
            self._verified.add(name)
        return load_npz(self.folder / name, prefix)

    def add_npz(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Write arrays under ``name``; the file counts from the next ``save`` on."""
        self.files[name] = write_npz(self.path_of(name), arrays)

    def add(self, names: Sequence[str]) -> None:
        """List files that exist already."""
        self.files |= {name: file_digest(self.folder / name) for name in names}

    def path_of(self, name: str) -> Path:
        """Where a file of this folder is written; the folders above it are made. Raises ArtifactError when they cannot
        be.
        """
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain(error, path.parent) from error
        return path

    @property
    def disk_bytes(self) -> int:
        """Measured size of the listed files and of the ledger itself."""
        return sum((self.folder / name).stat().st_size for name in (*self.files, self.path.name))

    def same_blas(self) -> AbstractContextManager[None]:
        """Go on with the BLAS that the folder was begun with; see ``files.blas``."""
        return same_blas(self._blas, self.path)

    def save(self, complete: bool = False) -> None:
        """Write the ledger, atomically."""
        self.complete = complete
        data = {**self.notes, **self.facts, **dict(zip(OWN, (self.files, complete, sorted(self.facts)), strict=True))}
        if not complete:
            self._blas = self._blas or loaded_blas()
            data[BLAS] = self._blas
        write_json(self.path, self.kind, data)

    def _drop_lost(self) -> None:
        """Forget files that are no longer there."""
        lost = [name for name in self.files if not (self.folder / name).exists()]
        for name in lost:
            del self.files[name]
        self.complete = self.complete and not lost
