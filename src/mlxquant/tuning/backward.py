"""The gradient of a loss with respect to what layers anywhere in a model are trained by, stage by stage: what is in
memory is what enters the stages, and the inside of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx

from ..curvature.backward import Backward, Slopes
from ..layers.product import QuantizedProduct
from ..layers.tree import swapped
from ..models.adapter import Adapter
from ..models.stages import Stage, State, written
from ..numerics.arrays import Array
from .twin import Twin, start


@dataclass
class Trace:
    """A forward pass on its way back: what entered each stage, and what the model predicts."""

    sigma: float | Array
    entered: list[State]
    predicted: State


class Twins:
    """The twins of a model's layers; inside of ``installed`` they stand in their places.

    Args:
        adapter: The model.
        layers: Its quantized layers by path, each once.
        places: At which paths each stands.
    """

    def __init__(self, adapter: Adapter, layers: Mapping[str, QuantizedProduct], places: Mapping[str, list[str]]):
        self._clock, self._module = adapter.clock, adapter.module
        self.numbers: dict[str, mx.array] = {}  # all that is trained, by name; what runs reads them here
        self._stage, self._ran = 0, dict[int, dict[str, None]]()
        twins = {path: Twin(layer, path, self.numbers, self._note) for path, layer in layers.items()}
        for path, layer in layers.items():
            self.numbers |= {twins[path].name(what): value for what, value in start(layer).items()}
        self._twins = twins
        self._places = {place: twin for path, twin in twins.items() for place in places[path]}
        stages = [replace(stage, run=self._noting(index, stage)) for index, stage in enumerate(adapter.stages)]
        self._last, self._chain = stages[-1], Backward(stages)

    def _note(self, path: str) -> None:
        self._ran.setdefault(self._stage, {})[path] = None

    def _noting(self, index: int, stage: Stage) -> Callable[[State], State]:
        """A stage that notes which twins run in it: one may run in several, as a table of embeddings that is the output
        layer, too.
        """

        def run(state: State) -> State:
            self._stage = index
            return stage.run(state)

        return run

    @contextmanager
    def installed(self) -> Iterator[None]:
        """With the twins in the places of the layers; those return afterwards, also after an exception."""
        with swapped(self._module, dict(self._places)):
            yield

    def forward(self, state: State, sigma: float | Array) -> Trace:
        """Run the chain in float32, evaluated.

        Args:
            state: What enters the first stage.
            sigma: The noise level, or one for each sample.
        """
        self._ran.clear()
        with self._clock.at(sigma):
            entered = self._chain.forward({key: _float32(value) for key, value in state.items()})
            after = self._last.run(entered[-1])
            predicted = {key: after[key] for key in written(after, entered[-1])}
            mx.eval(predicted)
        return Trace(sigma, entered, predicted)

    def backward(self, trace: Trace, slopes: Slopes) -> Slopes:
        """The gradient of what has ``slopes`` with respect to what the model predicts, by name of the numbers; of what
        did not run there is none.

        Args:
            trace: One of the last ``forward``, or of one with a state of the same kind; it is used up.
            slopes: By key of the prediction.
        """
        found: Slopes = {}
        ran = {index: list(paths) for index, paths in self._ran.items()}
        with self._clock.at(trace.sigma):
            for index in reversed(range(len(trace.entered))):
                turned = [name for path in ran.get(index, ()) for name in self._twins[path].names]
                before = dict(self.numbers)
                try:
                    slopes, inside = self._chain.backward(index, trace.entered.pop(), slopes, self.numbers, turned)
                finally:
                    self.numbers.update(before)  # those that were traced are none any more
                for name, slope in inside.items():
                    found[name] = found[name] + slope if name in found else slope
                mx.eval(slopes, found)
        return found


def _float32(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
