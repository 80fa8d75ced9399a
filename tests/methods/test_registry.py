"""The registry: complete, cited, and clear about what it does not know."""

import pytest

from mlxquant.errors import RecipeError
from mlxquant.methods import registry
from mlxquant.recipes.citations import FEATURES


def test_the_methods_are_found_by_kind():
    assert {method.name for method in registry.members("steps")} == {"extremes", "mse", "search"}
    assert {method.name for method in registry.members("round")} >= {"rtn", "gptq", "gptq-descent"}


def test_every_method_can_be_asked_for_and_says_what_it_is():
    for kind in registry.KINDS:
        for method in registry.members(kind):
            assert registry.get(kind, method.name) is method
            assert method.summary
            assert method.function.__doc__


def test_every_citation_is_used_and_is_bibtex():
    used = {method.citation_key for kind in registry.KINDS for method in registry.members(kind)} - {None}
    assert used | {key for _, key, _ in FEATURES} == set(registry.CITATIONS)
    for entry in registry.CITATIONS.values():
        assert entry.startswith("@")
        assert "arXiv:" in entry
        assert entry.count("{") == entry.count("}")


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"unknown round method 'nearest'; known: .*gptq.*rtn"):
        registry.get("round", "nearest")


def test_registering_twice_or_wrongly_is_an_error():
    with pytest.raises(ValueError, match="unknown kind"):
        registry.register("rounding", "x", summary="")
    with pytest.raises(ValueError, match="no citation"):
        registry.register("round", "x", citation="nobody", summary="")
    rtn = registry.get("round", "rtn")
    with pytest.raises(ValueError, match="two round methods"):
        registry.register("round", "rtn", summary="")(rtn.function)
    assert registry.get("round", "rtn") is rtn
