"""Hidden states on their way through a model, a stage at a time: what the full-precision model writes, and how far
another is from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..calibration.passes import Passes, channel_errors, energy
from ..models.stages import Stage, State, tensors
from ..numerics.arrays import Array


class Teacher(Protocol):
    """What the full-precision model writes at each stage, in order; perhaps not at all tokens."""

    def targets(self, stage: Stage) -> list[State]:
        """What the stage writes, one state a batch; asked once for every stage, in the chain's order."""
        ...

    def inputs(self) -> Sequence[State]:
        """The full-precision states that enter the stage asked for last."""
        ...

    def pick(self, outputs: State) -> State:
        """Of what a quantized stage writes, what there are targets for."""
        ...


class ExactStream:
    """The teacher that runs the full-precision model beside the quantized one. What entered a stage is kept for
    ``inputs`` only where ``both`` sides of it are wanted: it is one more copy of all hidden states.
    """

    def __init__(self, passes: Passes, states: Sequence[State], both: bool = True):
        self._passes, self._both = replace(passes, exact=True), both
        self._states, self._inputs = states, states

    def targets(self, stage: Stage) -> list[State]:
        inputs, outputs, targets = self._states, list[State](), list[State]()
        self._inputs = inputs if self._both else []
        for state, wrote in self._passes.each(stage, inputs):
            outputs.append(wrote)
            targets.append({key: wrote[key] for key in tensors(wrote, state)})
        self._states = outputs
        return targets

    def inputs(self) -> Sequence[State]:
        return self._inputs

    def pick(self, outputs: State) -> State:
        return outputs


ChannelCosts = dict[str, Array]  # by written tensor, [batches, D]: what a unit of squared error in each channel costs


class Deviation:
    """How far what a stage writes is from the targets, counted batch by batch so that no outputs have to be kept for
    it.
    """

    def __init__(self, costs: ChannelCosts | None = None, weights: Mapping[str, float] = MappingProxyType({})):
        """``weights`` say how much a tensor counts without costs, 1 where they do not say."""
        self._costs, self._weights, self._batches = costs, weights, 0
        self._noise, self._signal, self._size = dict[str, float](), dict[str, float](), dict[str, int]()

    def add(self, outputs: State, targets: State) -> None:
        """The next batch; its tensors are [rows,...,D]."""
        for key, target in targets.items():
            if self._costs is None:
                noise, signal, size = energy(outputs[key].astype(mx.float32) - target), energy(target), target.size
            else:
                cost = float(channel_errors(outputs[key], target) @ self._costs[key][self._batches])
                noise, signal, size = target.shape[0] * cost, 0.0, target.shape[0]
            self._noise[key] = self._noise.get(key, 0.0) + noise
            self._signal[key] = self._signal.get(key, 0.0) + signal
            self._size[key] = self._size.get(key, 0) + size
        self._batches += 1

    @property
    def by_tensor(self) -> dict[str, float]:
        """The mean squared error of each tensor of the targets; with costs what that causes in the velocity, as in
        ``error``.
        """
        return {key: noise / self._size[key] for key, noise in self._noise.items()}

    @property
    def error(self) -> float:
        """Without costs the relative squared error, averaged over the tensors by their weights; with them the squared
        error that this causes in the velocity, to first order: the weighted squared error averaged over tokens and
        samples and summed over channels and tensors. A stage that writes nothing which anybody reads makes none: the
        last block of an encoder, say, of which the hidden states before it are taken.
        """
        if not self._noise:
            return 0.0
        if self._costs is not None:
            return float(np.sum(list(self.by_tensor.values())))
        relative = [noise / self._signal[key] if self._signal[key] > 0 else 0.0 for key, noise in self._noise.items()]
        return float(np.average(relative, weights=[self._weights.get(key, 1.0) for key in self._noise]))


def stage_error(outputs: Sequence[State], targets: Sequence[State], costs: ChannelCosts | None = None) -> float:
    """``Deviation.error`` of a stage's outputs, over all calibration batches."""
    deviation = Deviation(costs)
    for output, target in zip(outputs, targets, strict=True):
        deviation.add(output, target)
    return deviation.error
