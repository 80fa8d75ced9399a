"""``mlxquant methods``: what can be named in a recipe, and the paper behind it."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

import click

from .commandline.console import Command, json_asked, result, say
from .commandline.options import verbose_option
from .methods import registry
from .recipes.citations import papers
from .recipes.grammar import NAMED, parse_recipe
from .recipes.presets import INGREDIENTS, PRESETS, USUAL, Template


@click.command("methods", cls=Command)
@verbose_option
def command() -> None:
    """List every method with its paper.

    And what recipes are made of: METHOD[+INGREDIENT...]-wBaB. A METHOD is one of those below or the name of any way to
    round; an INGREDIENT is one of those below, or any method that is no way to round, no tier and no fake quantizer.
    With --json there is no table.
    """
    found = catalogue()
    if not json_asked():
        for line in table(found):
            say(line)
    result(found)


def catalogue() -> dict[str, Any]:
    """The registry's methods by kind, and what the names in recipes stand for, as plain data."""
    return {
        "methods": [
            {
                "kind": kind,
                "name": method.name,
                "summary": method.summary,
                "citation": None if method.citation is None else method.citation.key,
                "paper": None if method.citation is None else method.citation.arxiv,
            }
            for kind in registry.KINDS
            for method in registry.members(kind)
        ],
        "recipes": {name: differences(preset) for name, preset in PRESETS.items()},
        "ingredients": {name: {key: _plain(value) for key, value in own.items()} for name, own in INGREDIENTS.items()},
        "papers": {"recipes": of_presets(), "ingredients": of_ingredients()},
    }


def _plain(value: Any) -> Any:
    """Settings as plain data, and of those what is not as usual; true where that is nothing."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    usual, own = asdict(type(value)()), asdict(value)
    return {name: number for name, number in own.items() if number != usual[name]} or True


def of_presets() -> dict[str, list[str]]:
    """arXiv ids behind each METHOD."""
    return {name: sorted(arxiv_ids(f"{name}-w4a8")) for name in PRESETS}


def of_ingredients() -> dict[str, list[str]]:
    """arXiv ids behind each INGREDIENT: those of gptq with it, less those of gptq itself."""
    plain = arxiv_ids("gptq-w4a8")
    return {name: sorted(arxiv_ids(f"gptq+{name}-w4a8") - plain) for name in INGREDIENTS}


def arxiv_ids(recipe: str) -> set[str]:
    return {paper.arxiv for paper in papers([parse_recipe(recipe)]) if paper.arxiv is not None}


def differences(template: Template) -> dict[str, Any]:
    """How weights are rounded, and what else is not as it would be if nothing was said."""
    usual = USUAL.settings
    return {
        name: value
        for name, value in template.settings.items()
        if name in ("steps", "rounding") or value != usual[name]
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines, last = [f"{'kind':<12}{'name':<18}{'arXiv':<12}what it does"], ""
    for row in found["methods"]:
        lines.append(
            f"{row['kind'] if row['kind'] != last else '':<12}{row['name']:<18}{row['paper'] or '':<12}{row['summary']}"
        )
        last = row["kind"]
    for title, part in (("METHOD", "recipes"), ("INGREDIENT", "ingredients")):
        cited = {name: " ".join(ids) for name, ids in found["papers"][part].items()}
        width = 2 + max(map(len, cited.values()))
        lines += ["", f"{title:<14}{'arXiv':<{width}}stands for"]
        lines += [f"{name:<14}{cited[name]:<{width}}{words(parts)}" for name, parts in found[part].items()]
    kinds = ", ".join(NAMED)
    return [*lines, "", f"A recipe is METHOD[+INGREDIENT...]-wBaB; METHOD may be any round, INGREDIENT any of {kinds}."]


def words(parts: dict[str, Any]) -> str:
    """Fields of a template in words: ``rounding gptq, transforms rotation, sequential``."""
    shown = {name: "+".join(value) if isinstance(value, (tuple, list)) else value for name, value in parts.items()}
    shown = {name: words(value) if isinstance(value, dict) else value for name, value in shown.items()}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in shown.items()).replace("_", " ")


if __name__ == "__main__":
    command()
