"""The named recipes are templates of what exists, and vary field by field."""

import pytest

from mlxquant.errors import RecipeError
from mlxquant.methods import registry
from mlxquant.recipes.citations import methods
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.recipes.presets import INGREDIENTS, PRESETS, USUAL


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_use_what_exists(name):
    recipe = parse_recipe(f"{name}-w4a8")
    assert recipe.rules[-1][1].weight.bits == 4
    for kind, method in methods(recipe):
        assert registry.get(kind, method).name == method


def test_a_change_goes_to_the_part_that_has_the_field():
    changed = USUAL.but(rounding="rtn", range="tdq", sequential=True, probabilities=8)
    assert (changed.layer.rounding, changed.activation.range) == ("rtn", "tdq")
    assert (changed.recipe.sequential, changed.probabilities) == (True, 8)


def test_settings_are_what_can_be_changed():
    """Each field has one name over all parts, so a template is its settings."""
    changes = {name: value for fields in INGREDIENTS.values() for name, value in fields.items()}
    assert USUAL.but(**changes).settings == USUAL.settings | changes
    for preset in PRESETS.values():
        assert USUAL.but(**preset.settings) == preset


def test_a_change_of_nothing_is_an_error():
    with pytest.raises(TypeError, match="a recipe has no colour, taste"):
        USUAL.but(taste=1, colour=2, rounding="rtn")


def test_parts_that_do_not_go_together_are_refused():
    with pytest.raises(RecipeError, match="qronos makes up for the layers before by itself"):
        PRESETS["qronos"].but(corrected=True)
