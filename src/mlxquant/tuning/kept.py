"""What a run of tuning leaves in a folder, so that one that is killed goes on with the same numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import checked
from ..files.kept_arrays import KeptArrays

INTERVAL = 20.0  # seconds between two checkpoints
KIND = "tuning"
BETWEEN = "|"  # keys of nested trees, none of which has it


class Kept:
    """Named files of trees of arrays in ``folder``; without a folder nothing is kept.

    Args:
        folder: Where.
        job: Plain data, all that the arrays depend on: files of another job, or of another version, are not taken.
    """

    def __init__(self, folder: Path | None, job: Any):
        self._folder, self._job = folder, checked.digest([job, checked.versions()])
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether enough time has gone by to save again."""
        return self._folder is not None and time.monotonic() - self._saved >= INTERVAL

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The tree and the facts that ``save`` kept for this job, or None. A damaged file raises ArtifactError."""
        if self._folder is None or (found := self._file(self._folder, name).load()) is None:
            return None
        tree: dict[str, Any] = {}
        for path, value in found[0].items():
            *above, last = path.split(BETWEEN)
            here = tree
            for key in above:
                here = here.setdefault(key, {})
            here[last] = value
        return tree, found[1]

    def save(self, name: str, tree: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
        """Keep nested dictionaries of arrays, and plain data beside."""
        if self._folder is not None:
            self._file(self._folder, name).save(dict(_leaves(tree, "")), facts)
            self._saved = time.monotonic()

    def _file(self, folder: Path, name: str) -> KeptArrays:
        return KeptArrays(folder / f"{name}.{KIND}.safetensors", KIND, self._job, "this is then done again")


def _leaves(tree: Mapping[str, Any], before: str) -> list[tuple[str, mx.array]]:
    found = list[tuple[str, mx.array]]()
    for key, value in tree.items():
        found += [(before + key, value)] if isinstance(value, mx.array) else _leaves(value, f"{before}{key}{BETWEEN}")
    return found
