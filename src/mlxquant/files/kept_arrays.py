"""What was measured once for a long job, on disk: a killed run does not measure it again, and goes on with the same
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from . import checked
from .atomic import ensure_writable
from .checked import read_progress, write_tensors

Array = npt.NDArray[np.float64]
KIND = "measurement"


class Measurements:
    """Named groups of float64 arrays, a file each in ``folder``; without a folder nothing is kept.

    ``job`` is plain data, all that the numbers depend on: files of another job, or of another version, are not taken.
    """

    def __init__(self, folder: Path | None, job: Any):
        self._folder, self._job = folder, checked.digest([job, checked.versions()])
        if folder is not None:
            ensure_writable(folder)

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}.{KIND}.safetensors"

    def load(self, name: str) -> dict[str, Array] | None:
        """What ``save`` kept for this job, bit for bit, or None. A damaged file raises ArtifactError."""
        if self._folder is None:
            return None
        found = read_progress(self._path(self._folder, name), KIND, self._job, "this is then measured again")
        return None if found is None else {key: np.array(bits).view(np.float64) for key, bits in found[0].items()}

    def save(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Keep arrays of any shape but (); as uint64, for Metal has no float64."""
        if self._folder is not None:
            bits = {
                key: mx.array(np.ascontiguousarray(value, np.float64).view(np.uint64)) for key, value in arrays.items()
            }
            write_tensors(self._path(self._folder, name), KIND, bits, {"job": self._job})
