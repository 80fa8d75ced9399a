"""Static activation scales, one entry a noise level: how a quantized layer knows its step at any timestep.

An entry maps ``x`` to signed codes ``clip(round((x - shift) / step), -2^(bits-1), 2^(bits-1) - 1)``. The step is one number for the
tensor, because a step per input channel could not leave an integer matmul; the shift may differ by channel, because it folds into
the bias. 16 bits means that the input is not quantized at that noise level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .errors import AdapterError, RecipeError
from .schedule import Clock

Array = npt.NDArray[Any]
BITS = (4, 6, 8, 16)


@dataclass(frozen=True)
class ActivationTable:
    """``sigma`` [T] ascending float32, ``step`` [T] float32, ``shift`` [T,1] or [T,in] float32, ``bits`` [T] of 4, 6, 8 or 16."""

    sigma: Array
    step: Array
    shift: Array
    bits: Array

    def __post_init__(self) -> None:
        length = len(self.sigma)
        if not (len(self.step) == len(self.shift) == len(self.bits) == length > 0):
            raise RecipeError(f"activation table: lengths differ or are 0: sigma {length}, step {len(self.step)}, shift {len(self.shift)}")
        if np.any(np.diff(self.sigma) <= 0) or not np.all(np.isfinite(self.step)) or np.any(self.step <= 0):
            raise RecipeError("activation table: sigma must ascend and every step must be positive and finite")
        if unknown := set(np.unique(self.bits).tolist()) - set(BITS):
            raise RecipeError(f"activation table: bits must be of {BITS}, found {sorted(unknown)}")

    def at(self, sigma: Array) -> tuple[Array, Array, Array]:
        """Entries for noise levels [B]: step [B], shift [B,1] or [B,in], bits [B].

        Between two calibrated levels the range is the envelope of the neighbours, with the larger bit width of the two, so a table
        calibrated at 28 steps runs at any step count and clips nothing that either neighbour keeps. Outside the calibrated levels the
        nearest entry holds.
        """
        position = np.interp(sigma, self.sigma, np.arange(len(self.sigma)))
        position = np.where(np.abs(position - np.rint(position)) < 1e-4, np.rint(position), position)  # float32 noise in sigma
        below, above = np.floor(position).astype(int), np.ceil(position).astype(int)
        bits = np.maximum(self.bits[below], self.bits[above])
        edge = 2.0 ** (self.bits.astype(np.float64) - 1)
        low = self.shift - (edge * self.step)[:, None]
        high = self.shift + ((edge - 1) * self.step)[:, None]
        low, high = np.minimum(low[below], low[above]), np.maximum(high[below], high[above])
        step = (high - low).max(1) / (2.0**bits - 1)
        shift = (low + high + step[:, None]) / 2
        exact = below == above
        step = np.where(exact, self.step[below], step)
        shift = np.where(exact[:, None], self.shift[below], shift)
        return step.astype(np.float32), shift.astype(np.float32), bits


@dataclass(frozen=True)
class Entry:
    """One reading of a table, shaped to broadcast against an input [B,...,in]."""

    step: mx.array  # [1 or B, 1..., 1]
    shift: mx.array  # [1 or B, 1..., 1 or in]
    edge: mx.array  # 2^(bits-1): codes run from -edge to edge - 1
    limit: int  # the largest edge in the batch
    is_float: mx.array  # where the input stays as it is
    any_float: bool
    all_float: bool


class TableReader:
    """Looks a table up at the time that a clock shows, and remembers what it looked up."""

    def __init__(self, table: ActivationTable, clock: Clock):
        self.table = table
        self._clock = clock
        self._entries: dict[tuple[bytes, int], Entry] = {}

    def read(self, x: mx.array) -> Entry:
        """The entry for an input [B,...,in]; raises AdapterError when the clock is unset or shows another batch size."""
        sigma = self._clock.sigma
        if sigma.size not in (1, x.shape[0]):
            raise AdapterError(f"the clock holds {sigma.size} timesteps for a batch of {x.shape[0]}; expected 1, or one for each sample")
        key = (sigma.tobytes(), x.ndim)
        if key not in self._entries:
            if len(self._entries) >= 256:  # a run with random timesteps must not grow without bound
                self._entries.clear()
            self._entries[key] = self._look_up(sigma, x.ndim)
        return self._entries[key]

    def _look_up(self, sigma: Array, ndim: int) -> Entry:
        step, shift, bits = self.table.at(sigma)
        lead = (sigma.size, *(1,) * (ndim - 2))
        is_float = bits == 16
        edge = 2.0 ** (np.where(is_float, 8, bits) - 1)
        return Entry(
            step=mx.array(step.reshape(*lead, 1)),
            shift=mx.array(shift.reshape(*lead, shift.shape[1])),
            edge=mx.array(edge.astype(np.float32).reshape(*lead, 1)),
            limit=int(edge.max()),
            is_float=mx.array(is_float.reshape(*lead, 1)),
            any_float=bool(is_float.any()),
            all_float=bool(is_float.all()),
        )
