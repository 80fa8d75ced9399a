"""``mlxquant methods``: complete, and the same for people and programs."""

from mlxquant.methods import registry
from mlxquant.recipes.citations import citation
from mlxquant.recipes.presets import INGREDIENTS, PRESETS

from support.command_line import run, succeed


def test_every_method_is_listed_with_its_paper():
    facts, said = succeed("methods")
    members = [(kind, method) for kind in registry.KINDS for method in registry.members(kind)]
    assert [(row["kind"], row["name"]) for row in facts["methods"]] == [(kind, method.name) for kind, method in members]
    for row, (_, method) in zip(facts["methods"], members, strict=True):
        line = next(line for line in said.splitlines() if method.summary in line)
        assert method.name in line
        assert (row["paper"] is None) == (method.citation is None)
        if row["paper"] is not None:
            assert row["paper"] in line
            assert row["paper"] in method.citation.bibtex
            assert row["citation"] == method.citation.key


def test_what_recipes_are_made_of_is_listed():
    facts, said = succeed("methods")
    assert set(facts["recipes"]) == set(PRESETS)
    assert set(facts["ingredients"]) == set(INGREDIENTS)
    assert facts["recipes"]["gptq"] == {"steps": "search", "rounding": "gptq"}
    row = next(line for line in said.splitlines() if line.startswith("taqdit "))
    assert "steps search, rounding gptq, reconstruct adaround, transforms smoothquant" in row
    assert all(arxiv in row for arxiv in ("2411.14172", "2004.10568", "2210.17323", "2211.10438"))
    assert facts["papers"]["recipes"]["mixed"] == ["1911.03852", "2210.17323"]
    assert facts["papers"]["ingredients"]["mixed"] == ["1911.03852"]
    assert facts["papers"]["ingredients"]["softmax4"] == ["2412.16700"]
    for name in facts["recipes"]:
        assert citation(f"{name}-w4a8") is not None


def test_json_alone():
    facts, said = succeed("methods", "--json")
    assert said == ""
    assert facts == succeed("methods")[0]


def test_it_is_a_module_too():
    from mlxquant import list_methods

    assert run("methods", "--help").stdout.splitlines()[0].endswith("methods [OPTIONS]")
    assert list_methods.command.name == "methods"
