"""Long jobs that survive being killed: calibration and sweep with their progress kept in ``OUT.partial`` until ``OUT``
is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..calibration.data import CalibrationData
from ..files import checked
from ..files.atomic import claimed, ensure_writable, partial_folder, remove_folder
from ..files.blas import blas_kept_in
from ..pipeline.apply import TrackFiles
from ..progress import Progress
from ..recipes.recipe import Recipe
from .model import Model, QuantizedModel
from .quantizing import quantize


@contextmanager
def work_folder(out: Path, force: bool, resume: bool = True) -> Iterator[Path]:
    """The folder for the progress of a job that will write ``out``: it goes when that is written, or when the job
    failed before it kept anything.

    Raises ArtifactError at once when ``out`` exists and may not be replaced, could not be written in the end, or is
    another run's.
    """
    with claimed(out, force, finishing=True):
        work = partial_folder(out)
        if not resume:
            remove_folder(work)
        ensure_writable(work)
        try:
            with blas_kept_in(work):
                yield work
        except BaseException:
            if work.exists() and not any(work.iterdir()):
                work.rmdir()
            raise
        remove_folder(work)


@dataclass(frozen=True)
class TimedModel:
    """What a job made, and how long it took."""

    model: QuantizedModel
    seconds: float  # of the sweep alone, in this run


def quantized(
    model: Model,
    calib: CalibrationData,
    recipe: Recipe,
    work: Path,
    progress: Progress,
    tracks: TrackFiles | None = None,
) -> TimedModel:
    """Sweep with its progress in ``work``."""
    start = time.perf_counter()
    done = quantize(model, calib, recipe, work / recipe_folder(recipe), progress, tracks)
    return TimedModel(done, time.perf_counter() - start)


def recipe_folder(recipe: Recipe) -> str:
    """A folder name for a recipe: its name where that is safe, a digest of it otherwise."""
    return recipe.name if recipe.name.replace("-", "").isalnum() else "recipe-" + checked.digest(recipe.name)[:12]
