"""A training run in a folder: its checkpoint, from which a killed run goes on to the same bytes.

What is trained and how is not known here: a run keeps trees of arrays by name (weights, an optimizer's state, an
average) with the step that they belong to. That a resumed run ends with the same bytes needs one thing more of the
training itself: every batch and every random number is a function of seed and step alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import ArtifactError
from .blas import Libraries, loaded_blas, same_blas
from .checked import plain, read_tensors, write_tensors
from .schema import anything, entries, table_of, whole

CHECKPOINT, KIND = "training.safetensors", "training"
HEADER = entries({"facts": table_of(anything), "step": whole()})
INTERVAL = 30.0  # seconds between two checkpoints of a run that keeps them by the clock


@dataclass
class TrainingRun:
    """How far a run in ``folder`` is. ``facts`` are plain data, all that its result depends on; ``step`` counts the
    finished iterations.
    """

    folder: Path
    facts: dict[str, Any]
    step: int = 0
    _saved: float = field(default_factory=time.monotonic)
    _blas: Libraries | None = None

    @property
    def checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    @property
    def due(self) -> bool:
        """Whether enough time has gone by to save again."""
        return time.monotonic() - self._saved >= INTERVAL

    def save(self, trees: Mapping[str, Any], finished: bool = False) -> None:
        """Keep trees (nested dictionaries and lists of arrays), each under its name, as they are after ``step``
        iterations; and, unless that is ``finished``, what BLAS they were computed with.
        """
        arrays: dict[str, mx.array] = dict(tree_flatten(dict(trees)))
        header: dict[str, Any] = {"facts": self.facts, "step": self.step}
        if not finished:
            self._blas = header["blas"] = self._blas or loaded_blas()
        write_tensors(self.checkpoint, KIND, arrays, header)
        self._saved = time.monotonic()

    def same_blas(self) -> AbstractContextManager[None]:
        """Go on with the BLAS that the run was begun with; see ``files.blas``."""
        return same_blas(self._blas, self.checkpoint)

    def resume(self) -> dict[str, dict[str, mx.array]]:
        """Go to the step of the checkpoint; its trees by name, each flat, by dotted path. Nothing where there is none.

        Raises ArtifactError when the checkpoint is damaged, or belongs to a run with other settings.
        """
        self._saved = time.monotonic()
        if not self.checkpoint.exists():
            return {}
        arrays, header = read_tensors(self.checkpoint, KIND, schema=HEADER)
        ours = plain(self.facts)
        if header["facts"] != ours:
            raise ArtifactError(
                f"{self.checkpoint} belongs to a run with other settings ({changes(header['facts'], ours)}); choose"
                " another folder, or give the same settings"
            )
        self.step, self._blas = header["step"], header.get("blas")
        trees: dict[str, dict[str, mx.array]] = {}
        for name, value in arrays.items():
            tree, _, key = name.partition(".")
            trees.setdefault(tree, {})[key] = value
        return trees


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What two runs do not have in common, in words."""
    old, new = dict(tree_flatten(theirs)), dict(tree_flatten(ours))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)}, now {new.get(name)}" for name in names) or "of another version"
