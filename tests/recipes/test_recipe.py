"""Recipes are parsed strictly; the first matching rule decides; a glob that matches nothing is an error."""

import json

import pytest

from mlxquant.errors import RecipeError
from mlxquant.files import checked
from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.inputs.tiers import BUDGET
from mlxquant.methods.weights.adaround import Settings
from mlxquant.numerics.input_ranges import RANGE_BATCH
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.recipes.recipe import ActivationSpec, LayerSpec, Recipe, TwoSided

LAYERS = {"blocks.0.mlp.fc1": "mlp", "blocks.0.mlp.fc2": "mlp", "blocks.0.ada": "modulation", "out": "output"}


def test_presets_keep_modulation_and_output_at_eight_bits():
    plan = parse_recipe("gptq-w4a8").plan(LAYERS)
    assert plan["blocks.0.mlp.fc1"] == LayerSpec(WeightFormat(4), ActivationSpec(8), "search", "gptq")
    assert plan["blocks.0.ada"] == LayerSpec(WeightFormat(8), None, "search", "gptq")
    assert set(plan) == set(LAYERS)


def test_names_carry_format_and_options():
    plan = parse_recipe("rtn-w3a6-g64-sym-static").plan(LAYERS)
    assert plan["blocks.0.mlp.fc1"].weight == WeightFormat(3, 64, True)
    assert plan["blocks.0.mlp.fc1"].activation == ActivationSpec(6, per_timestep=False)


def test_a_method_brings_its_options_along():
    recipe = parse_recipe("taqdit-w4a6")
    plan = recipe.plan(LAYERS)
    assert recipe.sensitivity
    assert plan["blocks.0.mlp.fc1"] == LayerSpec(
        WeightFormat(4),
        ActivationSpec(6, budget=BUDGET, shift=True),
        "search",
        "gptq",
        reconstruct="adaround",
        transforms=("smoothquant",),
    )
    assert plan["blocks.0.ada"] == LayerSpec(WeightFormat(8), None, "search", "gptq")
    for name in ("rtn-w4a8", "gptq-w4a8", "descent-w4a8", "adaround-w4a8"):
        assert not parse_recipe(name).sensitivity
        assert parse_recipe(name).plan(LAYERS)["blocks.0.mlp.fc1"].activation == ActivationSpec(8)


@pytest.mark.parametrize("name", ["taqdit-w4a8", "taqdit-w4a16"])
def test_overrides_keep_the_methods_options(name):
    recipe = parse_recipe(name, ["*.fc2=w3a8-g64-sym-static", "blocks.*.ada=keep"])
    assert recipe.sensitivity
    assert recipe.name == f"{name},*.fc2=w3a8-g64-sym-static,blocks.*.ada=keep"
    plan = recipe.plan(LAYERS)
    activation = ActivationSpec(8, per_timestep=False, budget=BUDGET, shift=True)
    assert plan["blocks.0.mlp.fc2"] == LayerSpec(
        WeightFormat(3, 64, True), activation, "search", "gptq", reconstruct="adaround", transforms=("smoothquant",)
    )
    assert "blocks.0.ada" not in plan


@pytest.mark.parametrize(
    "name",
    ["", "w4a8", "gptq", "gptq-", "magic-w4a8", "gptq-w9a8", "gptq-w4a5", "gptq-w4a8-g100", "rtn-w4a8-extra", "rtn-w4"],
)
def test_unknown_recipes_are_refused(name):
    with pytest.raises(RecipeError, match="unknown recipe"):
        parse_recipe(name)


def test_overrides_come_first_and_in_order():
    plan = parse_recipe("gptq-w4a8", ["*.fc2=w8a16", "*.mlp.*=w6a8", "@output=keep"]).plan(LAYERS)
    assert plan["blocks.0.mlp.fc2"].weight.bits == 8
    assert plan["blocks.0.mlp.fc2"].activation is None
    assert plan["blocks.0.mlp.fc1"].weight.bits == 6
    assert "out" not in plan


@pytest.mark.parametrize("override", ["*.fc2", "=w4a8", "*.fc2=w99", ""])
def test_malformed_overrides_are_refused(override):
    with pytest.raises(RecipeError):
        parse_recipe("gptq-w4a8", [override])


def test_glob_that_matches_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"pattern '\*\.fc3' matches none of the model's 4 layers"):
        parse_recipe("gptq-w4a8", ["*.fc3=w8a8"]).plan(LAYERS)


def test_the_error_tells_near_names():
    with pytest.raises(RecipeError, match=r"such as: .*blocks\.0\.mlp\.fc2"):
        parse_recipe("gptq-w4a8", ["blocks.0.mpl.fc2=w8a8"]).plan(LAYERS)


