"""What a recipe asks of a model that the model may not have."""

from __future__ import annotations

from ..errors import RecipeError
from ..methods import registry
from ..models.adapter import Adapter
from ..models.edges import check_edges
from ..recipes.recipe import Recipe


def check_model(adapter: Adapter, recipe: Recipe) -> None:
    """Raise RecipeError where a recipe asks for what the model does not have: attention that can be opened, noise
    levels, pictures; and AdapterError where its edges cannot be as they say.
    """
    check_edges(adapter.name, adapter.module, adapter.edges())
    if recipe.probabilities is not None and not adapter.attentions():
        raise RecipeError(
            f"recipe {recipe.name}: the attention of {adapter.name} cannot be opened, so its probabilities stay as they"
            " are; leave 'softmax' out, and 'tcaqdm', which has it"
        )
    ranges = {spec.activation.range for _, spec in recipe.rules if spec is not None and spec.activation is not None}
    timed = sorted(name for name in ranges if registry.get("range", name).over_time)
    if timed and not adapter.timed:
        raise RecipeError(
            f"recipe {recipe.name}: {timed[0]!r} is about how inputs change with the noise level, and {adapter.name}"
            " has none that anybody could read; leave it out, use 'error' or '-token', or say how to read it: of a"
            " recorded module with time="
        )
    if recipe.rounds > 1 and not (adapter.draws or adapter.renews):
        raise RecipeError(
            f"recipe {recipe.name} calibrates again on pictures that the quantized model draws, and {adapter.name}"
            " draws none by itself; leave out 'progressive' and 'tcaqdm', or say how: of a recorded module with again="
        )
