"""Tuned on what a recorded module returns.

A sample is a recorded call. Its loss is the squared error of each array that the module returns, relative to the mean
square of that array over all calls, or one that the caller gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..models.recorded.adapter import RecordedAdapter
from ..models.stages import State
from ..progress import Progress, silent
from ..recipes.tuning import Tuning
from .objective import Pass, Sample, Targets, draw, split

Loss = Callable[[Mapping[str, mx.array], Mapping[str, mx.array]], mx.array]
SMALLEST = 1e-30  # of a mean square: an array of zeros is no reason to divide by one


class Calls:
    """The objective of a recorded module.

    Args:
        adapter: The module, with its recorded calls.
        tuning: Settings.
        own: Called with what the module returns now and in full precision, arrays by where they are in its result (""
            for a result that is one array); returns a scalar for the call. None for the squared error.
    """

    def __init__(self, adapter: RecordedAdapter, tuning: Tuning, own: Loss | None = None):
        self._adapter, self._tuning, self._own = adapter, tuning, own
        self._train, held = split(len(adapter.seen), tuning.held_out, "calls")
        self._held: list[Sample] = list(held)
        self._wanted: dict[Sample, State] = {}
        self._scale: dict[str, float] = {}

    @property
    def held_out(self) -> Sequence[Sample]:
        return self._held

    @property
    def facts(self) -> dict[str, Any]:
        return {"calls": len(self._train), "held_out_calls": len(self._held)}

    def minibatch(self, iteration: int) -> list[Sample]:
        """Calls at random."""
        return list(draw(self._tuning.seed, iteration, self._train, self._tuning.batch))

    def groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        return [[sample] for sample in samples]

    def passes(self, group: Sequence[Sample]) -> list[Pass]:
        (call,) = cast(Sequence[int], group)
        return [(self._adapter.state(call), self._adapter.sigmas[call])]

    def targets(self, samples: Sequence[Sample], progress: Progress = silent) -> Targets:
        """What the module returns, float32, as ``NUMBER/result...``; it has to be in full precision still."""
        found: Targets = {}
        for sample in progress(samples, "results to tune for"):
            ((state, sigma),) = self.passes([sample])
            made = _floating(self._adapter.run(state, sigma))
            mx.eval(made)
            found |= {f"{sample}/{key}": value for key, value in made.items()}
        return found

    def know(self, samples: Sequence[Sample], targets: Targets) -> None:
        self._wanted = {sample: {} for sample in samples}
        by_name = {str(sample): sample for sample in samples}
        squares: dict[str, list[float]] = {}
        for name, value in targets.items():
            call, _, key = name.partition("/")
            self._wanted[by_name[call]][key] = value
            squares.setdefault(key, []).append(float(np.array(mx.square(value).mean())))
        self._scale = {key: max(sum(own) / len(own), SMALLEST) for key, own in squares.items()}

    def loss(self, group: Sequence[Sample], predicted: list[State]) -> mx.array:
        made, wanted = _floating(predicted[0]), self._wanted[group[0]]
        if self._own is not None:
            return self._own(*({_place(key): value for key, value in one.items()} for one in (made, wanted)))
        total = mx.array(0.0)
        for key, value in wanted.items():
            total = total + mx.square(made[key] - value).mean() / self._scale[key]
        return total


def _floating(state: State) -> State:
    """What errors can be measured in, float32."""
    return {
        key: value.astype(mx.float32)
        for key, value in state.items()
        if mx.issubdtype(value.dtype, mx.floating) and value.size
    }


def _place(key: str) -> str:
    """Where an array is in a result: what follows "result." in its key."""
    return key.partition(".")[2]
