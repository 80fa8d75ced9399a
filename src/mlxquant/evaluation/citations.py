"""Whose methods a recipe uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..methods import registry


def cited(recipes: list[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Every method that the recipes (as plain data) name and that has a citation: ``name``, ``source`` (an arXiv id) and ``bibtex``."""
    named = {text for recipe in recipes for _, spec in recipe["rules"] for text in _texts(spec)}
    keys = {
        method.citation_key: method.name
        for kind in registry.KINDS
        for method in registry.members(kind)
        if method.name in named and method.citation_key is not None
    }
    return [{"name": name, "source": _arxiv(registry.CITATIONS[key]), "bibtex": registry.CITATIONS[key]} for key, name in keys.items()]


def _texts(data: Any) -> Iterator[str]:
    """All strings in plain data."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _texts(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _texts(value)


def _arxiv(bibtex: str) -> str:
    found = re.search(r"arXiv\D{0,12}(\d{4}\.\d{4,5})", bibtex)
    return f"arXiv {found[1]}" if found else ""
