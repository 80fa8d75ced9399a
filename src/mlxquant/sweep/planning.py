"""What a recipe means for each layer of a model, as far as the layer's kind can do it; and what it cannot."""

from __future__ import annotations

from dataclasses import replace

from ..layers.kinds import Kind, known_kind
from ..methods import registry
from ..models.adapter import Adapter
from ..recipes.recipe import LayerSpec, Recipe

STREAMS = "both streams"  # a rounding that compares them
OUTPUTS = "two-sided rounding"  # one that asks which output was made of which row


def planned(adapter: Adapter, recipe: Recipe) -> dict[str, LayerSpec]:
    """What a recipe does to each layer that it quantizes, by path: what the layer's kind cannot do is left out, and
    ``left_undone`` tells what that is.

    Raises RecipeError where a pattern names no layer, or nothing is quantized.
    """
    layers = adapter.layers()
    return {path: fitting(spec, known_kind(layers[path])) for path, spec in recipe.plan(adapter.roles()).items()}


def fitting(spec: LayerSpec, kind: Kind) -> LayerSpec:
    """A specification without what a kind of layers cannot do to its input."""
    if not kind.form.quantizes_inputs:
        spec = replace(spec, activation=None)
    return spec if kind.form.transforms_inputs else replace(spec.without_shift(), transforms=())


def left_undone(adapter: Adapter, recipe: Recipe) -> dict[str, list[str]]:
    """What a recipe asks for and layers of a kind cannot do, by name the paths of those layers; empty where there is
    nothing. A table of embeddings reads no input, so nothing is asked of it about that.
    """
    layers, found = adapter.layers(), dict[str, list[str]]()
    for path, spec in recipe.plan(adapter.roles()).items():
        kind = known_kind(layers[path])
        if registry.get("round", spec.rounding).two_sided and not kind.tells_outputs(layers[path]):
            found.setdefault(OUTPUTS, []).append(path)
        form = kind.form
        if form.transforms_inputs or not form.quantizes_inputs:
            continue
        shift = spec.activation is not None and spec.activation.shift
        streams = spec.cross and not form.pairs_streams
        for name in (*spec.transforms, *(["shift"] if shift else []), *([STREAMS] if streams else [])):
            found.setdefault(name, []).append(path)
    return found
