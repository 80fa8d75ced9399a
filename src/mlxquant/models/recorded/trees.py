"""The arguments and results of calls as trees: which arrays are in them, where, and the same tree with others.

Lists, tuples (named ones, too), dictionaries and dataclasses are looked into. Anything else that is no array is a leaf,
kept by reference.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

Path = tuple[Any, ...]


class Leaf:
    """What derives from this is not looked into."""


def _children(tree: Any) -> Iterator[tuple[Any, Any]] | None:
    """What is in a node, by key; None for a leaf."""
    if isinstance(tree, (list, tuple)):
        return iter(enumerate(tree))
    if isinstance(tree, dict) and not hasattr(tree, "parameters"):  # a module is a dictionary, but one thing
        return iter(tree.items())
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, Leaf)):
        return ((field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree))
    return None


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with its path, depth first."""
    children = _children(tree)
    if children is None:
        yield path, tree
    else:
        for key, value in children:
            yield from leaves(value, (*path, key))


def arrays(tree: Any) -> dict[Path, mx.array]:
    """Every array by its path, depth first."""
    return {path: leaf for path, leaf in leaves(tree) if isinstance(leaf, mx.array)}


def mapped(tree: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """The same tree with ``change(path, leaf)`` in the place of each leaf."""
    children = _children(tree)
    if children is None:
        return change(path, tree)
    found = {key: mapped(value, change, (*path, key)) for key, value in children}
    if isinstance(tree, list):
        return list(found.values())
    if isinstance(tree, tuple):
        return type(tree)(*found.values()) if hasattr(tree, "_fields") else tuple(found.values())
    if isinstance(tree, dict):
        return found
    other = copy.copy(tree)
    for name, value in found.items():
        object.__setattr__(other, name, value)  # frozen ones, too
    return other


def as_it_is(leaf: Any) -> Any:
    """An array, also one of NumPy, as an object of its own, for somebody may write into the other; any other leaf
    itself.
    """
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    return copy.copy(leaf) if isinstance(leaf, mx.array) else leaf


def told(path: Path) -> str:
    """A path in an (args, kwargs) tree as a reader knows it: ``args[0]``, ``cache[1]``."""
    kind, *rest = path
    if kind == 1 and rest:
        name, *rest = rest
        return str(name) + "".join(f"[{part!r}]" for part in rest)
    return "args" + "".join(f"[{part!r}]" for part in rest)


def held_arrays(value: Any) -> list[Any]:
    """What of a leaf that is no array can change while a call runs, to compare by identity: the arrays and numbers in
    its attributes, one level deep, and in lists there.
    """
    own = getattr(value, "__dict__", None)
    if own is None:
        return []
    return [leaf for _, leaf in leaves(dict(own)) if isinstance(leaf, (mx.array, int, float))]
