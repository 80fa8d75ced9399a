"""Whose methods a recipe uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..methods import registry
from ..recipes.citations import used
from ..recipes.recipe import Recipe


def cited(recipes: list[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Everything that the recipes (as plain data) use and that has a paper: ``name``, ``source`` (an arXiv id) and
    ``bibtex``.
    """
    uses: dict[str, list[str]] = {}
    for use, key in sorted({pair for recipe in recipes for pair in used(Recipe("", ()).to_dict() | dict(recipe))}):
        uses.setdefault(key, []).append(use)
    return [
        {"name": ", ".join(names), "source": _arxiv(registry.CITATIONS[key]), "bibtex": registry.CITATIONS[key]}
        for key, names in sorted(uses.items())
    ]


def _arxiv(bibtex: str) -> str:
    found = re.search(r"arXiv\D{0,12}(\d{4}\.\d{4,5})", bibtex)
    return f"arXiv {found[1]}" if found else ""
