"""Forward passes of a model over its calibration batches, a stage at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..models.adapter import Adapter
from ..models.stages import Stage, State
from ..numerics.arrays import Array
from ..progress import Progress, silent


@dataclass(frozen=True)
class Passes:
    """Forward passes of one model over the calibration batches, a stage at a time: batch ``index`` runs at the noise
    level ``sigmas[index]``, and has ``sides`` rows of each sample, see ``CalibrationData``. Whoever has one of these
    needs no more than states to run a stage.
    """

    adapter: Adapter
    sigmas: Sequence[float]
    progress: Progress = silent
    sides: int = 1
    exact: bool = False  # of the full-precision stream, beside a model that is quantized already

    def __len__(self) -> int:
        return len(self.sigmas)

    def some(self, indices: Iterable[int]) -> Passes:
        """Over the batches at these places alone, counted anew."""
        return replace(self, sigmas=[self.sigmas[index] for index in indices])

    def indices(self, label: str) -> Iterable[int]:
        """The places of all batches, with a progress bar."""
        return self.progress(range(len(self)), label)

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """The model's clock shows the noise level of this batch inside."""
        with self.adapter.clock.at(self.sigmas[index]), self.adapter.exactly() if self.exact else nullcontext():
            yield

    def one(self, stage: Stage, index: int, state: State) -> State:
        """What the stage writes for one batch, evaluated."""
        with self.at(index):
            outputs = stage.run(state)
            mx.eval(outputs)
        return outputs

    def each(self, stage: Stage, states: Sequence[State]) -> Iterator[tuple[State, State]]:
        """What the stage read and what it wrote, a batch at a time."""
        for index in self.indices(stage.name):
            state = states[index]
            yield state, self.one(stage, index, state)

    def through(self, stage: Stage, states: Sequence[State]) -> list[State]:
        """What the stage writes for all batches."""
        return [outputs for _, outputs in self.each(stage, states)]


def channel_errors(output: mx.array, target: mx.array) -> Array:
    """Mean squared difference of each channel of [..., D], float64 [D]."""
    return np.array(mx.square(output.astype(mx.float32) - target).reshape(-1, target.shape[-1]).mean(0), np.float64)


def energy(x: mx.array) -> float:
    """Sum of squares."""
    return float(np.array(mx.square(x.astype(mx.float32)).sum()))
