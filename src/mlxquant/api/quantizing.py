"""Calibrate, quantize, compare: the notebook's verbs, which the command line calls, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..calibration import trajectories
from ..calibration.corpus import read_corpus
from ..calibration.data import CalibrationData
from ..calibration.text import TextCalibration, collect_text
from ..calibration.trajectories import Calibration
from ..curvature.factors import Curvature
from ..errors import AdapterError, CalibrationError
from ..files import checked
from ..files.blas import blas_kept_in
from ..files.lock import locked
from ..layers.sizes import planned_bits_per_weight
from ..pipeline.apply import TrackFiles
from ..progress import Progress, silent
from ..recipes.grammar import parse_recipe
from ..recipes.recipe import LayerSpec, Recipe
from ..report.comparison import Comparison
from ..sampling.prompts import Prompt
from ..sweep.allocation import allocate
from ..sweep.planning import left_undone
from ..sweep.store import FolderStore, Store
from ..sweep.sweep import sweep
from ..sweep.two_sided import KIND, choose
from .model import Model, QuantizedModel
from .plan import plan
from .tuning import require_held_out, tuned_scales

CALIBRATION = "calibration"  # in a folder with progress: batches that are drawn


def calibrate(
    model: Model,
    prompts: int | Sequence[Prompt] = 16,
    steps: int | None = None,
    cfg: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
    samples: int | None = None,
    work: str | Path | None = None,
    negative: str | None = None,
) -> Calibration:
    """Let a model draw, and keep the latents of every sampler step: what ``quantize`` runs its layers on.

    Args:
        model: A model that draws pictures, in full precision.
        prompts: How many of the model's own calibration prompts to draw, or prompts with their seeds.
        steps: Sampler steps; None for the model's own number.
        cfg: Weight of classifier-free guidance, 0 or more; None for the model's own.
        seed: Added to the seeds of the model's own prompts; a list of prompts brings its own.
        progress: Wraps the batches, and shows how far the run is.
        samples: At most so many pairs of a picture and a step go through the layers when they are quantized, all steps
            alike and the pictures in turn; None for the model's own limit (mmdit-shapes has none).
        work: A folder that keeps finished batches; a killed run goes on from there and ends with the same bytes.
        negative: The negative prompt; None for the model's own other side, mostly the empty prompt.

    Returns:
        The trajectories: latents [steps, prompts, H, W, C] float32, their noise levels, and what they were drawn from.

    Raises:
        AdapterError: When the model writes text, or ``cfg`` or ``steps`` is impossible.
        CalibrationError: Without prompts, or with a limit below 1.
        NumericsError: When the model's weights hold NaN or infinite values.
        ArtifactError: When ``work`` cannot be written, is another run's, or what it holds is damaged.
    """
    adapter = model.diffusion
    some = adapter.prompts("calibration", prompts, seed) if isinstance(prompts, int) else list(prompts)
    steps, cfg = adapter.steps if steps is None else steps, adapter.cfg if cfg is None else cfg
    samples = adapter.samples if samples is None else samples
    if work is None:
        return trajectories.collect(adapter, some, steps, cfg, progress, samples, negative=negative)
    with kept_work(Path(work)):
        return trajectories.collect(adapter, some, steps, cfg, progress, samples, Path(work) / CALIBRATION, negative)


def calibrate_text(
    model: Model, data: str | Path | None = None, samples: int | None = None, length: int | None = None, seed: int = 0
) -> TextCalibration:
    """Take windows of a text: what ``quantize`` runs a language model's layers on.

    Args:
        model: A model that writes text, in full precision.
        data: A text file in UTF-8, whose last twentieth is held out; None for the sources of Python's standard library,
            of which one module in twenty is held out. What is held out is left for ``Model.predict``.
        samples: How many windows; None for the model's own number.
        length: Tokens of a window; None for the model's own number.
        seed: Of the draw of the windows.

    Returns:
        The windows [samples, length] int32, and what they were drawn from.

    Raises:
        AdapterError: When the model draws pictures, or its layers are no chain.
        CalibrationError: When there is no such text, or it is too short for one window.
        NumericsError: When the model's weights hold NaN or infinite values.
    """
    return collect_text(model.language, read_corpus(None if data is None else Path(data)), samples, length, seed)


def quantize(
    model: Model,
    calib: CalibrationData,
    recipe: str | Recipe,
    work: str | Path | None = None,
    progress: Progress = silent,
    tracks: TrackFiles | None = None,
) -> QuantizedModel:
    """Quantize a copy of a model; the model itself stays as it is.

    Where the recipe limits the average bits, each layer first gets its own (``allocation``). Where it has several
    rounds, each after the first calibrates on what the model quantized so far draws from the same prompts.

    Args:
        model: The model in full precision.
        calib: What ``calibrate`` or ``calibrate_text`` made with this model.
        recipe: A recipe or its name, such as ``"gptq-w4a8"``.
        work: A folder that keeps finished stages; a killed run goes on from there and ends with the same bytes.
        progress: Wraps stages and batches, and shows how far the run is.
        tracks: Files of the explicit pipeline whose blocks are taken as they are; the recipe then decides on the other
            layers.

    Returns:
        The quantized model, with the facts of how it came about.

    Raises:
        RecipeError: When the recipe is unknown, or does not fit the model.
        CalibrationError: When ``calib`` was made with other weights.
        NumericsError: When weights or inputs hold NaN or infinite values.
        ArtifactError: When ``work`` cannot be written, is another run's, or what it holds is damaged.
    """
    if work is None:
        return _quantize(model, calib, recipe, None, progress, tracks)
    with kept_work(Path(work)):
        return _quantize(model, calib, recipe, Path(work), progress, tracks)


@contextmanager
def kept_work(folder: Path) -> Iterator[None]:
    """Be the only run that keeps its progress in ``folder``, and compute as the one before did."""
    with locked(folder, inside=True), blas_kept_in(folder):
        yield


def _quantize(
    model: Model,
    calib: CalibrationData,
    recipe: str | Recipe,
    work: Path | None,
    progress: Progress,
    tracks: TrackFiles | None,
) -> QuantizedModel:
    """As ``quantize``, in a folder that is ours."""
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    layers = plan(model, recipe)
    model.adapter.check_finite()
    if (calib.model, calib.source) != (model.name, model.adapter.fingerprint):
        raise CalibrationError(
            f"the calibration data is of other weights ({calib.model}) than the model's ({model.name}); calibrate this"
            " model"
        )
    if recipe.tuning is not None:
        require_held_out(calib, recipe.tuning)
    settled = settle(model, calib, recipe, layers, work, progress)
    drawn: CalibrationData = calib
    done: QuantizedModel | None = None
    for turn in range(settled.recipe.rounds):
        folder = work if work is None or settled.recipe.rounds == 1 else work / f"round-{turn + 1}"
        if done is not None:
            drawn = calib.renewed(done.adapter, progress, None if folder is None else folder / CALIBRATION)
        done = _quantize_once(model, drawn, settled, layers, folder, progress, tracks)
    assert done is not None
    if recipe.tuning is not None:
        facts = tuned_scales(model.adapter, done.adapter, calib, recipe, done.facts, work, progress)
        done.facts = {**done.facts, "tuning": facts}
    return done


@dataclass(frozen=True)
class Settled:
    """What a recipe means for each layer once all that it leaves open is decided, and facts on that.

    Attributes:
        recipe: It, with bits for each layer where it wants that.
        plan: What happens to each layer.
        facts: Plain data.
        curvature: How errors inside the model add up, for layers whose rounding is two-sided; None where none is.
    """

    recipe: Recipe
    plan: Mapping[str, LayerSpec]
    facts: dict[str, Any]
    curvature: Curvature | None = None


def settle(
    model: Model,
    calib: CalibrationData,
    recipe: Recipe,
    layers: Mapping[str, LayerSpec],
    work: Path | None,
    progress: Progress,
) -> Settled:
    """Give each layer bits of its own, and a Hessian to be rounded by, where the recipe wants it."""
    undone = left_undone(model.adapter, recipe)
    facts: dict[str, Any] = {"left_undone": undone} if undone else {}
    if recipe.allocates:
        limit = (
            planned_bits_per_weight(layers, model.adapter.layers())
            if recipe.mixed and recipe.bits_per_weight is None
            else recipe.bits_per_weight
        )
        given = allocate(
            model.adapter, calib, recipe, limit, recipe.bits_per_activation, progress=progress, work=work, plan=layers
        )
        recipe, layers, facts = given.recipe, given.plan, {**facts, "allocation": given.facts}
    if not any(spec.open_ended or spec.two_sided for spec in layers.values()):
        return Settled(recipe, layers, facts)
    chosen = choose(model.adapter, calib, layers, progress, work=work)
    return Settled(recipe, chosen.plan, {**facts, KIND: chosen.facts} if chosen.facts else facts, chosen.curvature)


def _quantize_once(
    model: Model,
    calib: CalibrationData,
    settled: Settled,
    layers: Mapping[str, LayerSpec],
    work: Path | None,
    progress: Progress,
    tracks: TrackFiles | None,
) -> QuantizedModel:
    """One round of ``quantize``: ``layers`` is the recipe's plan before anything was settled."""
    adapter, recipe = model.clone(), settled.recipe
    made = {**settled.facts, "recipe": recipe.to_dict(), "calibration": calib.record}
    if recipe.averages:
        made["range_batch"] = min(recipe.range_batch, calib.level_samples)  # what there really was
    store: Store | None = None
    if tracks is not None:
        made["tracks"] = tracks.digests
        store = tracks.store(adapter, layers)
    elif work is not None:
        codes = made | {"recipe": replace(recipe, tuning=None).to_dict()}
        store = FolderStore(work, checked.digest(codes | checked.versions()))
    stages = sweep(adapter, calib, recipe, store, progress, work, settled.plan, curvature=settled.curvature)
    return QuantizedModel(adapter, {**made, "stages": stages})


