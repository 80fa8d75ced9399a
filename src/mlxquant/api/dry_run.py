"""What quantizing a pipeline of mflux would write and take, before anything of its weights is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..commandline.console import peak_bytes
from ..errors import CalibrationError, RecipeError
from ..grids.weights import WeightFormat
from ..layers.kinds import known_kind
from ..layers.quantize_linears import Selection, find_held, parse_format
from ..layers.sizes import planned_bytes, stored_bytes, weight_count
from ..layers.tree import get_module
from ..models.mflux.components import Component
from ..models.mflux.float8 import close_float8, open_float8
from ..models.mflux.outline import Called, called_modules
from ..models.mflux.pipeline import MfluxPipeline
from ..models.recorded.recording import MEMORY, SAMPLES
from ..recipes.recipe import LayerSpec, Recipe
from ..sampling.picture_size import PictureSize, told
from ..sweep.estimate import estimated, rounded_to_nearest
from ..sweep.planning import fitting
from .machine import forward_rate, matrix_rate
from .pipeline_plan import ComponentPlan, PipelinePlan
from .pipelines import (
    EMBEDDINGS,
    TEXT_RECIPE,
    half_bytes,
    is_known,
    kept_by_mflux,
    read_recipe,
    require_readable,
    uncalled,
    uniform,
)

HALF = 2  # bytes of a scale, and of what stays in float


def plan_pipeline(
    pipeline: MfluxPipeline,
    prompts: int,
    recipe: str | Recipe,
    text_recipe: str | Recipe | None = TEXT_RECIPE,
    decoder_recipe: str | Recipe | None = None,
    *,
    steps: int | None = None,
    cfg: float | None = None,
    size: PictureSize | None = None,
    negative: str | None = None,
    samples: int = SAMPLES,
    measure: bool = True,
) -> PipelinePlan:
    """What ``quantize_pipeline`` would write and take, for the same arguments. No weight is read.

    Args:
        pipeline: The pipeline in full precision; it stays as it is.
        prompts: How many would be drawn.
        recipe: For the transformer, or both of them.
        text_recipe: For all that reads text; None keeps it.
        decoder_recipe: For the decoder; None keeps it.
        steps: Sampler steps; None for mflux's own number.
        cfg: Weight of guidance; None for the pipeline's own.
        size: Width and height of the pictures; None for the pipeline's own.
        negative: The negative prompt; None for none.
        samples: Calls of each module that are kept.
        measure: Whether to measure this machine, for half a second, which times need.

    Returns:
        The plan.

    Raises:
        RecipeError: A recipe is unknown, does not fit, or leaves nothing to quantize.
        CalibrationError: A module is not called while the pipeline draws, and its recipe wants to see that.
        AdapterError: The pipeline does not draw so.
    """
    process = peak_bytes()
    wanted = {
        "transformer": read_recipe(recipe),
        "text": read_recipe(text_recipe),
        "decoder": read_recipe(decoder_recipe),
    }
    recipes = {component.name: wanted[component.purpose] for component in pipeline.components}
    require_readable(pipeline, recipes)
    before = {one.name: (weight_count(one.module), half_bytes(one.module)) for one in pipeline.components}
    opened = {
        one.name: open_float8(one.module, pipeline.dtype)
        for one in pipeline.components
        if recipes[one.name] is not None
    }
    called = called_modules(pipeline, steps, cfg, size, negative)
    recorded = any(
        (one := wanted[component.purpose]) is not None and uniform(one, component) is None
        for component in pipeline.components
    )
    rows = []
    for component in pipeline.components:
        name = component.name
        rows.append(_planned(component, recipes[name], before[name], called.get(name), prompts, samples, recorded))
        close_float8(component.module, opened.get(name, {}))
    pixels = "" if size is None else f" at {told(size)}"
    drawn = f"{prompts} prompts, {steps or pipeline.steps} steps{pixels}" if recorded else ""
    rates = (forward_rate(_precision(pipeline)), matrix_rate()) if measure else None
    return PipelinePlan(tuple(rows), str(pipeline.name), drawn, process, rates)


def _planned(
    component: Component,
    recipe: Recipe | None,
    known: tuple[int, int],
    called: Called | None,
    prompts: int,
    samples: int,
    recorded: bool,
) -> ComponentPlan:
    module = component.module
    (weights, before), loaded = known, stored_bytes(module)
    drawing = prompts * called.calls * called.outline.operations if called is not None and recorded else 0
    if recipe is None:
        return ComponentPlan(component.name, "", weights, before, before, loaded, drawing)
    row = ComponentPlan(component.name, recipe.name, weights, before, half_bytes(module), loaded, drawing)
    kept = kept_by_mflux(component, recipe)
    if (format := uniform(recipe, component) or (uncalled(recipe, component) if called is None else None)) is not None:
        chosen = _rounded(component, recipe, kept)
        saved = sum(_saving(one, parse_format(format)) for one in chosen)
        stored = HALF * sum(one.weight.size for one in chosen) - saved
        return _with(row, saved, work=rounded_to_nearest([known_kind(one).shape(one) for one in chosen], stored))
    if called is None:
        raise CalibrationError(
            f"{component.name} is not called while the pipeline draws, nor is what holds most of it; give it a recipe"
            f" without calibration, such as {TEXT_RECIPE}"
        )
    outline, calls = called.outline, min(samples, prompts * called.calls)
    kept = {name.removeprefix(f"{called.path}."): why for name, why in kept.items()} if called.path else kept
    roles = {path: role for path, role in outline.roles.items() if path not in kept}
    plan = {
        path: fitting(spec, known_kind(get_module(outline.module, path))) for path, spec in recipe.plan(roles).items()
    }
    saved = _calibrated_saving(outline.module, recipe, plan, kept, set(outline.layers))
    memory = min(calls * outline.given, int(MEMORY * 1e9))
    return _with(row, saved, calls=calls, kept=memory, work=estimated(outline, plan, recipe, calls))


def _with(row: ComponentPlan, saved: int, **more: Any) -> ComponentPlan:
    """A row with fewer bytes after than in 16 bits."""
    return ComponentPlan(**{**vars(row), "after": row.after - saved, **more})


def _rounded(component: Component, recipe: Recipe, kept: Mapping[str, str]) -> list[Any]:
    """The layers of a component all of whose layers are rounded in one format, one for each weight."""
    module = component.module
    embeddings = any(pattern == EMBEDDINGS for pattern, _ in recipe.rules)
    selection = Selection(module, [path for path in kept if is_known(module, path)], None, embeddings, False)
    chosen = {id(one.module.weight): one.module for one in find_held(module) if selection.reason_to_keep(one) is None}
    if not chosen:
        raise RecipeError(f"recipe {recipe.name} quantizes no layer of {component.name}")
    return list(chosen.values())


def _calibrated_saving(
    module: nn.Module,
    recipe: Recipe,
    plan: Mapping[str, LayerSpec],
    kept: Mapping[str, str],
    reached: set[str],
) -> int:
    """Bytes that a calibrated module loses: layers by their specifications, and Linears that no call reaches in the
    format of most.
    """
    saved = sum(_saving(get_module(module, path), spec) for path, spec in plan.items())
    if recipe.bits_per_weight is not None:
        numbers = sum(get_module(module, path).weight.size for path in plan)
        saved = HALF * numbers - int(numbers * recipe.bits_per_weight / 8)
    usual = recipe.rules[-1][1]
    if usual is not None:
        saved += sum(
            _saving(part, usual.weight)
            for path, part in module.named_modules()
            if isinstance(part, nn.Linear) and path not in kept and path not in reached
        )
    return saved


def _saving(layer: Any, spec: LayerSpec | WeightFormat) -> int:
    kind = known_kind(layer)
    return int(HALF * layer.weight.size) - planned_bytes(spec, kind.shape(layer), HALF, kind.parts(layer))


def _precision(pipeline: MfluxPipeline) -> mx.Dtype:
    """In which it computes: float32 on a CPU, which is fast at nothing else, and what mflux takes elsewhere."""
    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
