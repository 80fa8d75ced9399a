"""What a recipe means for a model, checked before anything long starts."""

from __future__ import annotations

from dataclasses import replace

from ..errors import RecipeError
from ..layers.kinds import known_kind
from ..layers.packed import check_parts
from ..recipes.recipe import LayerSpec, Recipe
from ..sweep.allocation import check_limits
from ..sweep.planning import planned
from ..sweep.requirements import check_model
from .model import Model, QuantizedModel


def of_first_blocks(model: Model, recipe: Recipe, count: int) -> Recipe:
    """The recipe for the first ``count`` blocks of a model alone, whose name then says so; all else stays in full
    precision. Raises RecipeError where the model has fewer, or the recipe is about every block.
    """
    adapter = model.adapter
    if count > len(adapter.blocks):
        raise RecipeError(f"--blocks {count}: {model.name} has {len(adapter.blocks)}; ask for as many or fewer")
    if recipe.probabilities is not None:
        raise RecipeError(
            f"recipe {recipe.name} quantizes the attention of every block; leave out --blocks, or 'softmax'"
        )
    chosen = adapter.blocks[:count]
    others = [prefix for stage in adapter.stages if stage not in chosen for prefix in stage.prefixes]
    layers = list(adapter.layers())
    kept = [prefix for prefix in others if any(path == prefix or path.startswith(f"{prefix}.") for path in layers)]
    rules = (*((prefix, None) for prefix in kept), *recipe.rules)
    return replace(recipe, name=f"{recipe.name},blocks={count}", rules=rules)


def plan(model: Model, recipe: Recipe) -> dict[str, LayerSpec]:
    """What the recipe would do to each layer; raises RecipeError where it does not fit the model."""
    if isinstance(model, QuantizedModel):
        raise RecipeError(
            f"{model.name} is quantized already, by {model.facts['recipe']['name']}; quantize the full-precision model"
        )
    check_model(model.adapter, recipe)
    exact = model.adapter.layers()
    layers = planned(model.adapter, recipe)
    for path, spec in layers.items():
        kind = known_kind(exact[path])
        try:
            spec.weight.columns(kind.shape(exact[path])[1])
            check_parts(spec.weight, kind.parts(exact[path]))
        except RecipeError as error:
            raise RecipeError(f"recipe {recipe.name}, layer {path}: {error}") from error
    check_limits(model.adapter, recipe, layers, recipe.bits_per_weight, recipe.bits_per_activation)
    return layers
