"""Citations: all that a recipe uses, nothing that it does not, the same every time."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlxquant.errors import RecipeError
from mlxquant.methods import registry
from mlxquant.methods.inputs.clipping import TAQDIT
from mlxquant.recipes.citations import FEATURES, citation, methods
from mlxquant.recipes.grammar import parse_recipe
from mlxquant.recipes.presets import PRESETS


def keys(text):
    """The BibTeX keys, in order."""
    return re.findall(r"^@\w+\{(\w+),", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtn-w4a8", []),
        ("gptq-w4a16", ["frantar2023gptq"]),
        ("qronos-w4a16", ["zhang2025qronos"]),
        ("descent+smoothquant-w4a8", ["behdin2023quantease", "xiao2023smoothquant"]),
        ("svdquant-w4a8", ["frantar2023gptq", "xiao2023smoothquant", "li2025svdquant"]),
        (
            "taqdit-w4a8",
            ["nagel2020adaround", "li2021brecq", "frantar2023gptq", "xiao2023smoothquant", "liu2024taqdit"],
        ),
        ("rtn+tdq-w4a8", ["so2023tdq"]),
        ("rtn+corrected-w4a16", ["zhang2025qronos"]),
        ("rtn+progressive-w4a16", ["huang2024tcaqdm"]),
    ],
)
def test_a_recipe_cites_what_it_uses(name, expected):
    assert sorted(keys(citation(name))) == sorted(expected)


def test_each_paper_once_with_what_it_is_used_for():
    """The shift and averaged ranges are of one paper."""
    text = citation("rtn+shift+average-w4a8")
    assert text == f"% rtn+shift+average-w4a8: post-GELU shift, range average\n{TAQDIT.bibtex}\n"


def test_ranges_count_only_where_inputs_are_quantized():
    assert "range dynamic" in citation("tcaqdm-w4a8")
    assert "range dynamic" not in citation("tcaqdm-w4a16")


def test_quantized_probabilities_are_cited():
    assert keys(citation("rtn+softmax8-w4a8")) == ["huang2024tcaqdm"]
    assert "quantized attention probabilities" in citation("tcaqdm-w4a4")
    assert "quantized attention probabilities" not in citation("tcaqdm-w4a16")


def test_what_is_no_recipe_is_refused():
    with pytest.raises(RecipeError, match="None: expected a recipe, its name, or a quantized model"):
        citation(None)


def test_dropped_quantization_counts_only_where_codes_are_learned():
    for name, expected in (("adaround-w4a8", {"nagel2020adaround", "wei2022qdrop"}), ("rtn-w4a8", set())):
        recipe = parse_recipe(name)
        dropping = replace(recipe, learning=replace(recipe.learning, drop=0.5))
        assert set(keys(citation(dropping))) == expected


def test_names_recipes_and_quantized_models_are_cited_alike():
    model = SimpleNamespace(facts={"recipe": parse_recipe("gptq-w4a8").to_dict()})
    assert citation("gptq-w4a8") == citation(parse_recipe("gptq-w4a8")) == citation(model)


def test_mixed_precision_is_cited():
    recipe = parse_recipe("rtn-w4a8").to_dict()
    for how in ({"bits_per_weight": 5.0}, {"bits_per_activation": 5.0}, {"mixed": True}):
        assert keys(citation(SimpleNamespace(facts={"recipe": recipe | how}))) == ["dong2019hawqv2"]


def test_models_of_an_older_version_are_cited():
    """They have a rule with the keys of their time."""
    spec = {"weight": {"bits": 4}, "activation": {"bits": 8, "range": "average"}, "steps": "search", "rounding": "gptq"}
    model = SimpleNamespace(facts={"recipe": {"name": "old", "rules": [["*", spec], ["x", None]]}})
    assert keys(citation(model)) == ["frantar2023gptq", "liu2024taqdit"]


def test_every_preset_is_made_of_registered_methods_and_can_be_cited():
    for name in PRESETS:
        recipe = parse_recipe(f"{name}-w4a8")
        for kind, method in methods(recipe):
            assert registry.get(kind, method).name == method
        assert citation(recipe).count("@") == len(set(keys(citation(recipe))))


def test_what_a_recipe_does_beside_its_methods_is_found():
    everything = "rtn+shift+corrected+softmax8+progressive+sensitivity+learned+mixed+tuned-w4a8"
    recipe = parse_recipe(everything)
    dropping = replace(recipe, learning=replace(recipe.learning, drop=0.5))
    assert all(shows(dropping) for _, _, shows in FEATURES)
    assert not any(shows(parse_recipe("rtn-w4a8")) for _, _, shows in FEATURES)


def test_an_unknown_recipe_is_an_error():
    with pytest.raises(RecipeError, match="unknown recipe"):
        citation("bestest-w4a8")
