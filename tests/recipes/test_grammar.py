"""Recipes by name: methods, ingredients, and what is registered."""

import pytest

from mlxquant.errors import RecipeError
from mlxquant.grids.weights import WeightFormat
from mlxquant.methods import registry
from mlxquant.recipes.grammar import ingredients, parse_recipe, parse_template, with_bfloat16_scales
from mlxquant.recipes.presets import INGREDIENTS
from mlxquant.recipes.recipe import ActivationSpec, LayerSpec

LAYERS = {"blocks.0.mlp.fc1": "mlp", "blocks.0.ada": "modulation", "out": "output"}


def main(name):
    return parse_recipe(name).plan(LAYERS)["blocks.0.mlp.fc1"]


def test_ingredients_add_up():
    spec = main("qronos+smoothquant+rotation+whitened16+tdq-w4a4")
    assert spec == LayerSpec(
        WeightFormat(4),
        ActivationSpec(4, range="tdq"),
        "search",
        "qronos",
        transforms=("smoothquant", "rotation"),
        branch="whitened",
        rank=16,
    )
    recipe = parse_recipe("gptq+sensitivity+sequential+progressive+softmax8-w4a8")
    assert (recipe.sensitivity, recipe.sequential, recipe.rounds, recipe.probabilities) == (True, True, 2, 8)


def test_mixed_recipes_may_say_their_size():
    assert parse_recipe("mixed-w4a8").mixed
    assert parse_recipe("mixed-w4a8").bits_per_weight is None
    recipe = parse_recipe("gptq+rotation+mixed4.5-w4a4")
    assert (recipe.mixed, recipe.bits_per_weight) == (True, 4.5)
    assert recipe.name == "gptq+rotation+mixed4.5-w4a4"


@pytest.mark.parametrize("kind", ["transform", "range", "branch"])
def test_whatever_is_registered_is_an_ingredient(kind):
    for method in registry.members(kind):
        assert method.name in ingredients()
        assert parse_template(f"rtn+{method.name}") != parse_template("rtn") or method.name == "extremes"


def test_whatever_rounds_is_a_method():
    for method in registry.members("round"):
        assert parse_template(method.name).layer.rounding == method.name


def test_names_do_not_clash():
    assert len(ingredients()) == len(set(ingredients()))
    assert not set(INGREDIENTS) & {m.name for kind in ("transform", "range", "branch") for m in registry.members(kind)}


def test_careful_layers_are_only_rounded():
    spec = parse_recipe("taqdit+rotation+svd8-w4a8").plan(LAYERS)["blocks.0.ada"]
    assert spec == LayerSpec(WeightFormat(8), None, "search", "gptq")


