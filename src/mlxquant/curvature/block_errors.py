"""How much an error inside of a block matters for what the block writes: sensitivities without a backward pass.

Where a model cannot be differentiated (a kernel without a gradient) or memory does not suffice for it, this is what is
left. Every layer's output is disturbed by random signs, a hundredth of its size, and what that changes in the block's
outputs, relative to them, is its cost. It takes a forward pass of the block for each layer. Two things are lost against
the gradient of the model's prediction: blocks count alike, whatever comes after them, and so do a layer's channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..calibration.passes import Passes, channel_errors, energy
from ..errors import NumericsError
from ..layers.tree import get_module, swapped
from ..models.stages import Stage, State, written
from ..numerics.arrays import Array

DISTURBANCE = 0.01  # of the root mean square of a layer's output


class _Disturbed(nn.Module):
    """A layer with noise on its output. ``variance`` is that of the noise, over all that was disturbed last."""

    def __init__(self, layer: nn.Module, key: mx.array):
        super().__init__()
        self._layer, self._key = layer, key
        self.width = 1
        self._variance = mx.array(0.0)

    @property
    def variance(self) -> float:
        return float(np.array(self._variance))

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        y = self._layer(x, *args, **kwargs)
        self._variance = DISTURBANCE**2 * mx.square(y.astype(mx.float32)).mean()
        signs = mx.random.bernoulli(0.5, y.shape, self._key).astype(mx.float32) * 2 - 1
        self.width = y.shape[-1]
        return (y.astype(mx.float32) + mx.sqrt(self._variance) * signs).astype(y.dtype)


def block_errors(
    passes: Passes, stages: Sequence[Stage], states: Sequence[State], layers: Iterable[str], seed: int = 0
) -> tuple[Array, dict[str, Array]]:
    """Costs relative to what each stage writes; arguments as for ``sensitivity.measure``.

    Returns:
        The noise levels [T] ascending, and tables by name, ``stage/tensor`` [T,D] and layers by path [T,out].

    Raises:
        NumericsError: A cost is not finite; it names the place.
    """
    adapter, layers = passes.adapter, list(layers)
    sigmas = [float(np.float32(sigma)) for sigma in passes.sigmas]
    order = sorted(set(sigmas))
    totals: dict[str, dict[float, list[Array]]] = {}

    def keep(name: str, sigma: float, costs: Array) -> None:
        totals.setdefault(name, {}).setdefault(sigma, []).append(costs)

    for stage in stages:
        left = list[State]()
        for index in passes.indices(f"{stage.name}: block errors"):
            state, sigma = states[index], sigmas[index]
            exact = passes.one(stage, index, state)
            wrote = {key: exact[key] for key in written(exact, state)}
            size = {key: energy(value) / (value.size // value.shape[-1]) for key, value in wrote.items()}
            if stage is not stages[-1]:
                for key, value in wrote.items():
                    cost = 1 / (size[key] * len(wrote)) if size[key] else 0.0
                    keep(f"{stage.name}/{key}", sigma, np.full(value.shape[-1], cost))
            for place, path in enumerate(path for path in layers if stage.owns(path)):
                disturbed = _Disturbed(get_module(adapter.module, path), mx.random.key(seed + 1009 * index + place))
                with swapped(adapter.module, {path: disturbed}):
                    outputs = passes.one(stage, index, state)
                errors = [
                    float(channel_errors(outputs[key], value).sum()) / size[key]
                    for key, value in wrote.items()
                    if size[key]
                ]
                cost = float(np.mean(errors)) / (disturbed.variance * disturbed.width) if disturbed.variance else 0.0
                if not np.isfinite(cost):
                    raise NumericsError(f"stage {stage.name}: it writes NaN when the output of {path} is disturbed")
                keep(path, sigma, np.full(disturbed.width, cost))
            left.append(exact)
        states = left
    weights = adapter.level_weights(order)[:, None]
    return np.array(order), {
        name: np.stack([np.mean(by[sigma], axis=0) for sigma in order]) * weights for name, by in totals.items()
    }
