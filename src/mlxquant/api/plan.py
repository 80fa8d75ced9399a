"""What a recipe means for a model, checked before anything long starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import RecipeError
from ..layers.kinds import known_kind
from ..layers.packed import check_parts
from ..layers.sizes import planned_layer_bytes, stored_bytes, weight_count
from ..recipes.grammar import parse_recipe
from ..recipes.ladder import GROUPED, PLAIN
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


@dataclass(frozen=True)
class PlannedSizes:
    """Bytes of a model before and after a recipe. ``weights`` are its parameters."""

    recipe: str
    weights: int
    before: int
    after: int

    @property
    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.recipe}: {self.weights / 1e6:.1f} M parameters, {self.before / 1e6:.2f} MB before and"
            f" {self.after / 1e6:.2f} MB after, by arithmetic; memory and time are estimated for models of mflux alone"
        )


def planned_sizes(model: Model, recipe: Recipe, layers: Mapping[str, LayerSpec]) -> PlannedSizes:
    """What a ``plan`` of a model would store, without what transforms and tables of inputs add."""
    module, exact = model.adapter.module, model.adapter.layers()
    weights, before = sum(exact[path].weight.size for path in layers), stored_bytes(module)
    stored = sum(planned_layer_bytes(spec, exact[path]) for path, spec in layers.items())
    if recipe.bits_per_weight is not None:
        stored = int(weights * recipe.bits_per_weight / 8)
    after = before - sum(exact[path].weight.nbytes for path in layers) + stored
    return PlannedSizes(recipe.name, weight_count(module), before, after)


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


def usual_recipe(model: Model) -> str:
    """The recipe of who names none: in groups, which MLX's programs read, where they divide every layer.

    Args:
        model: The model in full precision.
    """
    layers = model.adapter.layers()
    widths = {known_kind(layers[path]).shape(layers[path])[1] for path in plan(model, parse_recipe(PLAIN))}
    return GROUPED if all(width % 64 == 0 for width in widths) else PLAIN
