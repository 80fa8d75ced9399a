"""Stages, the links of a model's chain, and the states that they pass on: what a stage wrote is told by the identity of
arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

State = dict[str, mx.array]


def written(outputs: State, inputs: State) -> list[str]:
    """What a stage wrote: the keys of its outputs whose array is not the very object that came in. Whole numbers and
    masks are none of it, for no error can be measured in them.
    """
    return [
        key
        for key, value in outputs.items()
        if inputs.get(key) is not value and mx.issubdtype(value.dtype, mx.floating)
    ]


def is_at(path: str, prefix: str) -> bool:
    """Whether a path is this one, or below it."""
    return path == prefix or path.startswith(prefix + ".")


def tensors(outputs: State, inputs: State) -> dict[str, list[str]]:
    """What a stage wrote, each tensor once: by the first of its keys all of them. A UNet's block hands one and the same
    array to the next block and, as a skip, to a later one; what came in and goes on under another key is not its own.
    """
    found: dict[str, list[str]] = {}
    first, came = dict[int, str](), {id(value) for value in inputs.values()}
    for key in written(outputs, inputs):
        if id(outputs[key]) not in came:
            found.setdefault(first.setdefault(id(outputs[key]), key), []).append(key)
    return found


@dataclass(frozen=True)
class Stage:
    """One link of the chain. Blocks, the links between the first and the last, pass on what they do not know.

    Attributes:
        name: Unique in the model; names files and rows of reports.
        prefixes: Paths in the module tree; it uses only modules at or below them.
        run: Maps the state that enters to the one that leaves, not evaluated.
    """

    name: str
    prefixes: tuple[str, ...]
    run: Callable[[State], State]

    def owns(self, path: str) -> bool:
        """Whether the module at ``path`` is one of this stage's."""
        return any(is_at(path, prefix) for prefix in self.prefixes)


Observe = Callable[[str, State, State], None]


class StageHook:
    """Shows the state before and after one stage to an observer and passes it on. It stands in for the stage's ``run``,
    outside of the module tree: not an ``nn.Module``, so parameters and paths are the same while it is there.
    """

    def __init__(self, name: str, run: Callable[[State], State], observe: Observe):
        self._name, self._run, self._observe = name, run, observe

    def __call__(self, state: State) -> State:
        outputs = self._run(state)
        self._observe(self._name, state, outputs)
        return outputs
