"""Names for people, and the Hessian that a recipe names."""

import pytest

import mlxquant as mq
from mlxquant.errors import RecipeError
from mlxquant.recipes.ladder import LADDER, explained, stands_for
from mlxquant.recipes.recipe import Recipe, TwoSided


@pytest.mark.parametrize("name", LADDER)
@pytest.mark.parametrize("spec", ["w4a16", "w3a16-g64", "w4a8", "w4a8-g64-token", "w4a4-tensor-sym"])
def test_a_rung_is_a_recipe(name, spec):
    """The result is named by the recipe: it says what the name stood for, in any release."""
    recipe = mq.parse_recipe(f"{name}-{spec}")
    assert recipe == mq.parse_recipe(stands_for(f"{name}-{spec}"))
    assert not recipe.name.startswith(name)
    assert recipe.name.endswith(f"-{spec}")
    assert explained(f"{name}-{spec}") == f"{name}-{spec} is {recipe.name} in this release"


def test_a_rung_differs_where_inputs_are_quantized():
    assert stands_for("good-w4a16") == "kron-w4a16"
    assert stands_for("good-w4a8") == "kron+smoothquant+rotation-w4a8"


def test_a_rung_takes_ingredients():
    assert stands_for("good+embeddings-w4a16-g64") == "kron+embeddings-w4a16-g64"


@pytest.mark.parametrize("name", ["gptq-w4a16", "fast", "goodness-w4a16", "gptq+good-w4a16"])
def test_what_is_no_rung_stands_for_itself(name):
    assert stands_for(name) == name
    assert explained(name) is None


def test_overrides_go_with_a_rung():
    assert mq.parse_recipe("fast-w4a8", ["@attention=keep"]).name == "gptq-w4a8,@attention=keep"


def test_a_hessian_can_be_named():
    recipe = mq.parse_recipe("kron+sketchB25-w4a16")
    assert {spec.two_sided for _, spec in recipe.rules} == {TwoSided("B", 0.25)}
    assert not any(spec.open_ended for _, spec in recipe.rules)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gptq+sketchA50-w4a16", "'sketchA50' is about two-sided rounding, and gptq is none"),
        ("kron+sketchA101-w4a16", "a share from 0 to 1"),
        ("kron+sketchC50-w4a16", "unknown ingredient 'sketchC50'"),
    ],
)
def test_a_hessian_that_is_none_is_refused(name, says):
    with pytest.raises(RecipeError, match=says):
        mq.parse_recipe(name)
