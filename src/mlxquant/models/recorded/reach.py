"""Which layers of a module recorded calls reach, and why others are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from ...errors import AdapterError
from ...layers.kinds import find_exact_layers
from ...layers.tree import get_module
from .recording import Call, Recording
from .watching import uncompiled, watched


@dataclass(frozen=True)
class Reach:
    """What calls reach.

    Attributes:
        shapes: Of the first input of each layer that a call reaches, by path.
        first: The first call that reached it.
        left_out: Why other layers are not, by path.
    """

    shapes: dict[str, tuple[int, ...]]
    first: dict[str, int]
    left_out: dict[str, str]


def find_reach(module: nn.Module, layers: Mapping[str, nn.Module], seen: Recording) -> Reach:
    """See which layers recorded calls reach; nothing is computed.

    Args:
        module: What was called.
        layers: Its layers, by path; one at two places has two.
        seen: The recording.
    """
    places = dict[int, dict[tuple[int, str], str]]()
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        holder = get_module(module, parent) if parent else module
        places.setdefault(id(layer), {}).setdefault((id(holder), name), path)
    shared = {
        path: f"one layer at several places: {', '.join(found.values())}"
        for found in places.values()
        if len(found) > 1
        for path in found.values()
    }
    once = {path for found in places.values() if len(found) == 1 for path in found.values()}
    again = {path: "its parent stands at another place, too" for path in layers if path not in once}
    watch = {path: layer for path, layer in layers.items() if path in once}
    shapes, first = dict[str, tuple[int, ...]](), dict[str, int]()

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        if path not in shapes:
            shapes[path], first[path] = tuple(args[0].shape) if args else (), index
        return run()

    for index in range(len(seen)):
        with uncompiled(), watched(watch, note):
            seen[index].again(module)  # never evaluated
    unreached = {path: "no recorded call reached it" for path in watch if path not in shapes}
    return Reach(shapes, first, again | shared | unreached)


class _Reached(BaseException):
    """A layer was called; no error, so that no ``except Exception`` of a module stops it."""


def require_traced_anew(module: nn.Module, call: Call) -> None:
    """Refuse a module that goes by what ``mx.compile`` kept of an earlier call: it would go on with the weights of
    then, whatever its layers are by now. A trace is broken off at the first layer, so none is kept.

    Args:
        module: The module.
        call: One of its calls.

    Raises:
        AdapterError: The call runs no layer, though it does where nothing is compiled.
    """

    def stop(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        raise _Reached

    def runs_layers() -> bool:
        with watched(layers, stop):
            try:
                call.again(module)
            except _Reached:
                return True
        return False

    layers = find_exact_layers(module)
    if runs_layers():
        return
    with uncompiled():
        if runs_layers():
            raise AdapterError(
                f"{type(module).__name__} holds functions that mx.compile has traced already, with the weights of then:"
                " quantized, it would go on with those; drop them (build it anew), and record it before it is called"
            )
