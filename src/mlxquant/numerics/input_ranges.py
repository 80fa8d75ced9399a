"""What range methods see of a layer's input: extremes and sampled rows of each channel at each noise level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .arrays import Array


@dataclass(frozen=True)
class InputRanges:
    """Ranges of a layer's input [.., in], one row a noise level (sigma ascending).

    ``low`` and ``high`` [T,in]: mean over samples of each sample's minimum and maximum (averaged min-max, arXiv
    2411.14172); ``least`` and ``most`` [T,in]: the extremes; ``rows`` [T,R,in]: sampled input rows, float32.
    """

    sigma: Array
    low: Array
    high: Array
    least: Array
    most: Array
    rows: Array

    @classmethod
    def of(cls, levels: Mapping[float, RunningRanges]) -> InputRanges:
        """What was collected at each noise level; as many rows of each as the poorest has."""
        order = sorted(levels)
        at = [levels[sigma] for sigma in order]
        count = min(len(level.rows) for level in at)
        return cls(
            np.array(order, np.float32),
            np.stack([level.low for level in at]),
            np.stack([level.high for level in at]),
            np.stack([level.least for level in at]),
            np.stack([level.most for level in at]),
            np.stack([level.rows[:count] for level in at]),
        )

    def merged(self) -> InputRanges:
        """One row for all noise levels: means of the means, extremes of the extremes, all sampled rows."""
        return InputRanges(
            self.sigma[-1:],
            self.low.mean(0, keepdims=True),
            self.high.mean(0, keepdims=True),
            self.least.min(0, keepdims=True),
            self.most.max(0, keepdims=True),
            self.rows.reshape(1, -1, self.rows.shape[-1]),
        )


class RunningRanges:
    """Ranges of a layer's input at one noise level, a few samples at a time."""

    def __init__(self, width: int):
        self._low, self._high = np.zeros(width, np.float64), np.zeros(width, np.float64)
        self.least, self.most = np.full(width, np.inf, np.float32), np.full(width, -np.inf, np.float32)
        self._samples, self._rows = 0, list[Array]()

    def add(self, low: Array, high: Array, rows: Array) -> None:
        """Each sample's minimum and maximum [B,in] over its tokens, and input rows [R,in] to keep."""
        self._low += low.sum(0)
        self._high += high.sum(0)
        self.least, self.most = np.minimum(self.least, low.min(0)), np.maximum(self.most, high.max(0))
        self._samples += len(low)
        self._rows.append(rows)

    @property
    def low(self) -> Array:
        return (self._low / self._samples).astype(np.float32)

    @property
    def high(self) -> Array:
        return (self._high / self._samples).astype(np.float32)

    @property
    def rows(self) -> Array:
        return np.concatenate(self._rows)
