"""Where a recipe's tuned scales come in: after the last round of the sweep, on whatever the model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..calibration.data import CalibrationData
from ..calibration.text import TextCalibration
from ..calibration.trajectories import Calibration
from ..models.adapter import Adapter
from ..models.diffusion import diffusion
from ..models.language import language
from ..models.recorded.adapter import RecordedAdapter
from ..progress import Progress
from ..recipes.recipe import Recipe
from ..recipes.tuning import Tuning
from ..tuning.calls import Calls, Loss
from ..tuning.kept import Kept
from ..tuning.objective import Objective, split
from ..tuning.pictures import Pictures, trajectories
from ..tuning.text import WINDOWS, Text
from ..tuning.tune import Replaced, know_targets, tune

FOLDER, DRAWN, FOLLOWED = "tuning", "calibration", "followed"  # in a folder with progress


def require_held_out(calib: CalibrationData, tuning: Tuning) -> None:
    """Raise CalibrationError, before anything long, where all of a text would be learned from."""
    if isinstance(calib, TextCalibration):
        split(len(calib.windows), tuning.held_out, WINDOWS)


def tuned_scales(
    teacher: Adapter,
    adapter: Adapter,
    calib: CalibrationData,
    recipe: Recipe,
    made: dict[str, Any],
    work: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Tune the scales of a quantized model in place, if that helps; facts on that.

    Args:
        teacher: The model in full precision.
        adapter: The same, quantized.
        calib: What it was calibrated with.
        recipe: Whose ``tuning`` says how.
        made: Facts of all that the quantized model depends on.
        work: Keeps how far it is.
        progress: Wraps batches and iterations.
    """
    assert recipe.tuning is not None
    folder = None if work is None else work / FOLDER
    objective: Objective
    if isinstance(calib, TextCalibration):
        objective = Text(language(teacher), calib, recipe.tuning)
    else:
        assert isinstance(calib, Calibration)
        drawn = trajectories(diffusion(teacher), calib, recipe.tuning, progress, _in(folder, DRAWN))
        others = drawn.renewed(adapter, progress, _in(folder, FOLLOWED)) if recipe.tuning.on_policy else None
        objective = Pictures(diffusion(teacher), drawn, recipe.tuning, others)
    kept = Kept(folder, made)
    know_targets(objective, recipe.tuning, kept, progress)
    return tune(adapter, objective, recipe.tuning, kept, progress)


class CallTuning:
    """Tuned scales of a recorded module, which is quantized in place: what it returns in full precision is made now,
    and by ``tune``, which is called once it is quantized, is what it is tuned for.

    Args:
        adapter: The module in full precision, with its calls.
        tuning: Settings.
        loss: See ``quantize_module``.
        made: Facts of all that the quantized module depends on.
        work: Keeps how far it is.
        progress: Wraps calls and iterations.
    """

    def __init__(
        self,
        adapter: RecordedAdapter,
        tuning: Tuning,
        loss: Loss | None,
        made: dict[str, Any],
        work: Path | None,
        progress: Progress,
    ):
        self._adapter, self._tuning, self._progress = adapter, tuning, progress
        self._objective = Calls(adapter, tuning, loss)
        self._kept = Kept(_in(work, FOLDER), {**made, "own loss": loss is not None})
        know_targets(self._objective, tuning, self._kept, progress)

    def tune(self, replaced: Replaced) -> dict[str, Any]:
        """Tune the module in place, if that helps; facts on that."""
        return tune(self._adapter, self._objective, self._tuning, self._kept, self._progress, replaced)


def _in(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name
