"""Roles are open: an adapter has any words it likes, says which of them want care, and recipes treat them so."""

import json
import pickle

import pytest

from mlxquant.errors import AdapterError, RecipeError
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.recipes.recipe import Recipe
from mlxquant.recipes.roles import CAREFUL, ROLES, Role

LAYERS = {
    "block.q": Role("attention"),
    "block.fc": "mlp",
    "block.route": Role("router", careful=True),
    "block.down": Role("resample"),
    "block.ada": "modulation",
}


def test_a_role_of_the_models_own_is_quantized_like_any_other_layer_unless_it_wants_care():
    recipe = parse_recipe("gptq+smoothquant-w4a8")
    plan, main = recipe.plan(LAYERS), recipe.rules[-1][1]
    assert plan["block.down"] == plan["block.q"] == main
    assert plan["block.route"] == plan["block.ada"] == main.careful
    assert (main.careful.weight.bits, main.careful.activation, main.careful.transforms) == (8, None, ())


def test_overrides_take_the_models_roles_as_they_stand():
    plan = parse_recipe("gptq-w4a8", ["@router=w4a8", "@resample=keep"]).plan(LAYERS)
    assert plan["block.route"] == plan["block.q"]
    assert "block.down" not in plan
    assert "block.route" not in parse_recipe("gptq-w4a8", ["@router=keep"]).plan(LAYERS)
    assert parse_recipe("gptq-w4a8", ["*=w3a16"]).plan(LAYERS)["block.route"].weight.bits == 3  # a rule of the user's


def test_an_unknown_role_is_an_error_that_lists_the_models():
    with pytest.raises(
        RecipeError,
        match=r"unknown role '@gate'; the model's roles are @attention, @mlp, @router, @resample, @modulation$",
    ):
        parse_recipe("gptq-w4a8", ["@gate=keep"]).plan(LAYERS)


@pytest.mark.parametrize("role", ROLES)
def test_the_usual_ones_keep_their_meaning(role):
    assert Role(role).careful == (role in CAREFUL)
    assert parse_recipe("rtn-w4a8", [f"@{role}=keep"]).plan({"a": "attention", "b": "mlp"}) != {}  # may name none
    with pytest.raises(AdapterError, match=f"role '{role}' wants .*care in every recipe"):
        Role(role, careful=not Role(role).careful)
    rules = (("*", parse_recipe("rtn-w4a8").rules[-1][1]),)
    assert Recipe("mine", rules).plan({"a": role})["a"].weight.bits == 4  # a recipe says it rule by rule


def test_a_saved_recipe_plans_what_it_planned():
    recipe = parse_recipe("gptq-w4a8", ["@resample=w6a16"])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).plan(LAYERS) == recipe.plan(LAYERS)
    assert [pattern for pattern, _ in parse_recipe("gptq-w4a8").rules] == ["@modulation", "@embedder", "@output", "*"]


@pytest.mark.parametrize("name", [None, 3, "", "two words", "a=b", "a,b", "@a", ["mlp"]])
def test_a_role_that_is_no_word_is_refused(name):
    with pytest.raises(AdapterError, match="a role is one word"):
        Role(name)


def test_a_role_is_text():
    route = Role("router", careful=True)
    assert (route, json.dumps(route)) == ("router", '"router"')
    assert Role(route).careful
    assert pickle.loads(pickle.dumps(route)).careful
