"""Hidden states on their way through a model, stage by stage: what the full-precision model writes, and how far another is from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .models.adapter import Adapter, Stage, State, written
from .progress import Progress, silent

Array = npt.NDArray[Any]


def run_stage(adapter: Adapter, stage: Stage, sigmas: list[float], states: list[State], progress: Progress = silent) -> list[State]:
    """One stage over all calibration batches."""
    outputs = []
    for sigma, state in progress(list(zip(sigmas, states, strict=True)), stage.name):
        with adapter.clock.at(sigma):
            outputs.append(stage.run(state))
            mx.eval(outputs[-1])
    return outputs


class Teacher(Protocol):
    """What the full-precision model writes at each stage, in order; perhaps not at all tokens."""

    def targets(self, stage: Stage) -> list[State]:
        """What the stage writes, one state a batch; asked once for every stage, in the chain's order."""
        ...

    def inputs(self) -> list[State]:
        """The full-precision states that enter the stage asked for last."""
        ...

    def pick(self, outputs: State) -> State:
        """Of what a quantized stage writes, what there are targets for."""
        ...


class ExactStream:
    """The teacher that runs the full-precision model beside the quantized one."""

    def __init__(self, adapter: Adapter, sigmas: list[float], states: list[State], progress: Progress = silent):
        self._adapter, self._sigmas, self._progress = adapter, sigmas, progress
        self._states, self._inputs = states, states

    def targets(self, stage: Stage) -> list[State]:
        self._inputs = self._states
        self._states = run_stage(self._adapter, stage, self._sigmas, self._inputs, self._progress)
        return [{key: o[key] for key in written(o, i)} for o, i in zip(self._states, self._inputs, strict=True)]

    def inputs(self) -> list[State]:
        return self._inputs

    def pick(self, outputs: State) -> State:
        return outputs


Weights = dict[str, Array]  # by written tensor, [batches, D]: what a unit of squared error in each channel costs


def stage_error(outputs: Sequence[State], targets: Sequence[State], weights: Weights | None = None) -> float:
    """How far a stage's outputs are from the targets, over all calibration batches.

    Without ``weights`` the relative squared error, averaged over the tensors of the targets; with them the squared error that this
    causes in the velocity, to first order: the weighted squared error averaged over tokens and samples and summed over channels.
    """
    errors = []
    for key in targets[0]:
        pairs = list(zip(outputs, targets, strict=True))
        if weights is not None:
            errors.append(float(np.mean([channel_errors(o[key], t[key]) @ w for (o, t), w in zip(pairs, weights[key], strict=True)])))
            continue
        difference = sum(energy(o[key] - t[key]) for o, t in pairs)
        total = sum(energy(t[key]) for t in targets)
        errors.append(difference / total if total > 0 else 0.0)
    return float(np.mean(errors) if weights is None else np.sum(errors))


def channel_errors(output: mx.array, target: mx.array) -> Array:
    """Mean squared difference of each channel of [..., D], float64 [D]."""
    return np.array(mx.square(output - target).reshape(-1, target.shape[-1]).mean(0), np.float64)


def energy(x: mx.array) -> float:
    """Sum of squares."""
    return float(np.array(mx.square(x).sum()))
