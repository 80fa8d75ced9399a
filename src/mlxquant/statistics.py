"""What a layer's inputs look like: second moments, ranges over time, and a few sampled rows. Bounded memory however long the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .errors import NumericsError
from .methods.moments import Moments

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class InputRanges:
    """Ranges of a layer's input [.., in], one row a noise level (sigma ascending).

    ``low`` and ``high`` [T,in]: mean over samples of each sample's minimum and maximum (averaged min-max, arXiv 2411.14172);
    ``least`` and ``most`` [T,in]: the extremes; ``rows`` [T,R,in]: sampled input rows, float32.
    """

    sigma: Array
    low: Array
    high: Array
    least: Array
    most: Array
    rows: Array

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


class _AtSigma:
    """Running ranges at one noise level."""

    def __init__(self, width: int):
        self.low, self.high = np.zeros(width, np.float64), np.zeros(width, np.float64)
        self.least, self.most = np.full(width, np.inf, np.float32), np.full(width, -np.inf, np.float32)
        self.samples, self.rows = 0, list[Array]()

    def add(self, x: Array, rows: int) -> None:
        low, high = x.min(1), x.max(1)
        self.low += low.sum(0)
        self.high += high.sum(0)
        self.least, self.most = np.minimum(self.least, low.min(0)), np.maximum(self.most, high.max(0))
        self.samples += x.shape[0]
        flat = x.reshape(-1, x.shape[-1])
        self.rows.append(flat[np.linspace(0, len(flat) - 1, min(rows, len(flat))).astype(int)])


class InputStatistics:
    """Accumulates one layer's inputs; call ``add`` for each forward pass."""

    def __init__(self, width: int, rows: int = 64, ranges: bool = True):
        self.moments = Moments.empty(width)
        self._rows, self._ranges = rows, ranges
        self._levels: dict[float, _AtSigma] = {}

    def add(self, x: mx.array, sigma: float) -> None:
        """x [B,...,in], all samples at one noise level; raises NumericsError when it is not finite."""
        values = np.array(x.astype(mx.float32)).reshape(x.shape[0], -1, x.shape[-1])
        self.moments.add(values.reshape(-1, values.shape[-1]))
        if self._ranges:
            level = self._levels.setdefault(float(np.float32(sigma)), _AtSigma(values.shape[-1]))
            level.add(values, self._rows)

    @property
    def ranges(self) -> InputRanges:
        """The ranges collected; raises NumericsError when there are none."""
        if not self._levels:
            raise NumericsError("no activation ranges were collected for this layer; the calibration never reached it")
        order = sorted(self._levels)
        at = [self._levels[s] for s in order]
        count = min(sum(len(r) for r in level.rows) for level in at)
        return InputRanges(
            np.array(order, np.float32),
            np.stack([level.low / level.samples for level in at]).astype(np.float32),
            np.stack([level.high / level.samples for level in at]).astype(np.float32),
            np.stack([level.least for level in at]),
            np.stack([level.most for level in at]),
            np.stack([np.concatenate(level.rows)[:count] for level in at]),
        )


class Collector:
    """An observer for ``rewrite.tapped``. Layers that are given the same array (q, k and v) share one set of statistics."""

    def __init__(self, ranges: bool = True):
        self.sigma = 0.0
        self._ranges = ranges
        self._by_path: dict[str, InputStatistics] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[str, mx.array] | None = None

    def __call__(self, path: str, x: mx.array) -> None:
        if path not in self._leader:
            shared = self._last is not None and self._last[1] is x
            self._leader[path] = self._last[0] if shared and self._last else path
            if not shared:
                self._by_path[path] = InputStatistics(x.shape[-1], ranges=self._ranges)
        if self._leader[path] == path:
            self._last = (path, x)
            self._by_path[path].add(x, self.sigma)

    def __getitem__(self, path: str) -> InputStatistics:
        """Raises NumericsError for a layer that no forward pass reached."""
        if path not in self._leader:
            raise NumericsError(f"layer {path} was never reached during calibration; exclude it with a rule '{path}=keep'")
        return self._by_path[self._leader[path]]
