"""What range methods see of a layer's input: extremes and sampled rows of each channel at each noise level.

Averaged min-max is an average over calibration *batches*: each batch gives its minimum and its maximum, and their means
are the range. So how many samples make a batch is a setting of the method, not of the machine. With one sample a batch
it clips whatever reaches further than samples do on average; with all samples in one batch it is the plain minimum and
maximum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .arrays import Array

# Samples of a batch of averaged min-max. The public code with an ``AvgMinMaxObserver`` in a configuration, Outlier
# Suppression (arXiv 2209.13325, github.com/wimh966/outlier_suppression, exp/bert_ptq/minmax), shows it 256 samples in
# batches of 32; QDrop (arXiv 2203.05740) and TaQ-DiT (arXiv 2411.14172) have the same observer and batches of 32 in
# their reconstruction, and observe the first 256 samples in one forward pass.
RANGE_BATCH = 32
_BY_CHANNEL = ("low", "high", "least", "most", "rows")


@dataclass(frozen=True)
class InputRanges:
    """Ranges of a layer's input [.., in], one row a noise level (sigma ascending).

    ``low`` and ``high`` [T,in]: mean over batches of samples of each batch's minimum and maximum (averaged min-max, see
    ``RunningRanges``); ``least`` and ``most`` [T,in]: the extremes; ``rows`` [T,R,in]: sampled input rows, float32.
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

    def part(self, channels: slice) -> InputRanges:
        """Those of some channels."""
        return InputRanges(self.sigma, *(getattr(self, name)[..., channels] for name in _BY_CHANNEL))

    def with_part(self, channels: slice, other: InputRanges) -> InputRanges:
        """These, but for some channels those of ``other``, which has no others."""
        found = []
        for name in _BY_CHANNEL:
            values = getattr(self, name).copy()
            values[..., channels] = getattr(other, name)
            found.append(values)
        return InputRanges(self.sigma, *found)

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


class BatchAverage:
    """The mean over batches of each batch's minimum [in]; of a maximum it is that of the negative.

    Samples 0 to ``size - 1`` are the first batch, the next ``size`` the second and so on, in the order in which they
    are added, however many at a time. A last batch that is not full counts in proportion to its samples, so that one
    sample too many does not weigh as much as ``size`` others; observers that average over forward passes count it
    whole.
    """

    def __init__(self, width: int, size: int):
        self._size, self._samples, self._sum = size, 0, np.zeros(width, np.float64)
        self._open = np.full(width, np.inf, np.float64)  # the minimum of the batch that is not full yet

    def add(self, lowest: Array) -> None:
        """Each sample's minimum [B,in]."""
        while len(lowest):
            some, lowest = np.split(lowest, [self._size - self._samples % self._size])
            self._open = np.minimum(self._open, some.min(0))
            self._samples += len(some)
            if self._samples % self._size == 0:
                self._sum += self._size * self._open
                self._open = np.full_like(self._open, np.inf)

    @property
    def value(self) -> Array:
        """[in] float64."""
        left = self._samples % self._size
        return (self._sum + (left * self._open if left else 0.0)) / self._samples


class RunningRanges:
    """Ranges of a layer's input at one noise level, a few samples at a time; ``batch`` samples are a batch of averaged
    min-max.
    """

    def __init__(self, width: int, batch: int = RANGE_BATCH):
        self._low, self._negative_high = BatchAverage(width, batch), BatchAverage(width, batch)
        self.least, self.most = np.full(width, np.inf, np.float32), np.full(width, -np.inf, np.float32)
        self._rows = list[Array]()

    def add(self, low: Array, high: Array, rows: Array) -> None:
        """Each sample's minimum and maximum [B,in] over its tokens, and input rows [R,in] to keep. What a guided model
        reads of a picture, with its prompt and without, is one sample.
        """
        self._low.add(low)
        self._negative_high.add(-high)
        self.least, self.most = np.minimum(self.least, low.min(0)), np.maximum(self.most, high.max(0))
        self._rows.append(rows)

    @property
    def low(self) -> Array:
        return self._low.value.astype(np.float32)

    @property
    def high(self) -> Array:
        return (-self._negative_high.value).astype(np.float32)

    @property
    def rows(self) -> Array:
        return np.concatenate(self._rows)
