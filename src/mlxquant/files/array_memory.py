"""Remember what was computed from arrays, for as long as they are the very same arrays.

Whether an array is the same cannot be told from the object alone: ``a += 1`` and ``a[0] = 1`` put other contents into
the same object. So beside the result we keep a second handle on what the array holds. While the handle lives, MLX can
neither change that memory nor give it to another array, and one comparison of addresses tells whether the object still
holds it. The handle goes when the object goes, so an array that was replaced does not stay in memory; one that was
changed in place does until it is asked about again. What writes into the memory of an array behind MLX's back, through
a NumPy view, is not noticed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx
import numpy as np

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Known(Generic[Result]):
    array: weakref.ref[mx.array]
    contents: mx.array
    result: Result


class ArrayMemory(Generic[Result]):
    """A function of one array that is computed again only when the array is another or has changed."""

    def __init__(self, compute: Callable[[mx.array], Result]):
        self._compute = compute
        self._known: dict[int, _Known[Result]] = {}

    def __len__(self) -> int:
        """How many arrays are remembered."""
        return len(self._known)

    def __call__(self, array: mx.array) -> Result:
        known = self._known.get(id(array))
        if known is None or known.array() is not array or _place(known.contents) != _place(array):
            self._known.pop(id(array), None)
            known = self._known[id(array)] = _Known(self._until_gone(array), copy.copy(array), self._compute(array))
        return known.result

    def _until_gone(self, array: mx.array) -> weakref.ref[mx.array]:
        """A reference that does not keep ``array``, and that forgets it when it goes."""
        key, known = id(array), weakref.ref(self)

        def forget(gone: weakref.ref[mx.array]) -> None:
            if (
                (memory := known()) is not None
                and (entry := memory._known.get(key)) is not None
                and entry.array is gone
            ):
                del memory._known[key]

        return weakref.ref(array, forget)


def _place(array: mx.array) -> tuple[Any, ...]:
    """Where the contents of an array are in memory, and how they are read; it is evaluated."""
    interface = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).__array_interface__
    return interface["data"], interface["shape"], interface["strides"], array.dtype
