"""States that are made when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from ..models.stages import State


class OnDemand(Sequence[State]):
    """States that are made anew by ``make(index)`` whenever they are asked for: whoever uses one decides how long it
    lives.
    """

    def __init__(self, make: Callable[[int], State], indices: range):
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> State: ...
    @overload
    def __getitem__(self, index: slice) -> OnDemand: ...
    def __getitem__(self, index: int | slice) -> State | OnDemand:
        found = self._indices[index]
        return OnDemand(self._make, found) if isinstance(found, range) else self._make(found)

    def some(self, indices: Sequence[int]) -> OnDemand:
        """Those at these places."""
        make, chosen = self._make, [self._indices[index] for index in indices]
        return OnDemand(lambda place: make(chosen[place]), range(len(chosen)))

    def clear(self) -> None:
        """Be empty from now on, and forget what the states are made from."""
        self._make, self._indices = lambda index: {}, range(0)
