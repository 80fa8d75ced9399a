"""How a running layer reads the levels of its input: from a table at the time that a clock shows, or from the tokens
themselves.

``represented`` is what is left of an input when its levels stand for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..errors import AdapterError
from ..numerics.arrays import Array
from .tables import ActivationTable, _rounding
from .time import Clock


@mx.custom_function
def round_through(x: mx.array) -> Any:
    """Round to nearest, with the gradient of the identity: MLX's own rounding has none."""
    return mx.round(x)


@round_through.vjp
def _round_through_vjp(primals: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return cotangent


@dataclass(frozen=True)
class Entry:
    """Entries of a table for a batch, shaped to broadcast against an input [B,...,in]."""

    step: mx.array  # [1 or B, 1..., 1]
    shift: mx.array  # [1 or B, 1..., 1 or in]
    edge: mx.array  # 2^(bits-1): uniform codes run from -edge to edge - 1
    is_float: mx.array  # where the input stays as it is
    log: mx.array  # where the levels are logarithmic
    half: mx.array  # how they are rounded then, see ``_rounding``
    kept: mx.array
    least: mx.array
    limit: int  # the largest edge in the batch
    any_float: bool
    all_float: bool
    any_log: bool

    @classmethod
    def of(cls, table: ActivationTable, sigma: Array) -> Entry:
        """The entries of noise levels [B], for inputs [B,in]."""
        step, shift, bits, log = table.at(sigma)
        is_float = bits == 16
        width = np.where(is_float, 8, bits)
        edge = 2.0 ** (width - 1)
        half, kept, least = _rounding(width)
        columns = {
            "step": step,
            "edge": edge.astype(np.float32),
            "is_float": is_float,
            "log": log,
            "half": half,
            "kept": kept,
            "least": least,
        }
        return cls(
            **{name: mx.array(values[:, None]) for name, values in columns.items()},
            shift=mx.array(shift),
            limit=int(edge.max()),
            any_float=bool(is_float.any()),
            all_float=bool(is_float.all()),
            any_log=bool((log & ~is_float).any()),
        )

    def rows(self, index: mx.array) -> Entry:
        """Those of some of the noise levels: index [B] counts them."""
        return self._with(lambda values: values[index])

    def shaped(self, ndim: int) -> Entry:
        """For inputs of this many dimensions."""
        return self._with(lambda values: values.reshape(values.shape[0], *(1,) * (ndim - 2), values.shape[-1]))

    def _with(self, change: Callable[[mx.array], mx.array]) -> Entry:
        arrays: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, mx.array)
        }
        return replace(self, **arrays)


@mx.compile
def _nearest_levels(x: mx.array, half: mx.array, kept: mx.array) -> mx.array:
    """``nearest_levels`` of values from the least level to 1."""
    return mx.where(mx.isnan(x), x, ((x.view(mx.uint32) + half) & kept).view(mx.float32))


def represented(x: mx.array, entry: Entry) -> mx.array:
    """x [B,...,in] as its entries represent it, float32. Gradients go straight through the rounding; clipped values
    have none.
    """
    x = x.astype(mx.float32)
    offset = (x - entry.shift) / entry.step
    levels = mx.clip(cast(mx.array, round_through(offset)), -entry.edge, entry.edge - 1)
    if entry.any_log:
        clipped = mx.clip(offset, entry.least, 1.0)
        rounded = clipped + mx.stop_gradient(
            _nearest_levels(clipped, entry.half, entry.kept) - clipped
        )  # exact: they are within a factor of 2
        levels = mx.where(entry.log, rounded, levels)
    levels = levels * entry.step + entry.shift
    return mx.where(entry.is_float, x, levels) if entry.any_float else levels


class TokenReader:
    """Scales that follow the input: each token has its own step and shift, from its least channel to its greatest (as
    in SpinQuant, arXiv 2405.16406, appendix). There is nothing to calibrate, and no noise level.
    """

    def __init__(self, bits: int):
        """Raises RecipeError on other bits than a table may have."""
        one = np.ones(1, np.float32)
        self.bits = bits
        self._entry = Entry.of(ActivationTable(one, one, one[:, None], np.array([bits], np.uint8)), one)

    @property
    def mean_bits(self) -> float:
        return float(self.bits)

    def read(self, x: mx.array) -> Entry:
        """The entry for an input [...,in]: its step and shift are [...,1]. A token of equal channels gets step 1."""
        x = x.astype(mx.float32)
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        step = mx.where(high > low, (high - low) / (2**self.bits - 1), 1.0)
        shift = mx.where(high > low, low + 2 ** (self.bits - 1) * step, low)
        return replace(self._entry.shaped(x.ndim), step=step, shift=shift)


class TableReader:
    """Looks a table up at the time that a clock shows, and remembers what it looked up."""

    def __init__(self, table: ActivationTable, clock: Clock):
        self.table = table
        self._clock = clock
        self._entries: dict[tuple[bytes, int], Entry] = {}

    @property
    def mean_bits(self) -> float:
        """Averaged over noise levels."""
        return float(np.mean(self.table.bits))

    def read(self, x: mx.array) -> Entry:
        """The entry for an input [B,...,in]; raises AdapterError when the clock is unset or shows another batch
        size.
        """
        sigma = self._clock.sigma
        if sigma.size not in (1, x.shape[0]):
            raise AdapterError(
                f"the clock holds {sigma.size} timesteps for a batch of {x.shape[0]}; expected 1, or one for each"
                " sample"
            )
        key = (sigma.tobytes(), x.ndim)
        if key not in self._entries:
            if len(self._entries) >= 256:  # a run with random timesteps must not grow without bound
                self._entries.clear()
            self._entries[key] = Entry.of(self.table, sigma).shaped(x.ndim)
        return self._entries[key]
