"""Which layers of a stage hang on which others, seen while it runs: what lets a sequential recipe round as much as
possible at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.tree import StandIn, get_module, swapped, tapped


class _Spoilt(StandIn):
    """A layer that writes NaN, which goes wherever its output goes."""

    def __call__(self, x: mx.array, *where: Any, **named: Any) -> mx.array:
        return mx.zeros_like(self._layer(x, *where, **named)) + mx.nan


def _watch(reached: dict[str, mx.array], path: str, x: mx.array, *where: Any) -> None:
    reached[path] = mx.isnan(x).any()


def levels(root: nn.Module, run: Callable[[], object], leaders: Mapping[str, str]) -> list[list[str]]:
    """Layers in groups: none hangs on another one of its group, or of a later one, and each group is as early as it can
    be.

    ``run`` runs the stage on some small input; ``leaders`` has the layers, in the order in which they run, with the
    first one that reads the same array. Where a layer's output goes is found by spoiling it: a forward pass for each
    array that layers read.
    """
    groups: dict[str, list[str]] = {}
    for path, leader in leaders.items():
        groups.setdefault(leader, []).append(path)
    depth = dict.fromkeys(groups, 0)
    for leader, paths in groups.items():
        reached: dict[str, mx.array] = {}

        with (
            swapped(root, {path: _Spoilt(get_module(root, path)) for path in paths}),
            tapped(root, groups, partial(_watch, reached)),
        ):
            run()
        mx.eval(reached)
        for later, spoilt in reached.items():
            if spoilt.item() and later != leader:
                depth[later] = max(depth[later], depth[leader] + 1)
    found: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for path, leader in leaders.items():
        found[depth[leader]].append(path)
    return found
