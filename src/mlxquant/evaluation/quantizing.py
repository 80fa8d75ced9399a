"""Quantized models for an evaluation: each is kept as soon as it is finished, with the seconds that it took."""

from __future__ import annotations

from pathlib import Path

from ..api import jobs
from ..api.model import Model, QuantizedModel
from ..calibration.trajectories import Calibration
from ..files import checked
from ..files.atomic import ensure_writable, remove_folder
from ..files.checked import array_digest
from ..progress import Progress
from ..recipes.recipe import Recipe
from .contender import Contender
from .stopwatch import Stopwatch, kept_seconds


def quantized_contender(
    model: Model, calib: Calibration, recipe: Recipe, label: tuple[str, str], work: Path, progress: Progress
) -> Contender:
    """Quantize ``model``, or take what an earlier run of the same job finished; ``label`` is its name and folder.

    The model is kept in ``work/models/<folder>`` and its stopwatch beside it. Raises as ``api.quantizing.quantize``
    does, and ArtifactError when what was kept is damaged.
    """
    name, folder = label
    made_from = {
        "recipe": recipe.to_dict(),
        "calibration": {**calib.facts, "latents": array_digest(calib.latents), "source": calib.source},
        **checked.versions(),
    }
    job = checked.digest(made_from)
    kept, watch_file = work / "models" / folder, work / "models" / f"{folder}.json"
    ensure_writable(kept.parent)
    seconds = kept_seconds(watch_file, job) if (kept / "model.json").exists() else None
    if seconds is not None:
        quantized = QuantizedModel.load(kept)
    else:
        remove_folder(kept)
        watch = Stopwatch(watch_file, job)
        quantized = jobs.quantized(model, calib, recipe, work, watch.watching(progress)).model
        seconds = watch.keep()
        quantized.save(kept)
        remove_folder(work / jobs.recipe_folder(recipe))
    return Contender(name, folder, quantized, quantized.adapter.fingerprint, seconds)
