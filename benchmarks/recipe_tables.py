"""Rows of recipes as tables: a table a format, each recipe beside a base, with intervals over draws (``draws.py``).

A row has the PSNR of every picture under ``psnr_each`` and stored bits a weight of the whole model under
``bits_per_weight``; what else a benchmark shows it names itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

import draws
from rows import read

Figures = dict[str, Any]


def by_recipe(file: Path, pictures: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a file by name, one a draw, in the order of the draws.

    Args:
        file: What ``Rows`` keeps.
        pictures: What a message calls what pictures were drawn of, such as "prompts".

    Raises:
        click.ClickException: Rows of several models or pictures, or none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    kinds = set[str]()
    for row in sorted(read(file), key=lambda row: row["of"]["draw"]):
        kinds.add(str({key: value for key, value in row["of"].items() if key != "draw"}))
        found.setdefault(row["name"], []).append(row)
    if len(kinds) != 1:
        of = " and ".join(sorted(kinds)) or "nothing"
        raise click.ClickException(f"{file}: rows of {of}; expected them to be of one model and its {pictures}")
    return found


def compared(rows: list[dict[str, Any]], base: list[dict[str, Any]] | None, means: Iterable[str]) -> Figures:
    """The figures of a recipe, a row a draw: means over draws, its PSNR, and the difference to ``base`` on the draws
    that both have.
    """
    each = draws.table(rows, "psnr_each")
    figures: Figures = {key: float(np.mean([row[key] for row in rows])) for key in means}
    figures |= {"draws": len(rows), "psnr_db": float(each.mean()), "psnr_95": draws.interval(each)}
    if base is not None:
        both = min(len(rows), len(base))
        gain = each[:both] - draws.table(base[:both], "psnr_each")
        figures |= {"gain_db": float(gain.mean()), "gain_95": draws.interval(gain)}
    return figures


def format_of(name: str) -> str:
    """``w4a16-g64`` of ``gptq-w4a16-g64``, ``w4a8`` of ``taqdit-w4a8@300``."""
    return name.partition("@")[0].partition("-")[2]


def tables(
    figures: dict[str, Figures], formats: Iterable[str], titles: Iterable[str], line: Callable[[str, Figures], str]
) -> str:
    """A table a format, the smallest model first; within a hundredth of a bit by name, so that nothing is ranked.

    Args:
        figures: Of each recipe.
        formats: Those that come first, in their order.
        titles: Of the columns after the first, whose title is the format.
        line: Called with a recipe and its figures, returns its line.
    """
    parts = []
    for form in dict.fromkeys([*formats, *sorted(map(format_of, figures))]):
        found = [(name, row) for name, row in figures.items() if format_of(name) == form]
        lines = [line(name, row) for name, row in sorted(found, key=lambda item: (bits(item[1]), item[0]))]
        if lines:
            columns = [form.upper(), *titles]
            parts.append("\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]))
    return "\n\n".join(parts)


def bits(figures: Figures) -> float:
    """Stored bits a weight, as a table has them."""
    return round(figures["bits_per_weight"], 2)


def quality(figures: Figures) -> str:
    """PSNR with its interval."""
    return f"{figures['psnr_db']:.2f} ({span(figures['psnr_95'], '.1f')})"


def gain(figures: Figures) -> str:
    """The difference to the base with its interval, and whether it is a tie."""
    tie = ", a tie" if draws.tied(figures["gain_95"]) else ""
    return f"{figures['gain_db']:+.2f} ({span(figures['gain_95'], '+.2f')}){tie}"


def span(interval: list[float], form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"