def test_a_rule_may_name_a_module_or_a_last_part():
    plan = parse_recipe("gptq-w4a8", ["*.mlp=w8a16", "ada=keep"]).plan(LAYERS)
    assert plan["blocks.0.mlp.fc1"].weight.bits == plan["blocks.0.mlp.fc2"].weight.bits == 8
    assert "blocks.0.ada" not in plan
    assert list(plan) == [path for path in LAYERS if path in plan]


def test_unknown_role_is_refused():
    with pytest.raises(RecipeError, match="unknown role '@attn'; the model's roles are @mlp, @modulation, @output"):
        parse_recipe("gptq-w4a8", ["@attn=keep"]).plan(LAYERS)


def test_recipe_that_quantizes_nothing_is_refused():
    with pytest.raises(RecipeError, match="quantizes no layer"):
        Recipe("nothing", (("*", None),)).plan(LAYERS)


@pytest.mark.parametrize(
    "name",
    [
        "taqdit-w4a8",
        "tcaqdm+softmax4-w3a6-g64",
        "svdquant+refit+mixed4.5-w4a16",
        "rtn-w8a8-token",
        "mixed-w4a8-g64-bf16-static",
    ],
)
def test_a_recipe_is_what_it_saved(name):
    recipe = parse_recipe(name, ["*.fc2=w8a16", "@output=keep"])
    assert Recipe.from_dict(recipe.to_dict()) == Recipe.from_dict(checked.plain(recipe.to_dict())) == recipe


def test_digits_are_saved_where_they_are_not_the_usual_ones():
    """Older releases refuse what they do not know, and read the rest."""
    saved = parse_recipe("gptq-w4a16-g64", ["*.fc2=w8a16-bf16"]).to_dict()
    assert [spec["weight"] for _, spec in saved["rules"]][:2] == [
        {"bits": 8, "group": "channel", "symmetric": True, "digits": 8},
        {"bits": 8, "group": 64, "symmetric": False},
    ]


def test_a_recipe_of_an_older_version_is_read():
    """It knew fewer keys, and one way to refine."""
    spec = {"weight": {"bits": 4}, "activation": {"bits": 8}, "steps": "search", "rounding": "gptq", "refine": True}
    found = Recipe.from_dict({"name": "old", "rules": [["*", spec], ["x", None]], "learning": {"iterations": 5}})
    layer = LayerSpec(WeightFormat(4), ActivationSpec(8), "search", "gptq", refine="refit")
    assert found == Recipe("old", (("*", layer), ("x", None)), learning=Settings(iterations=5))


def test_an_older_version_averaged_single_samples():
    spec = {"weight": {"bits": 4}, "activation": {"bits": 8, "range": "average"}, "steps": "search", "rounding": "gptq"}
    old = {"name": "old", "rules": [["*", spec]]}
    assert Recipe.from_dict(old).range_batch == 1
    assert Recipe.from_dict({**old, "range_batch": 8}).range_batch == 8
    plain = [["*", {**spec, "activation": {"bits": 8}}]]
    assert Recipe.from_dict({**old, "rules": plain}).range_batch == RANGE_BATCH


def test_a_batch_has_a_sample():
    with pytest.raises(RecipeError, match="at least 1 sample, found 0; 32 is the default"):
        Recipe("none", (), range_batch=0)


def test_a_recipe_of_a_newer_version_is_refused():
    with pytest.raises(RecipeError, match="sets colour, which this version does not know; update mlxquant"):
        Recipe.from_dict({"name": "new", "rules": [], "colour": "red"})


def test_impossible_specifications_are_refused():
    with pytest.raises(RecipeError, match="activation bits"):
        ActivationSpec(5)
    for budget in (0, -1, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="budget of activations must be a positive number"):
            ActivationSpec(8, budget=budget)
    with pytest.raises(RecipeError, match="bits must be 2 to 8"):
        WeightFormat(9)
    with pytest.raises(RecipeError, match="group"):
        WeightFormat(4, 48)


@pytest.mark.parametrize("name", ["gptq-w4a8", "kron-w4a16", "kron+sketchB25-w4a16"])
def test_only_a_chosen_hessian_is_written(name):
    """A recipe that is not two-sided, or leaves it open, is written as ever, and what was written so is read."""
    recipe = parse_recipe(name)
    saved = json.loads(json.dumps(recipe.to_dict()))
    specs = [spec for _, spec in saved["rules"] if spec is not None]
    told = {"sketch": "B", "share": 0.25}
    assert [spec.get("two_sided") for spec in specs] == [told if "sketch" in name else None] * len(specs)
    assert all(("two_sided" in spec) == ("sketch" in name) for spec in specs)
    assert Recipe.from_dict(saved) == recipe
    assert {spec.open_ended for _, spec in recipe.rules} == {name == "kron-w4a16"}


@pytest.mark.parametrize(("sketch", "share"), [("C", 0.5), ("A", 1.5), ("B", -0.1)])
def test_a_hessian_that_there_is_not_is_refused(sketch, share):
    with pytest.raises(RecipeError, match="a sketch of"):
        TwoSided(sketch, share)
