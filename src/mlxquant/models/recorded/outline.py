"""What a module would do, from a call that is never computed: which layers read how much, block by block, and what they
are for.

MLX computes an array when somebody asks for its values, and nobody does here. So weights that lie in a file stay there,
and a call costs what it costs to build its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ...layers.kinds import find_exact_layers, known_kind
from ...recipes.roles import EMBEDDING
from ..stages import is_at
from .blocks import find_blocks
from .roles import Roles
from .trees import arrays
from .watching import uncompiled, watched

WHOLE = "whole"  # the only stage of a module without blocks


@dataclass(frozen=True)
class Reading:
    """A layer in a call.

    Attributes:
        shape: Rows and width of its weight as a matrix, those of all parts.
        parts: Into how many the rows fall that are rounded apart.
        rows: How many rows of inputs it multiplies.
        stage: The block that it is in, or what stands around one.
        leader: The first layer that reads the same tensor: both have the same moments.
    """

    shape: tuple[int, int]
    parts: int
    rows: int
    stage: str
    leader: str

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.shape[0] * self.shape[1] // self.parts


@dataclass(frozen=True)
class Outline:
    """A call of a module.

    Attributes:
        module: The module.
        layers: Every layer that was reached, by path, in the order in which they run.
        roles: What those are for, by path.
        state: Numbers that enter a block, or leave it, where those are most: what is kept of a call between blocks.
        given: Bytes of what the module was called with, and of what it returned.
    """

    module: nn.Module
    layers: Mapping[str, Reading]
    roles: Mapping[str, str]
    state: int
    given: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of its layers; those of attention itself, of tokens with tokens, are left
        out.
        """
        return sum(one.operations for one in self.layers.values())


def outlined(module: nn.Module, args: Any, run: Callable[[], Any]) -> tuple[Any, Outline]:
    """Make a call without computing it.

    Which stage a layer outside of the blocks belongs to is told by when it is called. ``Chain`` tells it by where it
    matters, which needs values.

    Args:
        module: The module.
        args: The arguments of the call, for their arrays.
        run: Makes the call.

    Returns:
        What the call returned, without values, and its outline.
    """
    every = find_exact_layers(module)
    blocks = find_blocks(module, every)
    watch = _Watch(every, blocks)
    with uncompiled(), watched(blocks, watch.block), watched(every, watch.layer):
        returned = run()
    order = [path for path in blocks if path in watch.began]
    order.sort(key=watch.began.index)
    shapes = {path: tuple(one.shape) for path, one in watch.inputs.items()}
    roles = Roles(order, {path: cut for path, cut in watch.glue.items() if order}, shapes)
    found = {path: EMBEDDING if isinstance(every[path], nn.Embedding) else roles.of(path) for path in watch.readings}
    given = sum(one.nbytes for one in arrays((args, returned)).values())
    return returned, Outline(module, watch.readings, found, watch.state, given)


class _Watch:
    """What calls of layers and blocks show."""

    def __init__(self, layers: Mapping[str, nn.Module], blocks: Mapping[str, nn.Module]):
        self._layers, self._blocks = layers, blocks
        self._kinds = {path: known_kind(one) for path, one in layers.items()}  # a watched layer is of another class
        self.began, self.glue = list[str](), dict[str, int]()
        self.readings, self.inputs = dict[str, Reading](), dict[str, mx.array]()
        self.state = 0
        self._last: tuple[str, mx.array | None] = ("", None)

    def block(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        if path not in self.began:
            self.began.append(path)
        returned = run()
        self.state = max(self.state, _floats((args, kwargs)), _floats(returned))
        return returned

    def layer(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        returned = run()
        if path in self.readings or not args:
            return returned
        kind = self._kinds[path]
        inside = next((block for block in self._blocks if is_at(path, block)), None)
        if inside is None:
            self.glue[path] = len(self.began)
        stage = inside or (f"before block {len(self.began)}" if self._blocks else WHOLE)
        shape, parts = kind.shape(self._layers[path]), kind.parts(self._layers[path])
        leader = self._leader(path, args[0])
        rows = returned.size // max(1, shape[0] // parts)
        self.readings[path], self.inputs[path] = Reading(shape, parts, rows, stage, leader), args[0]
        return returned

    def _leader(self, path: str, read: mx.array) -> str:
        """The first of the layers that read a tensor one after the other, as ``Sharing`` finds it."""
        first, tensor = self._last
        if tensor is not read:
            self._last = (path, read)
            return path
        return first


def _floats(tree: Any) -> int:
    """Numbers in the arrays of floats in a tree."""
    return sum(one.size for one in arrays(tree).values() if mx.issubdtype(one.dtype, mx.floating))


@contextmanager
def unevaluated() -> Iterator[None]:
    """Inside, code that asks for values in passing, to show how far it is, gets none computed."""
    names = ("eval", "async_eval")
    before = {name: getattr(mx, name) for name in names}
    for name in names:
        setattr(mx, name, lambda *trees: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(mx, name, function)
