"""Static activation scales, one entry a noise level: how a quantized layer knows its step at any timestep.

A uniform entry maps ``x`` to signed codes ``clip(round((x - shift) / step), -2^(bits-1), 2^(bits-1) - 1)``. The step is one number for
the tensor, because a step per input channel could not leave an integer matmul; the shift may differ by channel, because it folds into
the bias. A logarithmic entry has its levels at ``shift + step u``: its shift is the least value there is, its step how far the largest
is from it, and u is 1 or one of the next ``2^bits - 1`` smaller floating-point numbers of ``bits - 4`` mantissa bits: 2^-q at 4 bits, and
16 octaves at any width. Its products are no integers, so whoever multiplies them has to simulate it. 16 bits means that the input is not
quantized at that noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from ..errors import AdapterError, RecipeError
from ..numerics.arrays import Array
from .time import Clock

BITS = (4, 6, 8, 16)
MANTISSA, ONE, ROOT = 23, 0x3F800000, 0x3504F3  # of a float32: bits of the mantissa; 1.0; the mantissa of sqrt(2)


class Reading(NamedTuple):
    """Entries of a table for B noise levels: ``step`` [B], ``shift`` [B,1] or [B,in], ``bits`` [B], ``log`` [B] bool."""

    step: Array
    shift: Array
    bits: Array
    log: Array


@dataclass(frozen=True)
class ActivationTable:
    """``sigma`` [T] ascending float32, ``step`` [T] float32, ``shift`` [T,1] or [T,in] float32, ``bits`` [T] of 4, 6, 8 or 16, ``log`` [T]
    bool, which entries are logarithmic (by default none).
    """

    sigma: Array
    step: Array
    shift: Array
    bits: Array
    log: Array = field(default_factory=lambda: np.zeros((), bool))

    def __post_init__(self) -> None:
        length = len(self.sigma)
        log = np.asarray(self.log, bool)
        object.__setattr__(self, "log", log if log.ndim else np.full(length, log))
        if not (len(self.step) == len(self.shift) == len(self.bits) == len(self.log) == length > 0):
            raise RecipeError(f"activation table: lengths differ or are 0: sigma {length}, step {len(self.step)}, shift {len(self.shift)}")
        if np.any(np.diff(self.sigma) <= 0) or not np.all(np.isfinite(self.step)) or np.any(self.step <= 0):
            raise RecipeError("activation table: sigma must ascend and every step must be positive and finite")
        if unknown := set(np.unique(self.bits).tolist()) - set(BITS):
            raise RecipeError(f"activation table: bits must be of {BITS}, found {sorted(unknown)}")

    @property
    def span(self) -> Array:
        """From the smallest level to the largest, float64 [T]."""
        return self.step * np.where(self.log, 1, 2.0**self.bits - 1)

    def at(self, sigma: Array) -> Reading:
        """Entries for noise levels [B].

        Between two calibrated levels the range is the envelope of the neighbours, with the larger bit width of the two, so a table
        calibrated at 28 steps runs at any step count and clips nothing that either neighbour keeps. It is logarithmic where the nearer
        neighbour is. Outside the calibrated levels the nearest entry holds.
        """
        position = np.interp(sigma, self.sigma, np.arange(len(self.sigma)))
        position = np.where(np.abs(position - np.rint(position)) < 1e-4, np.rint(position), position)  # float32 noise in sigma
        below, above = np.floor(position).astype(int), np.ceil(position).astype(int)
        bits, log = np.maximum(self.bits[below], self.bits[above]), self.log[np.rint(position).astype(int)]
        low, high = self._ends()
        low, high = np.minimum(low[below], low[above]), np.maximum(high[below], high[above])
        step = (high - low).max(1) / np.where(log, 1, 2.0**bits - 1)
        shift = np.where(log[:, None], low, (low + high + step[:, None]) / 2)
        exact = below == above
        step = np.where(exact, self.step[below], step)
        shift = np.where(exact[:, None], self.shift[below], shift)
        return Reading(step.astype(np.float32), shift.astype(np.float32), bits, log)

    def _ends(self) -> tuple[Array, Array]:
        """The smallest and the largest value of each entry's levels, float64 [T,1] or [T,in]."""
        edge = 2.0 ** (self.bits.astype(np.float64) - 1)
        below, above = np.where(self.log, 0, edge * self.step), np.where(self.log, self.step, (edge - 1) * self.step)
        return self.shift - below[:, None], self.shift + above[:, None]


def _rounding(bits: Array) -> tuple[Array, Array, Array]:
    """How to round float32s to ``bits - 4`` mantissa bits: what is added to their bits and what of that is kept, uint32, and the least
    of the ``2^bits`` levels, float32; each in the shape of ``bits``.
    """
    width = bits.astype(np.uint32)
    dropped = MANTISSA + 4 - width
    half = np.where(width == 4, (1 << MANTISSA) - ROOT, 1 << (dropped - 1))
    least = ONE - (((1 << width) - 1) << dropped)
    return half.astype(np.uint32), ~((np.uint32(1) << dropped) - np.uint32(1)), least.astype(np.uint32).view(np.float32)


def nearest_levels(x: Array, bits: int) -> Array:
    """What a logarithmic entry makes of x, any shape, in units of its step and counted from its shift, float32.

    At 4 bits ``2^-q``, ``q = clip(round(-log2 x), 0, 15)``, TCAQ-DM's log2 quantizer (arXiv 2412.16700); at more bits the nearest level.
    """
    half, kept, least = _rounding(np.array(bits))
    clipped = np.clip(x.astype(np.float32), least, 1)
    return np.where(np.isnan(clipped), clipped, ((clipped.view(np.uint32) + half) & kept).view(np.float32))


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
        arrays: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, mx.array)}
        return replace(self, **arrays)


@mx.compile
def _nearest_levels(x: mx.array, half: mx.array, kept: mx.array) -> mx.array:
    """``nearest_levels`` of values from the least level to 1."""
    return mx.where(mx.isnan(x), x, ((x.view(mx.uint32) + half) & kept).view(mx.float32))


def represented(x: mx.array, entry: Entry) -> mx.array:
    """x [B,...,in] as its entries represent it, float32. Gradients go straight through the rounding; clipped values have none."""
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


TABLE = {  # a layer's parameters, in the order of ActivationTable's fields
    "act_sigma": mx.float32,
    "act_step": mx.float32,
    "act_shift": mx.float32,
    "act_bits": mx.uint8,
    "act_log": mx.uint8,
}


class TokenReader:
    """Scales that follow the input: each token has its own step and shift, from its least channel to its greatest (as in SpinQuant, arXiv
    2405.16406, appendix). There is nothing to calibrate, and no noise level.
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
        """The entry for an input [B,...,in]; raises AdapterError when the clock is unset or shows another batch size."""
        sigma = self._clock.sigma
        if sigma.size not in (1, x.shape[0]):
            raise AdapterError(f"the clock holds {sigma.size} timesteps for a batch of {x.shape[0]}; expected 1, or one for each sample")
        key = (sigma.tobytes(), x.ndim)
        if key not in self._entries:
            if len(self._entries) >= 256:  # a run with random timesteps must not grow without bound
                self._entries.clear()
            self._entries[key] = Entry.of(self.table, sigma).shaped(x.ndim)
        return self._entries[key]