def compare(
    reference: Model,
    others: Model | Mapping[str, Model],
    prompts: str | Sequence[Prompt],
    seed: int = 0,
    steps: int | None = None,
    cfg: float | None = None,
    progress: Progress = silent,
    negative: str | None = None,
) -> Comparison:
    """Draw the same prompts with several models, side by side, and measure the differences.

    Args:
        reference: The model that the others are compared with.
        others: One model, or several by the names that the comparison shows.
        prompts: One prompt, or several with their seeds.
        seed: Of the one prompt; several bring their own.
        steps: Sampler steps; None for each model's own number.
        cfg: Weight of classifier-free guidance; None for each model's own.
        progress: Wraps the batches of each model.
        negative: The negative prompt; None for none.

    Returns:
        Pictures and figures of all models; ``save`` writes them as one image.

    Raises:
        AdapterError: When a model writes text, or they draw pictures of different sizes.
        CalibrationError: Without prompts.
        NumericsError: When a picture is not finite.
    """
    some = [Prompt(seed, prompts)] if isinstance(prompts, str) else list(prompts)
    named = {"quantized": others} if isinstance(others, Model) else dict(others)
    for name, model in named.items():
        if model.diffusion.latent_shape != reference.diffusion.latent_shape:
            raise AdapterError(
                f"{name} draws latents of {model.diffusion.latent_shape}, {reference.name} of"
                f" {reference.diffusion.latent_shape}; load both with the same size"
            )
    first = "reference" if isinstance(reference, QuantizedModel) or "FP" in named else "FP"
    everyone = {first: reference, **named}
    for model in everyone.values():
        model.diffusion.guiding(cfg, negative)  # refused now, if at all, and not after others have drawn
    images = {
        name: model.images(some, steps, cfg, progress=progress, negative=negative) for name, model in everyone.items()
    }
    return Comparison.of(some, images, reference.diffusion.attributes)
