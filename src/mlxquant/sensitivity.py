"""How much an error inside the model matters for what it predicts, at each noise level.

For a small error d at some place the prediction changes by J d. With random signs r, E[(J^T r)_i^2] is the i-th diagonal entry of
J^T J: how much a unit of squared error in channel i there adds to the squared error of the velocity. One backward pass a batch gives it
for all places (Hutchinson's estimator of the Gauss-Newton diagonal, as BRECQ weighs block errors, arXiv 2102.05426, with the
network's output in place of its loss). Errors of a sampler's steps add up with nearly the same sign, so a unit of velocity error costs
about the same at any noise level; what differs between levels is how the model amplifies what happens inside it.

Squared velocity error is averaged over the elements of a latent: velocities have about unit variance, so it is relative to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .errors import NumericsError
from .models.adapter import Adapter, Stage, State, written
from .progress import Progress, silent
from .rewrite import get_module, swapped

Array = npt.NDArray[Any]


@mx.custom_function
def _gauge(x: mx.array, dial: mx.array) -> Any:
    """x [B,...,D] unchanged; ``dial`` [B,D] gets as its gradient the squared gradient of x, summed over tokens."""
    return x


@_gauge.vjp
def _gauge_vjp(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    return cotangent, mx.square(cotangent).reshape(cotangent.shape[0], -1, cotangent.shape[-1]).sum(1)


class _Gauged(nn.Module):
    """A layer whose output is gauged."""

    def __init__(self, layer: nn.Module, path: str, dials: dict[str, mx.array]):
        super().__init__()
        self._layer, self._path, self._dials = layer, path, dials

    def __call__(self, x: mx.array) -> mx.array:
        return cast(mx.array, _gauge(self._layer(x), self._dials[self._path]))


@dataclass(frozen=True)
class Sensitivity:
    """What a unit of mean squared error over a picture's tokens costs in squared velocity error, by noise level ``sigma`` [T] ascending.

    Errors of different tokens and channels are taken as independent. ``stages`` by stage name and written tensor [T,D]; ``layers`` by
    path of a Linear, for each of its outputs [T,out].
    """

    sigma: Array
    stages: dict[str, dict[str, Array]]
    layers: dict[str, Array]

    def of_stage(self, name: str, sigmas: Iterable[float]) -> dict[str, Array] | None:
        """By written tensor [len(sigmas), D], at the measured levels nearest to ``sigmas``; None for a stage that was not measured."""
        if name not in self.stages:
            return None
        return {key: table[self._nearest(sigmas)] for key, table in self.stages[name].items()}

    def of_outputs(self, path: str, sigmas: Iterable[float]) -> Array | None:
        """Of a layer's outputs [len(sigmas), out], at the measured levels nearest to ``sigmas``; None for one that was not measured."""
        return self.layers[path][self._nearest(sigmas)] if path in self.layers else None

    def _nearest(self, sigmas: Iterable[float]) -> list[int]:
        return [int(np.abs(self.sigma - sigma).argmin()) for sigma in sigmas]

    def of_layer(self, path: str, sigma: float) -> float:
        """Averaged over a layer's outputs, at the noise level nearest to ``sigma``, relative to the mean over levels; 1 if unknown."""
        if path not in self.layers:
            return 1.0
        costs = self.layers[path].mean(1)
        return float(costs[self._nearest([sigma])[0]] / costs.mean()) if costs.mean() > 0 else 1.0


def measure(
    adapter: Adapter,
    stages: Sequence[Stage],
    sigmas: list[float],
    states: list[State],
    layers: Iterable[str],
    seed: int = 0,
    progress: Progress = silent,
) -> Sensitivity:
    """Sensitivities of what ``stages`` write and of what Linears at the paths ``layers`` write.

    ``stages`` is the end of the model's chain and ``states`` [rows, ...] enter the first of them at ``sigmas``; rows at the same level
    are averaged. ``seed`` draws the random signs. Raises NumericsError, naming the place, when a sensitivity is not finite.
    """
    dials: dict[str, mx.array] = {}
    gauged = {path: _Gauged(get_module(adapter.module, path), path, dials) for path in layers}

    def probe(at: dict[str, mx.array], state: State, signs: mx.array) -> mx.array:
        dials.update(at)
        for stage in stages[:-1]:
            after = stage.run(state)
            state = after | {key: cast(mx.array, _gauge(after[key], at[f"{stage.name}/{key}"])) for key in written(after, state)}
        return (stages[-1].run(state)["velocity"] * signs).sum()

    widths = _widths(adapter, stages, sigmas[0], states[0]) | {path: layer._layer.weight.shape[0] for path, layer in gauged.items()}
    totals: dict[float, dict[str, Array]] = {}
    rows: dict[float, int] = {}
    slope = mx.grad(probe)
    with swapped(adapter.module, dict(gauged)):
        for index, (sigma, state) in enumerate(progress(list(zip(sigmas, states, strict=True)), "sensitivity")):
            count, elements = state["latent"].shape[0], state["latent"][0].size
            signs = mx.random.bernoulli(0.5, state["latent"].shape, mx.random.key(seed + index)).astype(mx.float32) * 2 - 1
            with adapter.clock.at(sigma):
                slopes = slope({name: mx.zeros((count, width)) for name, width in widths.items()}, state, signs)
                mx.eval(slopes)
            level = totals.setdefault(float(np.float32(sigma)), {name: np.zeros(width) for name, width in widths.items()})
            for name, value in slopes.items():
                level[name] += np.array(value, np.float64).sum(0) / elements
            rows[float(np.float32(sigma))] = rows.get(float(np.float32(sigma)), 0) + count
    order = sorted(totals)
    table = {name: np.stack([totals[s][name] / rows[s] for s in order]) for name in widths}
    for name, costs in table.items():
        if bad := [sigma for sigma, at in zip(order, costs, strict=True) if not np.isfinite(at).all()]:
            raise NumericsError(
                f"sigma {bad[0]:.4g}: the velocity's gradient with respect to {name} is NaN or infinite; the model overflows on this input"
            )
    names = {stage.name: [n for n in table if n.startswith(stage.name + "/")] for stage in stages}
    return Sensitivity(
        np.array(order, np.float32),
        {stage: {n.rsplit("/", 1)[1]: table[n] for n in found} for stage, found in names.items() if found},
        {path: table[path] for path in gauged},
    )


def _widths(adapter: Adapter, stages: Sequence[Stage], sigma: float, state: State) -> dict[str, int]:
    """Widths of what every stage but the last writes, by ``stage/tensor``."""
    widths: dict[str, int] = {}
    one = {key: value[:1] for key, value in state.items()}
    with adapter.clock.at(sigma):
        for stage in stages[:-1]:
            after = stage.run(one)
            widths |= {f"{stage.name}/{key}": after[key].shape[-1] for key in written(after, one)}
            one = after
    return widths
