"""Quantize a whole pipeline of mflux: its transformer, text encoders and decoder, each by a recipe of its own, from the
same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CalibrationError, RecipeError
from ..grids.weights import GROUPS
from ..layers.quantize_linears import KEPT, quantize_linears
from ..layers.sizes import SizeReport, stored_bytes, weight_count
from ..layers.switch import SwitchLinear
from ..layers.tree import get_module, parameters
from ..models.mflux.components import Component, spine
from ..models.mflux.families import host_of
from ..models.mflux.float8 import close_float8, open_float8
from ..models.mflux.pipeline import MfluxPipeline
from ..models.recorded.recording import SAMPLES, Recording, recording
from ..progress import Progress, silent
from ..recipes.grammar import parse_recipe, with_bfloat16_scales
from ..recipes.recipe import Recipe
from ..sampling.picture_size import PictureSize
from ..sampling.prompts import Prompt
from .recorded import ModuleReport, quantize_module

EMBEDDINGS = "@embedding"
BLIND = 64  # the group size that mflux takes where it sees none
Seen = dict[str, list[tuple[str, Recording]]]  # by component, recordings of its spine
TEXT_RECIPE = "rtn+embeddings-w8a16-g64"  # what mflux's own 8 bits are


@dataclass(frozen=True)
class ComponentReport:
    """What became of a component.

    Attributes:
        name: As mflux calls it.
        recipe: The name of its recipe; "" where it stays as it was.
        weights: How many numbers its parameters are.
        before: Bytes before, as it would be stored in bfloat16.
        after: Bytes after, quantized layers as they are stored, all else in bfloat16.
        module: The path in the component of the module that was calibrated; "" where that is all of it.
        report: What ``quantize_module`` did, or ``quantize_linears`` where the recipe needs no calibration.
    """

    name: str
    recipe: str
    weights: int
    before: int
    after: int
    module: str
    report: ModuleReport | SizeReport | None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over parameters."""
        return 8 * self.after / self.weights

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data."""
        more = {} if self.report is None else {"report": facts_of(self.report)}
        sizes = {"weights": self.weights, "before": self.before, "after": self.after}
        return {"name": self.name, "recipe": self.recipe, **sizes, "bits_per_weight": self.bits_per_weight, **more}


@dataclass(frozen=True)
class PipelineReport:
    """What ``quantize_pipeline`` did, a row a component; prints as a table."""

    components: tuple[ComponentReport, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return {"components": [one.facts for one in self.components]}

    def __str__(self) -> str:
        rows = [("component", "recipe", "parameters", "GB before", "GB after", "bits a weight")]
        for one in self.components:
            sizes = millions(one.weights), gigabytes(one.before), gigabytes(one.after), f"{one.bits_per_weight:.2f}"
            rows.append((one.name, one.recipe or "kept", *sizes))
        before, after, weights = (
            sum(getattr(one, name) for one in self.components) for name in ("before", "after", "weights")
        )
        rows.append(("all", "", millions(weights), gigabytes(before), gigabytes(after), f"{8 * after / weights:.2f}"))
        return aligned(rows)


def quantize_pipeline(
    pipeline: MfluxPipeline,
    prompts: Sequence[Prompt],
    recipe: str | Recipe,
    text_recipe: str | Recipe | None = TEXT_RECIPE,
    decoder_recipe: str | Recipe | None = None,
    *,
    steps: int | None = None,
    cfg: float | None = None,
    size: PictureSize | None = None,
    negative: str | None = None,
    samples: int = SAMPLES,
    work: str | Path | None = None,
    progress: Progress = silent,
) -> PipelineReport:
    """Quantize the modules of a pipeline in place, calibrated on what they read while it draws some prompts.

    What mflux cannot read quantized stays in float: layers that its own predicate refuses, convolutions, and widths
    that no group divides. Text encoders see the very texts that they are calibrated on; nothing is encoded twice.

    Args:
        pipeline: The pipeline in full precision; it is changed.
        prompts: What to draw, at least one.
        recipe: For the transformer, or both of them.
        text_recipe: For all that reads text; None keeps it.
        decoder_recipe: For the decoder; None keeps it.
        steps: Sampler steps; None for mflux's own number.
        cfg: Weight of guidance; None for the pipeline's own.
        size: Width and height of the pictures; None for the pipeline's own.
        negative: The negative prompt; None for none.
        samples: Calls of each module that are kept, evenly among all.
        work: A folder that keeps finished stages; a killed run draws anew, goes on from there and ends with the same
            bytes.
        progress: Wraps prompts, stages and batches.

    Returns:
        Sizes and what was done, component by component.

    Raises:
        CalibrationError: There are no prompts; a module was not called while they were drawn.
        RecipeError: A recipe is unknown, does not fit, or leaves nothing to quantize.
        AdapterError: The pipeline does not draw so; a module changes while it runs.
        NumericsError: Weights or inputs hold NaN or infinite values.
        ArtifactError: ``work`` cannot be written, is another run's, or what it holds is damaged.
    """
    if not prompts:
        raise CalibrationError("there are no prompts to draw for the calibration")
    wanted = {
        "transformer": read_recipe(recipe),
        "text": read_recipe(text_recipe),
        "decoder": read_recipe(decoder_recipe),
    }
    recipes = {component.name: wanted[component.purpose] for component in pipeline.components}
    pipeline.check_finite()
    before = {one.name: (weight_count(one.module), half_bytes(one.module)) for one in pipeline.components}
    require_readable(pipeline, recipes)
    opened = {
        one.name: open_float8(one.module, pipeline.dtype)
        for one in pipeline.components
        if recipes[one.name] is not None
    }
    calibrated = [
        component
        for component in pipeline.components
        if (one := recipes[component.name]) is not None and uniform(one, component) is None
    ]
    for component in calibrated:
        if (one := recipes[component.name]) is not None and one.probabilities is not None:
            host_of(component.module).open(component.module)

    def drawn(components: Sequence[Component]) -> Seen:
        """What is called in some components while the prompts are drawn."""
        pipeline.forget_texts()
        with ExitStack() as recordings:
            seen = {
                component.name: [
                    (path, recordings.enter_context(recording(module, samples)))
                    for path, module in spine(component.module)
                ]
                for component in components
            }
            if seen:
                pipeline.draw(prompts, steps, cfg, size, negative, progress)
        return seen

    seen, rows = drawn(calibrated), []
    for component in pipeline.components:
        found, path, given = recipes[component.name], "", None
        if found is not None:
            folder = None if work is None else Path(work) / component.name
            path, given = _quantize(component, found, seen.get(component.name, []), drawn, folder, progress)
            close_float8(component.module, opened[component.name])
        weights, nbytes = before[component.name]
        name = "" if found is None else found.name
        rows.append(ComponentReport(component.name, name, weights, nbytes, half_bytes(component.module), path, given))
    pipeline.forget_texts()
    return PipelineReport(tuple(rows))


def _quantize(
    component: Component,
    recipe: Recipe,
    seen: Sequence[tuple[str, Recording]],
    drawn: Callable[[Sequence[Component]], Seen],
    work: Path | None,
    progress: Progress,
) -> tuple[str, ModuleReport | SizeReport]:
    """One component in place: the path in it of what was calibrated, and what was done."""
    kept = kept_by_mflux(component, recipe)
    called = [(path, calls) for path, calls in seen if len(calls)]
    if (format := uniform(recipe, component) or (None if called else uncalled(recipe, component))) is not None:
        return "", quantize_linears(
            component.module,
            format,
            exclude=[path for path in kept if is_known(component.module, path)],
            embeddings=any(pattern == EMBEDDINGS for pattern, _ in recipe.rules),
            convolutions=False,
        )
    if not called:
        raise CalibrationError(
            f"{component.name} was not called while the pipeline drew, nor was what holds most of it; give it a recipe"
            f" without calibration, such as {TEXT_RECIPE}"
        )
    path, calls = called[0]
    kept = {name.removeprefix(f"{path}."): why for name, why in kept.items() if not path or name.startswith(f"{path}.")}
    host = host_of(calls.module)
    report = quantize_module(
        calls.module,
        calls,
        recipe,
        time=host.time,
        edges=host.edges,
        keep=kept,
        again=lambda: dict(drawn([component])[component.name])[path],
        restores=False,
        work=work,
        progress=progress,
    )
    return path, replace(report, sizes=_with_unreached(calls.module, recipe, report.sizes, kept))


def _with_unreached(module: nn.Module, recipe: Recipe, sizes: SizeReport, kept: Mapping[str, str]) -> SizeReport:
    """The sizes of a module once its Linears that no call reached, for they read images beside the prompt, say, are
    rounded to nearest in the format of most: mflux's own bits would be theirs, too.
    """
    format = recipe.rules[-1][1]
    left = [one for one in sizes.kept if one.kind == "Linear" and one.path not in kept and one.reason != KEPT]
    if format is None or not left:
        return sizes
    done = quantize_linears(module, str(format.weight), include=[one.path for one in left], convolutions=False)
    still = tuple(one for one in sizes.kept if one not in left)
    return replace(sizes, layers=(*sizes.layers, *done.layers), kept=still, after=done.after)


def require_readable(pipeline: MfluxPipeline, recipes: Mapping[str, Recipe | None]) -> None:
    """Raise RecipeError where a text encoder of 8-bit floats would get layers of several kinds: mflux knows no widths
    of such layers before it has read them, and believes what stands in the folder for all of them.
    """
    for component in pipeline.components:
        recipe = recipes[component.name]
        if component.purpose != "text" or component.name not in pipeline.float8 or recipe is None:
            continue
        if uniform(recipe, component) is None or {spec.weight.group for _, spec in recipe.rules if spec} != {BLIND}:
            raise RecipeError(
                f"{component.name} of {pipeline.name} with {recipe.name}: mflux reads this text encoder with the same"
                f" bits everywhere, in groups of {BLIND}; use a recipe such as {TEXT_RECIPE}"
            )


def read_recipe(recipe: str | Recipe | None) -> Recipe | None:
    """A recipe with scales in which mflux computes."""
    found = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    return None if found is None else with_bfloat16_scales(found)


def uniform(recipe: Recipe, component: Component) -> str | None:
    """The format of a recipe that rounds all layers to nearest in one, for which nothing has to be recorded; None for
    any other recipe, and for a transformer, which shows what its layers are for only while it runs.
    """
    specs = {spec for _, spec in recipe.rules}
    (spec, *others) = specs
    if others or spec is None or component.purpose == "transformer" or recipe.allocates or recipe.sensitivity:
        return None
    return str(spec.weight) if spec == spec.plain and spec.activation is None else None


def uncalled(recipe: Recipe, component: Component) -> str | None:
    """The format in which most layers of what reads texts are rounded to nearest where a pipeline calls parts of it one
    by one, and never what holds most of it; None for a transformer, which has to be called.
    """
    usual = recipe.rules[-1][1]
    return None if usual is None or component.purpose != "text" else str(usual.weight)


def is_known(module: nn.Module, path: str) -> bool:
    """Whether ``quantize_linears`` would take what is at a path."""
    return isinstance(get_module(module, path), nn.Linear | nn.Embedding | SwitchLinear)


def kept_by_mflux(component: Component, recipe: Recipe) -> dict[str, str]:
    """Layers of a component that a recipe finds and mflux cannot read quantized, by path, each with the reason."""
    groups = {spec.weight.group for _, spec in recipe.rules if spec is not None}
    widest = max((group for group in groups if isinstance(group, int)), default=min(GROUPS))
    kept = {}
    for path, layer in component.module.named_modules():
        if not hasattr(layer, "weight") or not isinstance(layer.weight, mx.array) or layer.weight.ndim < 2:
            continue
        if not component.takes(path, layer):
            kept[path] = "mflux reads it unquantized"
        elif layer.weight.shape[-1] % widest:
            kept[path] = f"{layer.weight.shape[-1]} input channels, no multiple of {widest}"
    return kept


def half_bytes(module: nn.Module) -> int:
    """Bytes of a module with all floating tensors in 16 bits."""
    wide = [value for value in parameters(module).values() if value.dtype == mx.float32]
    return stored_bytes(module) - sum(value.nbytes - 2 * value.size for value in wide)


def facts_of(report: ModuleReport | SizeReport) -> Mapping[str, Any]:
    """A report as plain data."""
    return report.to_dict() if isinstance(report, ModuleReport) else report.facts


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table: two columns of words, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f}"
