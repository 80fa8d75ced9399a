"""What a long job has finished or measured, on disk: a killed run does not do it again, and goes on with the same
numbers.

``KeptArrays`` is the one file behind measurements, stages and their checkpoints, and drawings, ``KeptFacts`` the one
behind what an evaluation has measured. Either is bound to a job: a digest of all that its contents depend on, so that
another model, recipe or version never takes them for its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError
from . import checked
from .atomic import ensure_writable, remove_temporaries
from .checked import read_json, read_tensors, understood, write_json, write_tensors
from .schema import Schema, anything, entries, text

Float64Array = npt.NDArray[np.float64]
KIND = "measurement"
JOB = entries({"job": text})


@dataclass(frozen=True)
class KeptArrays:
    """A file of named arrays of one job, or none yet.

    ``job`` is a digest of all that they depend on, ``kind`` what the file's header says it is, and ``lost`` what is
    done again where the file is removed, for the error on a damaged one.
    """

    path: Path
    kind: str
    job: str
    lost: str

    def load(self, schema: Schema = anything) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
        """The arrays and the header that this job has left, bit for bit; None where there is no file, or another job's.

        Raises ArtifactError on a damaged file, and on a header that is not what the ``schema`` says, with the ways out.
        """
        if not self.path.exists():
            return None
        try:
            arrays, header = read_tensors(self.path, self.kind, schema=JOB)
            if header["job"] != self.job:
                return None
            with understood(self.path, "write it anew"):
                schema(header, "")
        except ArtifactError as error:
            raise ArtifactError(f"{error}; or pass --no-resume, or remove the file: {self.lost}") from error
        return arrays, header

    def save(self, arrays: Mapping[str, mx.array], header: Mapping[str, Any] | None = None) -> None:
        """Keep arrays, in the place of what was there, with more entries of a ``header`` beside the job; the folder is
        made.
        """
        ensure_writable(self.path.parent)
        write_tensors(self.path, self.kind, arrays, {"job": self.job, **(header or {})})

    def clear(self) -> None:
        """Forget them."""
        self.path.unlink(missing_ok=True)
        remove_temporaries(self.path)


@dataclass(frozen=True)
class KeptFacts:
    """A JSON file of plain data of one job, or none yet; ``kind`` and ``job`` are as for ``KeptArrays``."""

    path: Path
    kind: str
    job: str

    def load(self, schema: Schema = anything) -> dict[str, Any] | None:
        """What this job has left; None where there is no file, or another job's. Raises ArtifactError on a damaged
        one, and on facts that are not what the ``schema`` says.
        """
        if not self.path.exists():
            return None
        facts = read_json(self.path, self.kind, JOB)
        if facts["job"] != self.job:
            return None
        with understood(self.path, "remove it"):
            schema(facts, "")
        return facts

    def save(self, facts: Mapping[str, Any]) -> None:
        """Keep facts, in the place of what was there."""
        write_json(self.path, self.kind, {"job": self.job, **facts})


class Measurements:
    """Named groups of float64 arrays, a file each in ``folder``; without a folder nothing is kept.

    ``job`` is plain data, all that the numbers depend on: files of another job, or of another version, are not taken.
    """

    def __init__(self, folder: Path | None, job: Any):
        self._folder, self._job = folder, checked.digest([job, checked.versions()])
        if folder is not None:
            ensure_writable(folder)

    def _kept(self, folder: Path, name: str) -> KeptArrays:
        return KeptArrays(folder / f"{name}.{KIND}.safetensors", KIND, self._job, "this is then measured again")

    def load(self, name: str) -> dict[str, Float64Array] | None:
        """What ``save`` kept for this job, bit for bit, or None. A damaged file raises ArtifactError."""
        if self._folder is None or (found := self._kept(self._folder, name).load()) is None:
            return None
        return {key: np.array(bits).view(np.float64) for key, bits in found[0].items()}

    def save(self, name: str, arrays: Mapping[str, Float64Array]) -> None:
        """Keep arrays of any shape but (); as uint64, for Metal has no float64."""
        if self._folder is not None:
            bits = {
                key: mx.array(np.ascontiguousarray(value, np.float64).view(np.uint64)) for key, value in arrays.items()
            }
            self._kept(self._folder, name).save(bits)
