"""What a pattern names, and what is said when it names nothing."""

import re

import pytest

from mlxquant.errors import RecipeError
from mlxquant.recipes.patterns import as_list, first, named, names, require_matches

HEAD, FC, CONV = "model.lm_head", "model.layers.0.mlp.fc", "backbone.stem.conv"


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("lm_head", {HEAD}),  # a last part
        ("model.lm_head", {HEAD}),
        ("model", {HEAD, FC}),  # a module that holds them
        ("model.layers.0", {FC}),
        ("model.layers", {FC}),
        ("mlp", set()),  # neither a last part nor a whole path
        ("*.mlp", {FC}),
        ("*.conv", {CONV}),
        ("*", {HEAD, FC, CONV}),
        ("model.layers.[1-9].*", set()),
        ("lm_hea", set()),
        (re.compile("head$"), {HEAD}),
        (re.compile("mlp"), {FC}),
        (re.compile("^mlp"), set()),
    ],
)
def test_what_a_pattern_names(pattern, named):
    assert {path for path in (HEAD, FC, CONV) if names(pattern, path)} == named


def test_roles_are_those_that_an_adapter_gives():
    assert names("@attention", FC, "attention")
    assert not names("@attention", FC, "mlp")
    assert not names("@attention", "attention")


def test_a_recipes_pattern_that_fits_whole_paths_names_those_alone():
    layers = {"out": "output", "blocks.0.attn.out": "attention", "blocks.0.out.fc": "mlp"}
    assert named("out", layers) == ["out"]
    assert named("out", {path: role for path, role in layers.items() if path != "out"}) == ["blocks.0.attn.out"]
    assert named("*.out", layers) == ["blocks.0.attn.out"]
    assert named("*.attn", layers) == ["blocks.0.attn.out"]
    assert named("blocks.0", layers) == ["blocks.0.attn.out", "blocks.0.out.fc"]
    assert named("@output", layers) == ["out"]
    assert named("@embedder", layers) == []


def test_one_pattern_is_a_list_of_one():
    assert as_list("lm_head") == ["lm_head"]
    expression = re.compile("x")
    assert as_list(expression) == [expression]
    assert as_list(("a", "b")) == ["a", "b"]


def test_the_first_pattern_that_matches_is_told():
    assert first(["nothing", re.compile("fc"), "*"], [FC]) == "fc"
    assert first(["nothing"], [FC, HEAD]) is None


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("lm_heads", "lm_head"), ("*.lm_hed", "lm_head"), ("backbone.stem.conf", CONV), (re.compile("mlp.fd$"), "fc")],
)
def test_a_pattern_that_matches_nothing_is_told_with_near_names(pattern, near):
    with pytest.raises(RecipeError, match="matches none of the model's 3 layers") as caught:
        require_matches("exclude", ["lm_head", pattern], [HEAD, FC, CONV])
    assert near in str(caught.value)
