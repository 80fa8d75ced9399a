"""The registry: finds every file, is complete, cited, and clear about what it does not know."""

import re
import subprocess
import sys

import pytest

from mlxquant.errors import RecipeError
from mlxquant.methods import registry
from mlxquant.methods.registry import Citation
from mlxquant.recipes.citations import FEATURES

PAPER = Citation("mine", "@article{me2026mine,\n  title = {Mine}\n}")
METHODS = [method for kind in registry.KINDS for method in registry.members(kind)]


@pytest.fixture
def registered(monkeypatch):
    """Registers as usual, until the test is over."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    return registry.register


def test_the_methods_are_found_by_kind():
    assert {method.name for method in registry.members("steps")} == {"extremes", "mse", "search"}
    assert {method.name for method in registry.members("round")} >= {"rtn", "gptq", "gptq-descent"}
    assert all(registry.members(kind) for kind in registry.KINDS)


def test_they_go_by_name_whoever_was_imported_first():
    first = "from mlxquant.methods.weights import qronos\nfrom mlxquant.methods.inputs import envelopes\n"
    show = "from mlxquant.methods.registry import KINDS, members\n"
    show += "print([(method.kind, method.name) for kind in KINDS for method in members(kind)])"
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (show, first + show)
    ]
    assert found[0] == found[1] == f"{[(method.kind, method.name) for method in METHODS]}\n"


def test_every_method_can_be_asked_for_and_says_what_it_is():
    for method in METHODS:
        assert registry.get(method.kind, method.name) is method
        assert method.summary
        assert method.function.__doc__


def test_every_citation_is_a_paper_with_a_key_of_its_own():
    papers = {method.citation for method in METHODS} - {None} | {paper for _, paper, _ in FEATURES}
    assert len({paper.key for paper in papers}) == len({paper.bibtex for paper in papers}) == len(papers)
    for paper in papers:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"unknown round method 'nearest'; known: .*gptq.*rtn"):
        registry.get("round", "nearest")


@pytest.mark.parametrize("paper", [PAPER, None])
def test_a_method_may_stand_anywhere_and_be_nobodys(registered, paper):
    function = registered("round", "mine", citation=paper, summary="mine")(lambda weight, grid, moments: None)
    assert registry.get("round", "mine").function is function
    assert registry.get("round", "mine").citation is paper
    assert "mine" in {method.name for method in registry.members("round")}


def test_registering_twice_or_wrongly_is_an_error(registered):
    with pytest.raises(ValueError, match="unknown kind"):
        registered("rounding", "x", summary="")
    rtn = registry.get("round", "rtn")
    with pytest.raises(ValueError, match="two round methods"):
        registered("round", "rtn", summary="")(rtn.function)
    assert registry.get("round", "rtn") is rtn


def test_a_key_is_one_papers(registered):
    registered("round", "x", citation=PAPER, summary="")(len)
    registered("steps", "x", citation=Citation(PAPER.key, PAPER.bibtex), summary="")(len)
    with pytest.raises(ValueError, match="round y and round x cite two papers as 'mine'"):
        registered("round", "y", citation=Citation("mine", "@article{other,\n}"), summary="")(len)


@pytest.mark.parametrize("text", ["", "2210.17323", "@article{a, title = {b}", "article{a}"])
def test_a_citation_is_bibtex(text):
    with pytest.raises(ValueError, match="citation 'x': expected one BibTeX entry"):
        Citation("x", text)


def test_a_paper_may_be_elsewhere_than_on_arxiv():
    assert PAPER.arxiv is None
