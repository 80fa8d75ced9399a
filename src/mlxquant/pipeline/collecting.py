"""Observers of the explicit pipeline: at one timestep, in little memory, extremes, the moving centre of TaQ-DiT's
shift, and a few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import NumericsError
from ..numerics.arrays import Array
from ..numerics.input_ranges import RunningRanges
from ..sweep.collecting import Sharing


class MovingCentre:
    """The centre of each channel as TaQ-DiT's shift follows it: ``s <- m s + (1 - m) (min + max) / 2``.

    TaQ-DiT (arXiv 2411.14172) takes such a step once a batch of 32 and starts at the first; with m = 0.95 and the
    handful of samples that calibration affords, it also ends there. Here every row is a step, and s starts at 0 and is
    divided by ``1 - m^k`` after k of them (as in Adam, arXiv 1412.6980, section 3): a weighted mean with nearly equal
    weights for few rows, the same moving average for many.
    """

    def __init__(self, width: int, momentum: float):
        self._sum, self._weight, self._momentum = np.zeros(width, np.float64), 0.0, momentum

    def add(self, low: Array, high: Array) -> None:
        """Minima and maxima [B,in] of rows, in order."""
        for centre in (low.astype(np.float64) + high) / 2:
            self._sum = self._momentum * self._sum + (1 - self._momentum) * centre
            self._weight = self._momentum * self._weight + (1 - self._momentum)

    @property
    def value(self) -> Array:
        """[in] float32."""
        return (self._sum / self._weight).astype(np.float32)


@dataclass(frozen=True)
class Picks:
    """Which input rows to keep of a run of samples: row r is sample ``sample[r]`` (ascending), ``place[r]`` in [0,1)
    into its tokens.
    """

    sample: Array
    place: Array

    @classmethod
    def draw(cls, rows: int, samples: int, seed: Sequence[int]) -> Picks:
        """Each sample gives as many rows as any other, to within one, and each of ``rows`` stretches of the tokens
        gives one.
        """
        rng = np.random.default_rng(seed)
        return cls(np.arange(rows) * samples // rows, (rng.permutation(rows) + rng.random(rows)) / rows)

    def among(self, first: int, samples: int, tokens: int) -> tuple[mx.array, mx.array]:
        """Indices of the rows that are in a batch of ``samples`` with ``tokens`` each, of which the first is sample
        ``first``.
        """
        here = (self.sample >= first) & (self.sample < first + samples)
        token = np.minimum((self.place[here] * tokens).astype(np.int32), tokens - 1)
        return mx.array((self.sample[here] - first).astype(np.int32)), mx.array(token)


class StepInputs:
    """One layer's inputs at one timestep."""

    def __init__(self, width: int, momentum: float, range_batch: int):
        self.ranges, self.centre = RunningRanges(width, range_batch), MovingCentre(width, momentum)


class StepCollector:
    """An observer for ``layers.tree.tapped`` at one timestep, in little memory: what it sees stays lazy until ``add``,
    which evaluates a whole forward pass at once and keeps minima, maxima and a few rows of it.
    """

    def __init__(self, picks: Picks, momentum: float, sides: int, range_batch: int):
        """Each picture has ``sides`` samples that follow each other, and ``range_batch`` pictures are a batch of
        averaged min-max.
        """
        self.layers: dict[str, StepInputs] = {}  # by leader
        self._picks, self._momentum, self._samples = picks, momentum, 0
        self._sides, self._range_batch = sides, range_batch
        self._sharing = Sharing()
        self._pending: dict[str, tuple[mx.array, ...]] = {}

    @property
    def leader(self) -> dict[str, str]:
        """Every layer that was reached, and the layer whose entry in ``layers`` is its own."""
        return self._sharing.leader

    def __call__(self, path: str, x: mx.array) -> None:
        """x [B,...,in], the samples that follow those added before."""
        if self._sharing.leads(path, x):
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            rows = x[self._picks.among(self._samples, x.shape[0], x.shape[1])]
            self._pending[path] = (x.min(1), x.max(1), rows, mx.isfinite(x).all())

    def before(self, state: dict[str, mx.array]) -> dict[str, mx.array]:
        """The same arrays, computed only after what was seen so far: inputs are then freed in time, not all kept to the
        end.
        """
        seen = [value for values in self._pending.values() for value in values]
        return dict(zip(state, mx.depends(list(state.values()), seen), strict=True)) if seen else state

    def add(self) -> None:
        """Count the forward pass that was seen; raises NumericsError, naming the layer, when an input is not finite."""
        mx.eval(self._pending)
        for path, (low, high, rows, finite) in self._pending.items():
            if not finite.item():
                raise NumericsError(f"the input of layer {path} holds NaN or infinite values")
            inputs = self.layers.setdefault(path, StepInputs(low.shape[1], self._momentum, self._range_batch))
            minima, maxima, kept = (np.array(value.astype(mx.float32)) for value in (low, high, rows))
            by_picture = (-1, self._sides, low.shape[1])
            inputs.ranges.add(minima.reshape(by_picture).min(1), maxima.reshape(by_picture).max(1), kept)
            inputs.centre.add(minima, maxima)
        self._samples += next(iter(self._pending.values()))[0].shape[0] if self._pending else 0
        self._pending = {}
