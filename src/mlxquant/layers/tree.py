"""Find, replace and tap layers in a module tree by their dotted paths. Every change can be undone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import AdapterError, NumericsError


def parameters(tree: Any) -> dict[str, mx.array]:
    """All arrays of a module or of a nested dictionary of arrays, by dotted path."""
    leaves = tree.parameters() if isinstance(tree, nn.Module) else tree
    return dict(tree_flatten(leaves))


def require_finite(module: nn.Module, name: str) -> None:
    """Raise NumericsError, naming the tensor, when a parameter of the module called ``name`` holds NaN or infinity."""
    for path, value in parameters(module).items():
        if mx.issubdtype(value.dtype, mx.floating) and not bool(mx.isfinite(value).all().item()):
            bad = int(np.array((~mx.isfinite(value)).sum()))
            raise NumericsError(
                f"{name}: parameter {path} holds {bad} NaN or infinite values of {value.size}; repair the checkpoint"
            )


def module_of(model: Any) -> nn.Module:
    """The module of a model as anybody may hold one: the module itself, or what has it as ``module``, such as what
    ``mlxquant.load`` returns. Raises AdapterError on anything else.
    """
    found = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if not isinstance(found, nn.Module):
        kind = type(model)
        owner = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}'s "
        raise AdapterError(
            f"expected an mlx.nn.Module, or what mlxquant.load returns, found {owner}{kind.__name__}; pass the module"
            " that holds the layers, in MLX"
        )
    return found


def find_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` by path, in path order with numbers compared as numbers."""
    found = {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear)}
    return {path: found[path] for path in sorted(found, key=natural)}


def natural(path: str) -> list[tuple[int, int | str]]:
    """A key by which paths are in order, with numbers compared as numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in path.split(".")]


def starred(path: str) -> str:
    """A path with its numbers starred: one name for the same layer of all blocks."""
    return re.sub(r"\b\d+\b", "*", path)


def _step(parent: Any, part: str) -> Any:
    return parent[int(part)] if part.isdigit() else parent[part]


def get_module(root: nn.Module, path: str) -> Any:
    """The module at a dotted path; raises AdapterError where the path leaves the tree."""
    here: Any = root
    for part in path.split("."):
        try:
            here = _step(here, part)
        except (KeyError, IndexError, AttributeError) as error:
            raise AdapterError(f"no module {path!r}: {part!r} is not in {type(here).__name__}") from error
    return here


def set_module(root: nn.Module, path: str, new: nn.Module) -> Any:
    """Put ``new`` at ``path`` and return what was there."""
    *parents, last = path.split(".")
    parent = get_module(root, ".".join(parents)) if parents else root
    old = _step(parent, last)
    parent[int(last) if last.isdigit() else last] = new
    return old


@contextmanager
def swapped(root: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Run with other layers in place; the originals return afterwards, also after an exception."""
    before = {path: set_module(root, path, new) for path, new in layers.items()}
    try:
        yield
    finally:
        for path, old in before.items():
            set_module(root, path, old)


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Run with every module out of training mode; each returns to its own afterwards, also after an exception."""
    before = [(module, module.training) for _, module in root.named_modules()]  # parents come before what is in them
    root.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.train(mode)


class StandIn(nn.Module):
    """In the place of a layer, and asked about it (its weight, whether its attention slides) it answers for it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = layer

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError:
            if key.startswith("_"):
                raise
            return getattr(self._layer, key)


class Tap(StandIn):
    """Shows what a layer is called with to an observer and passes the call on."""

    def __init__(self, path: str, layer: nn.Module, observe: Callable[..., object]):
        super().__init__(layer)
        self._path, self._observe = path, observe

    def __call__(self, x: mx.array, *where: Any, **named: Any) -> mx.array:
        self._observe(self._path, x, *where, *named.values())
        answer: mx.array = self._layer(x, *where, **named)
        return answer


@contextmanager
def tapped(root: nn.Module, paths: Iterable[str], observe: Callable[..., object]) -> Iterator[None]:
    """Call ``observe(path, input)`` for each of these layers during the forward passes inside; with whatever else a
    layer is called with behind the input.
    """
    with swapped(root, {path: Tap(path, get_module(root, path), observe) for path in paths}):
        yield
