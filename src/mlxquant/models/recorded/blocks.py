"""A module's own blocks: between what it is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.nn as nn

from ...errors import AdapterError
from .recording import Call
from .watching import uncompiled, watched


def find_blocks(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """A module's own blocks by path: what stands in the outermost lists of modules with layers inside.

    Args:
        module: The module.
        layers: Its layers, which are no blocks.
    """
    found: dict[str, nn.Module] = {}
    known = {id(layer) for layer in layers.values()}

    def is_layer(part: nn.Module) -> bool:
        return id(part) in known

    def holds_layers(part: Any) -> bool:
        return isinstance(part, nn.Module) and not is_layer(part) and any(is_layer(m) for m in part.modules())

    def walk(part: Any, path: str) -> None:
        if isinstance(part, list) and any(holds_layers(one) for one in part):
            for index, one in enumerate(part):
                if isinstance(one, nn.Module) and not is_layer(one):
                    found[f"{path}.{index}"] = one
                elif isinstance(one, (list, dict)):
                    walk(one, f"{path}.{index}")
            return
        items = (
            part.children().items()
            if isinstance(part, nn.Module)
            else part.items()
            if isinstance(part, dict)
            else enumerate(part)
            if isinstance(part, list)
            else ()
        )
        for key, value in items:
            if isinstance(value, (nn.Module, list, dict)) and not (isinstance(value, nn.Module) and is_layer(value)):
                walk(value, f"{path}.{key}" if path else str(key))

    walk(module, "")
    return found


def some_of(paths: Iterable[str]) -> str:
    """The first paths, for an error."""
    paths = list(paths)
    return ", ".join(paths[:8]) + (" …" if len(paths) > 8 else "")


def require_blocks(module: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """The modules at these paths; raises AdapterError where one is none, or stands inside of another."""
    if isinstance(paths, str):
        raise AdapterError(f"blocks: expected a list of paths, found the text {paths!r}; pass [{paths!r}]")
    paths, modules = list(paths), {path: part for path, part in reversed(module.named_modules()) if path}
    if unknown := [path for path in paths if path not in modules]:
        raise AdapterError(f"blocks: {type(module).__name__} has no module {unknown[0]!r}; it has {some_of(modules)}")
    if inner := [path for path in paths if any(path.startswith(f"{other}.") for other in paths)]:
        raise AdapterError(f"blocks: {inner[0]!r} stands inside of another block; name outer or inner ones")
    return {path: modules[path] for path in paths}


def require_called(module: nn.Module, blocks: Mapping[str, nn.Module], call: Call) -> None:
    """Raise AdapterError unless a call of the module runs all of these; nothing is computed."""
    called = set[str]()

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        called.add(path)
        return run()

    with uncompiled(), watched(blocks, note):
        call.again(module)
    if idle := [path for path in blocks if path not in called]:
        raise AdapterError(f"blocks: a call of {type(module).__name__} does not run {some_of(idle)}; leave that out")
