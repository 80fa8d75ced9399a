"""Watch one call of a module, and give names to the arrays that its blocks are given and return; see ``chain``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .recording import Call
from .trees import Leaf, Path, arrays, held_arrays, leaves, mapped
from .watching import uncompiled, watched

Values = dict[int, mx.array]


class BrokenChainError(Exception):
    """Why a module cannot be run block by block, in words."""


@dataclass(frozen=True)
class Slot(Leaf):
    """Stands for an array in a tree: a variable by its number, or what the module was called with at a path."""

    variable: int | None = None
    given: Path = ()


@dataclass(frozen=True)
class Step:
    """One block's call. ``reads`` are the variables that it is given, ``introduced`` those of them that the glue makes
    right before it, by their path in (args, kwargs), ``writes`` those that it returns first.
    """

    path: str
    reads: frozenset[int]
    introduced: dict[Path, int]
    writes: dict[Path, int]


@dataclass(frozen=True)
class Skeleton:
    """The trees of one call: (args, kwargs) and the result of each block, with slots for arrays; ``shapes`` and dtypes
    of the variables, for those that are not needed any more.
    """

    given: list[Any]
    wrote: list[Any]
    result: Any
    shapes: dict[int, tuple[tuple[int, ...], mx.Dtype]]


@dataclass(frozen=True)
class WatchedCall:
    """What a call showed.

    Attributes:
        steps: The blocks that it ran, in their order.
        result: What the glue makes after the last block, by its path in the module's result.
        result_reads: All variables of the result.
        skeleton: The trees of the call.
        values: The variables, evaluated only where it was needed.
        written_into: By sighting of a known array, whether somebody had written into it.
    """

    steps: list[Step]
    result: dict[Path, int]
    result_reads: frozenset[int]
    skeleton: Skeleton
    values: Values
    written_into: list[bool]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What calls have in common that run in the same way: blocks, and which variables go where, whatever their
        shapes.
        """
        trees = (*self.skeleton.given, *self.skeleton.wrote, self.skeleton.result)
        places = [[(path, leaf) for path, leaf in leaves(tree) if isinstance(leaf, Slot)] for tree in trees]
        return [step.path for step in self.steps], places


def watch(
    module: nn.Module, blocks: Mapping[str, nn.Module], call: Call, written_into: list[bool] | None = None
) -> WatchedCall:
    """Run a call, and give names to what blocks are given and return.

    Args:
        module: What was called.
        blocks: Its blocks, by path.
        call: One recorded call.
        written_into: What another call that ran in the same way has shown; nothing is evaluated then. None finds out
            which arrays somebody wrote into between two blocks: ``x += y`` leaves the object the same.

    Raises:
        BrokenChainError: A block is called twice, or inside of another, or is given what arrays hide in.
    """
    known: dict[int, Slot] = {}
    steps = list[Step]()
    objects: dict[int, tuple[mx.array, mx.array]] = {}  # kept alive, and as they were when they were named
    values, shapes = Values(), dict[int, tuple[tuple[int, ...], mx.Dtype]]()
    given_trees, wrote_trees = list[Any](), list[Any]()
    inside, sightings = list[str](), list[bool]()
    args, kwargs = call.given()
    for path, value in arrays((args, kwargs)).items():
        known[id(value)], objects[id(value)] = Slot(given=path), (value, copy.copy(value))

    def unchanged(value: mx.array) -> bool:
        before = objects[id(value)][1]
        if written_into is None:
            same = before.shape == value.shape and bool(mx.array_equal(before, value, equal_nan=True).item())
        else:
            same = len(sightings) < len(written_into) and not written_into[len(sightings)]
        sightings.append(not same)
        return same

    def slots(tree: Any, new: dict[Path, int], read: set[int]) -> Any:
        def slot(path: Path, leaf: Any) -> Any:
            if not isinstance(leaf, mx.array):
                if held := [one for one in held_arrays(leaf) if isinstance(one, mx.array)]:
                    raise BrokenChainError(f"arrays ({len(held)}) are handed on inside of a {type(leaf).__name__}")
                return leaf
            if (at := known.get(id(leaf))) is not None and unchanged(leaf):
                if at.variable is not None:
                    read.add(at.variable)
                return at
            number = len(values)
            values[number] = copy.copy(leaf)
            known[id(leaf)], objects[id(leaf)] = Slot(number), (leaf, values[number])
            shapes[number] = (tuple(leaf.shape), leaf.dtype)
            new[path] = number
            read.add(number)
            return known[id(leaf)]

        return mapped(tree, slot)

    def answer(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        if inside:
            raise BrokenChainError(f"block {path} is called inside of block {inside[-1]}")
        if any(step.path == path for step in steps):
            raise BrokenChainError(f"block {path} is called more than once")
        introduced, reads, writes = dict[Path, int](), set[int](), dict[Path, int]()
        given_trees.append(slots((args, kwargs), introduced, reads))
        inside.append(path)
        result = run()
        inside.pop()
        wrote_trees.append(slots(result, writes, set()))
        steps.append(Step(path, frozenset(reads), introduced, writes))
        return result

    with uncompiled(), watched(blocks, answer):
        result = module(*args, **kwargs)
    new, result_reads = dict[Path, int](), set[int]()
    tree = slots(result, new, result_reads)
    if not steps:
        raise BrokenChainError("none of its blocks is called")
    skeleton = Skeleton(given_trees, wrote_trees, tree, shapes)
    return WatchedCall(steps, new, frozenset(result_reads), skeleton, values, written_into or sightings)


def variables(tree: Any) -> set[int]:
    """Those that stand in a tree."""
    slots = [leaf for _, leaf in leaves(tree) if isinstance(leaf, Slot)]
    return {slot.variable for slot in slots if slot.variable is not None}
