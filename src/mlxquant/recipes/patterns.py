"""Patterns: how the rules of a recipe, and ``exclude`` and ``include`` of ``quantize_linears``, name layers.

A pattern is one of these:

- A glob over a layer's dotted path, or over that of a module that holds it: "*.mlp.fc2" is a layer of every block,
  "*.attn" all of every attention, "backbone" all in the backbone. "*" also stands for dots.
- A name without dots and wildcards, which is also the last part of a path: "lm_head" is "model.lm_head".
- A role that the model's adapter gives to layers: "@attention", or any other word of the adapter's (``roles``). Any
  module that has no adapter has no roles.
- In Python, a compiled regular expression, which is searched for in the path.

In a recipe a pattern that fits whole paths of layers names those alone, whatever else it fits: a rule for the layer
"out" is about that one, and not about "attn.out".

A pattern that names nothing is a mistake: an error tells the nearest names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from ..errors import RecipeError

Pattern = str | re.Pattern[str]
WILDCARDS = "*?["
ROLE = "@"


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


def names(pattern: Pattern, path: str, role: str | None = None) -> bool:
    """Whether a pattern names the layer at ``path``, which has this role."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    if pattern.startswith(ROLE):
        return role is not None and pattern == ROLE + role
    parts = path.split(".")
    known = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if not any(sign in pattern for sign in "." + WILDCARDS):
        known.append(parts[-1])
    return any(fnmatchcase(name, pattern) for name in known)


def named(pattern: str, layers: Mapping[str, str]) -> list[str]:
    """The paths that a recipe's pattern names among ``layers`` (path to role), in their order; perhaps none."""
    whole = [path for path in layers if fnmatchcase(path, pattern)]
    return whole or [path for path, role in layers.items() if names(pattern, path, role)]


def is_open(pattern: str) -> bool:
    """Whether a pattern is about whatever it happens to fit: it has wildcards, and is no role."""
    return not pattern.startswith(ROLE) and any(sign in pattern for sign in WILDCARDS)


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
            raise unmatched(option, pattern, seen)


def unmatched(where: str, pattern: Pattern, paths: list[str]) -> RecipeError:
    """What is wrong with a pattern, given to ``where``, that names none of these paths."""
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    wanted = re.sub(r"[^\w.]", "", text).strip(".")
    near = get_close_matches(wanted, [*paths, *(path.rpartition(".")[2] for path in paths)], 3, 0.5)
    hint = ", ".join(dict.fromkeys(near or paths[:3])) or "none"
    return RecipeError(f"{where} pattern {text!r} matches none of the model's {len(paths)} layers; such as: {hint}")
