"""Long jobs that survive being killed: calibration and sweep with their progress kept in ``OUT.partial`` until ``OUT`` is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..files import artifacts
from ..pipeline.apply import TrackFiles
from ..progress import Progress
from ..recipes.recipe import Recipe
from ..sweep.streams import CalibrationData
from . import model as api
from .model import Model, QuantizedModel


def partial_folder(out: Path) -> Path:
    """Where an unfinished job for ``out`` keeps its progress."""
    return out.with_name(out.name + ".partial")


@contextmanager
def work_folder(out: Path, force: bool, resume: bool = True) -> Iterator[Path]:
    """The folder for the progress of a job that will write ``out``: removed when the job is done, or failed before it kept anything.

    Raises ArtifactError at once when ``out`` exists and may not be replaced, or could not be written in the end.
    """
    artifacts.refuse_existing(out, force)
    artifacts.ensure_writable(out.absolute().parent)
    work = partial_folder(out)
    if not resume:
        artifacts.remove_folder(work)
    artifacts.ensure_writable(work)
    try:
        yield work
    except BaseException:
        if not any(work.iterdir()):
            work.rmdir()
        raise
    artifacts.remove_folder(work)


@dataclass(frozen=True)
class Quantized:
    model: QuantizedModel
    seconds: float  # of the sweep alone, in this run


def quantized(
    model: Model, calib: CalibrationData, recipe: Recipe, work: Path, progress: Progress, tracks: TrackFiles | None = None
) -> Quantized:
    """Sweep with its progress in ``work``."""
    start = time.perf_counter()
    done = api.quantize(model, calib, recipe, work / recipe_folder(recipe), progress, tracks)
    return Quantized(done, time.perf_counter() - start)


def recipe_folder(recipe: Recipe) -> str:
    """A folder name for a recipe: its name where that is safe, a digest of it otherwise."""
    return recipe.name if recipe.name.replace("-", "").isalnum() else "recipe-" + artifacts.digest(recipe.name)[:12]