def test_only_some_methods_look_at_both_streams():
    assert main("qronos-w4a8").cross
    assert main("gptq+corrected-w4a8").cross
    assert not main("gptq-w4a8").cross


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic-w4a8", "unknown method 'magic'; known: adaround"),
        ("gptq+magic-w4a8", "unknown ingredient 'magic'; known: "),
        ("gptq+svd0-w4a8", "unknown ingredient 'svd0'"),
        ("gptq+-w4a8", "unknown ingredient ''"),
        ("gptq+rotation+smoothquant-w4a8", "'smoothquant' comes after 'rotation', which must be the last"),
        ("quarot+rotation-w4a8", "'rotation' comes after 'rotation'"),
        ("gptq+average0-w4a8", "unknown ingredient 'average0'"),
        ("gptq+average+average8-w4a8", "'average8' comes after 'average'; a recipe has one range method"),
        ("gptq+tdq+average8-w4a8", "'average' comes after 'tdq'; a recipe has one range method"),
        ("gptq+average8-w4a16", "'average8' is about quantized inputs"),
        ("gptq+tdq+logsnr-w4a8", "'logsnr' comes after 'tdq'; a recipe has one range method"),
        ("svdquant+whitened8-w4a8", "'whitened8' comes after 'svd'; a recipe has one branch"),
        ("gptq+softmax8+softmax4-w4a8", "'softmax4' comes after 'softmax8'; a recipe has one width of probabilities"),
        (
            "gptq+logsnr-w4a16",
            "'logsnr' is about quantized inputs, and a16 has none; leave it out, or choose a8, a6 or a4",
        ),
        ("gptq+shift-w4a16", "'shift' is about quantized inputs"),
        ("taqdit+tiers-w4a16", "'tiers' is about quantized inputs"),
        ("rtn+damped-w4a8", "'damped' chooses a damping, and rtn has none; leave it out, or round by gptq"),
        ("qronos+corrected-w4a8", "qronos makes up for the layers before by itself; for 'corrected' use gptq"),
        ("gptaq+refit-w4a8", "gptaq makes up for the layers before by itself; for 'refit' use gptq"),
        ("gptq", r"expected METHOD\[\+INGREDIENT"),
        ("gptq+tdq", r"expected METHOD\[\+INGREDIENT"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(name)


def test_the_batch_of_averages_is_in_the_name():
    for name, batch in {"rtn+average-w8a8": 32, "rtn+average8-w8a8": 8, "rtn+average100+shift-w8a8": 100}.items():
        recipe = parse_recipe(name)
        assert recipe.range_batch == batch
        assert recipe.averages
        assert recipe.plan(LAYERS)["blocks.0.mlp.fc1"].activation.range == "average"
    assert not parse_recipe("rtn-w8a8").averages


def test_inputs_that_only_an_override_quantizes_are_inputs():
    assert parse_recipe("gptq+logsnr-w4a16", ["*.fc2=w4a8"]).rules[0][1].activation.range == "logsnr"


@pytest.mark.parametrize(("spec", "bits"), [("w4a8", 8), ("w4a6", 6), ("w4a4", 4), ("w4a16", None)])
def test_tcaqdm_quantizes_probabilities_as_it_does_inputs(spec, bits):
    assert parse_recipe(f"tcaqdm-{spec}").probabilities == bits
    assert parse_recipe(f"tcaqdm+softmax6-{spec}").probabilities == 6


def test_damping_is_chosen_for_whatever_has_one():
    for name in ("gptq+damped-w4a8", "rtn+corrected+damped-w4a8", "rtn+whitened8+damped-w4a8"):
        assert parse_recipe(name).rules[-1][1].held_out


@pytest.mark.parametrize(
    ("ingredient", "field", "value"),
    [("mse", "steps", "mse"), ("refit", "refine", "refit"), ("adaround", "reconstruct", "adaround")],
)
def test_every_kind_of_a_layers_methods_can_be_named(ingredient, field, value):
    for method in ("gptq", "rtn"):
        assert getattr(parse_recipe(f"{method}+{ingredient}-w4a8").rules[-1][1], field) == value


def test_scales_for_bfloat16_are_in_the_name():
    layers = {**LAYERS, "blocks.0.attn.q": "attention"}
    recipe = parse_recipe("gptq+mixed4.5-w4a8-g64-bf16-token", ["@attention=w8a16-g64-bf16", "*.fc1=w3a8-bf16"])
    plan = recipe.plan(layers)
    assert {path: str(spec.weight) for path, spec in plan.items()} == {
        "blocks.0.mlp.fc1": "w3-bf16",
        "blocks.0.ada": "w8-g64-bf16",
        "out": "w8-g64-bf16",
        "blocks.0.attn.q": "w8-g64-bf16",
    }
    assert recipe.rules[-1][1].activation.per_token
    assert plan["blocks.0.mlp.fc1"].plain.weight.digits == 8
    with pytest.raises(RecipeError, match="-sym/-asym, -bf16, and -static or -token"):
        parse_recipe("gptq-w4a8-static-bf16")


@pytest.mark.parametrize(
    ("name", "overrides", "other"),
    [
        ("gptq-w4a16-g64", [], "gptq-w4a16-g64-bf16"),
        ("mixed-w4a8-static", [], "mixed-w4a8-bf16-static"),
        ("rtn-w2a4-tensor-asym-token", [], "rtn-w2a4-tensor-asym-bf16-token"),
        (
            "qronos+svd8+embeddings-w4a8-g32-sym",
            ["*.fc[12]=w8a16", "@attention=keep", "@mlp=w3a8-token"],
            "qronos+svd8+embeddings-w4a8-g32-sym-bf16,*.fc[12]=w8a16-bf16,@attention=keep,@mlp=w3a8-bf16-token",
        ),
        ("gptq-w4a16-bf16", ["out=w8a16-bf16"], "gptq-w4a16-bf16,out=w8a16-bf16"),
    ],
)
def test_a_whole_recipe_can_be_rewritten_for_bfloat16(name, overrides, other):
    recipe = with_bfloat16_scales(parse_recipe(name, overrides))
    assert recipe == parse_recipe(*((part := other.split(","))[0], part[1:]))
    assert {spec.weight.digits for _, spec in recipe.rules if spec is not None} == {8}
    assert with_bfloat16_scales(recipe) == recipe
