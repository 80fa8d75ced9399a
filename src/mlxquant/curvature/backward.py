"""A model's chain run forward and then backward, a stage at a time.

Each stage is computed again for its gradients (arXiv 1604.06174), so what is held is what enters the stages, and the
inside of one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import mlx.core as mx

from ..models.stages import Stage, State, tensors, written

Slopes = dict[str, mx.array]  # gradients of what a stage writes and passes on, by key of its state


def total(slopes: Mapping[str, mx.array], keys: Iterable[str]) -> mx.array:
    """The gradient of a tensor that is handed on under several keys."""
    return reduce(mx.add, [slopes[key] for key in keys])


class Backward:
    """Gradients of a chain. The clock must be set whenever it is used.

    Attributes:
        wrote: After ``forward``, for each stage the tensors that it wrote, by their first key all of them; nothing for
            the last stage, whose output is the prediction.
    """

    def __init__(self, stages: Sequence[Stage]):
        self._stages = stages
        self.wrote: list[dict[str, list[str]]] = []
        self._changed: list[list[str]] = []  # likewise, keys under which something else goes on than came in
        self._alike: list[dict[str, str]] = []  # likewise, by key of all that goes on the first key of the same array

    def on(self, stages: Sequence[Stage]) -> Backward:
        """What is known of this chain, for that of a copy of the model."""
        other = Backward(stages)
        other.wrote, other._changed, other._alike = self.wrote, self._changed, self._alike
        return other

    def predicted(self, state: State) -> State:
        """What the model predicts for what enters its chain, not evaluated."""
        before = state
        for stage in self._stages:
            before, state = state, stage.run(state)
        return {key: state[key] for key in written(state, before)}

    def forward(self, state: State) -> list[State]:
        """What enters each stage, evaluated."""
        entered = [state]
        self.wrote, self._changed, self._alike = [], [], []
        for stage in self._stages[:-1]:
            after = stage.run(entered[-1])
            mx.eval(after)
            self.wrote.append(tensors(after, entered[-1]))
            self._changed.append(written(after, entered[-1]))
            self._alike.append({key: first for first, keys in tensors(after, {}).items() for key in keys})
            entered.append(after)
        self.wrote.append({})
        return entered

    def backward(
        self, index: int, state: State, slopes: Slopes, dials: dict[str, mx.array], turned: Sequence[str] = ()
    ) -> tuple[Slopes, dict[str, mx.array]]:
        """From gradients of what a stage writes and passes on to gradients of what earlier stages wrote, and those of
        the ``turned`` dials. Not evaluated; ``forward`` must have run on a state of the same kind.

        Args:
            index: Of the stage.
            state: What enters it.
            slopes: The gradients, by key of what leaves it.
            dials: Arrays that whatever stands in the stage reads while it runs, by name.
            turned: Those to differentiate by.
        """
        stage = self._stages[index]
        if index < len(self._alike):  # of an array that is returned twice MLX takes one gradient for both
            first, given = self._alike[index], slopes
            slopes = {}
            for key, slope in given.items():
                slopes[first[key]] = slopes[first[key]] + slope if first[key] in slopes else slope
        keys = [key for key in state if any(key in earlier for earlier in self._changed[:index])]
        if not keys and not turned:
            return {}, {}

        def run(*arrays: mx.array) -> list[mx.array]:
            dials.update(zip(turned, arrays[len(keys) :], strict=True))
            after = stage.run(state | dict(zip(keys, arrays, strict=False)))
            return [after[key].astype(slope.dtype) for key, slope in slopes.items()]

        values = [dials[name] for name in turned]
        _, found = mx.vjp(run, [state[key] for key in keys] + values, list(slopes.values()))
        return dict(zip(keys, found, strict=False)), dict(zip(turned, found[len(keys) :], strict=True))
