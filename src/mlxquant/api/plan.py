"""What a recipe means for a model, checked before anything long starts."""

from __future__ import annotations

from ..errors import RecipeError
from ..recipes.recipe import LayerSpec, Recipe
from ..sweep.allocation import check_limits
from ..sweep.requirements import check_model
from .model import Model, QuantizedModel


def plan(model: Model, recipe: Recipe) -> dict[str, LayerSpec]:
    """What the recipe would do to each layer; raises RecipeError where it does not fit the model."""
    if isinstance(model, QuantizedModel):
        raise RecipeError(
            f"{model.name} is quantized already, by {model.facts['recipe']['name']}; quantize the full-precision model"
        )
    check_model(model.adapter, recipe)
    linears = model.adapter.linears()
    layers = recipe.plan(model.adapter.roles())
    for path, spec in layers.items():
        try:
            spec.weight.columns(linears[path].weight.shape[1])
        except RecipeError as error:
            raise RecipeError(f"recipe {recipe.name}, layer {path}: {error}") from error
    check_limits(model.adapter, recipe, layers, recipe.bits_per_weight, recipe.bits_per_activation)
    return layers
