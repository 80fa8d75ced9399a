"""Which layers a list of patterns names, and an error with the nearest names where it names none.

A pattern is a glob over a layer's whole dotted path, or over that of a module that holds it: "backbone" is all in the
backbone, "*.attn" all of every attention. A name without dots and wildcards is also the last part of a path, so
"lm_head" is "model.lm_head". A compiled regular expression is searched for in the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..errors import RecipeError

Pattern = str | re.Pattern[str]
WILDCARDS = "*?["


def as_list(patterns: Pattern | Iterable[Pattern]) -> list[Pattern]:
    """One pattern, or several; raises RecipeError on anything else."""
    found = (
        list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str | re.Pattern) else [patterns]
    )
    if other := [pattern for pattern in found if not isinstance(pattern, str | re.Pattern)]:
        raise RecipeError(
            f"a pattern is a glob or a compiled regular expression, found {other[0]!r}; pass one of them, or a list"
        )
    return found


def names(pattern: Pattern, path: str) -> bool:
    """Whether a pattern names the layer at ``path``."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    parts = path.split(".")
    known = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if not any(sign in pattern for sign in "." + WILDCARDS):
        known.append(parts[-1])
    return any(fnmatchcase(name, pattern) for name in known)


def first(patterns: Iterable[Pattern], paths: Iterable[str]) -> str | None:
    """The first pattern that names one of these paths, as text; None when there is none."""
    seen = list(paths)
    found = next((p for p in patterns if any(names(p, path) for path in seen)), None)
    return found.pattern if isinstance(found, re.Pattern) else found


def require_matches(option: str, patterns: Iterable[Pattern], paths: Iterable[str]) -> None:
    """Raise RecipeError, with the nearest names, when one of the patterns names none of these paths."""
    seen = list(paths)
    for pattern in patterns:
        if not any(names(pattern, path) for path in seen):
            text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
            wanted = re.sub(r"[^\w.]", "", text).strip(".")
            near = get_close_matches(wanted, [*seen, *(path.rpartition(".")[2] for path in seen)], 3, 0.5)
            hint = ", ".join(dict.fromkeys(near or seen[:3])) or "none"
            raise RecipeError(
                f"{option} pattern {text!r} matches none of the model's {len(seen)} layers; such as: {hint}"
            )
