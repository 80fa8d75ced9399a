"""See calls of modules as they happen, in anybody's code, and answer them.

A stand-in in the module tree would do where code calls what it finds there. But code also asks modules for their class
(``isinstance(layer, ResBlock)``), and holds them in places of its own. So it is the class whose ``__call__`` is another
for a while, and asks about each call whether the module is one of those that are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Run = Callable[[], Any]
CALL = "__call__"
Answer = Callable[[str, tuple[Any, ...], dict[str, Any], Run], Any]


@contextmanager
def watched(modules: Mapping[str, nn.Module], answer: Answer) -> Iterator[None]:
    """Answer the calls of some modules inside.

    Args:
        modules: Which, by name.
        answer: Called as ``answer(name, args, kwargs, run)`` in the place of a call; ``run()`` makes the call itself.
            What it returns is what the caller gets.
    """
    names = {id(module): name for name, module in modules.items()}
    inside = set[int]()  # a module whose class calls that of its base is called once

    def watching(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = names.get(id(self))
            if name is None or id(self) in inside:
                return original(self, *args, **kwargs)
            inside.add(id(self))
            try:
                return answer(name, args, kwargs, lambda: original(self, *args, **kwargs))
            finally:
                inside.discard(id(self))

        return call

    classes = {type(module) for module in modules.values()}
    own = {kind: kind.__dict__.get(CALL) for kind in classes}
    originals = {kind: kind.__call__ for kind in classes}
    for kind, original in originals.items():
        setattr(kind, CALL, watching(original))
    try:
        yield
    finally:
        for kind, before in own.items():
            if before is None:
                delattr(kind, CALL)
            else:
                setattr(kind, CALL, before)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Without ``mx.compile`` inside, so that Python sees every call; afterwards as it was before."""
    was_on = _compiles()
    mx.disable_compile()
    try:
        yield
    finally:
        if was_on:
            mx.enable_compile()


def _compiles() -> bool:
    """Whether ``mx.compile`` is on, which MLX does not tell: a compiled function is traced once, another runs twice."""
    runs = list[int]()

    def probe(x: mx.array) -> mx.array:
        runs.append(1)
        return x + 1

    compiled = mx.compile(probe)
    for _ in range(2):
        compiled(mx.array(0.0))
    return len(runs) == 1
