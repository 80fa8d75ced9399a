"""Tables of input levels, one entry a noise level: with what steps a layer's input is rounded at any time.

A diffusion model reads inputs whose ranges change with the noise level, so one step for all times would clip at one
and waste codes at another. A table has a step for each noise level that was calibrated, and ``at`` says what holds in
between: the range is the envelope of the neighbours, so that nothing is clipped that either would keep, and a table
made at 28 sampler steps serves any number of them. Where the entries come from a network over time (``time_network``),
the table keeps it, and between two levels it says what holds. The entries are static. While the model runs nothing is
measured; a layer only has to know the time (``reading``).

There are two kinds of entries. A uniform one maps ``x`` to signed codes ``clip(round((x - shift) / step), -2^(bits-1),
2^(bits-1) - 1)``. The step is one number for the tensor, because a step per input channel could not leave an integer
matmul; the shift may differ by channel, because it folds into the bias. A logarithmic one has its levels at ``shift +
step u``: its shift is the least value there is, its step how far the largest is from it, and u is 1 or one of the next
``2^bits - 1`` smaller floating-point numbers of ``bits - 4`` mantissa bits: 2^-q at 4 bits, and 16 octaves at any
width. Its products are no integers, so whoever multiplies them has to simulate it. At 16 bits the input is not
quantized at that noise level.

A table refuses steps that are not positive and finite, noise levels that do not ascend, and bits that no layer has; so
whoever holds one can divide by its steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import RecipeError
from ..numerics.arrays import Array
from .time_network import TimeNetwork

BITS = (4, 6, 8, 16)
MANTISSA, ONE, ROOT = 23, 0x3F800000, 0x3504F3  # of a float32: bits of the mantissa; 1.0; the mantissa of sqrt(2)


class Reading(NamedTuple):
    """Entries of a table for B noise levels: ``step`` [B], ``shift`` [B,1] or [B,in], ``bits`` [B], ``log`` [B]
    bool.
    """

    step: Array
    shift: Array
    bits: Array
    log: Array


@dataclass(frozen=True)
class ActivationTable:
    """The entries of one input, T of them.

    Attributes:
        sigma: [T] float32, the calibrated noise levels, ascending.
        step: [T] float32, positive.
        shift: [T,1] or [T,in] float32.
        bits: [T] integers of 4, 6, 8 or 16.
        log: [T] bool, which entries are logarithmic; one for all is spread, and by default none is.
        network: What says step and shift between the noise levels, if anything does; the entries have then the same
            bits, one shift each, and none is logarithmic.

    Raises:
        RecipeError: Lengths differ or are 0, noise levels do not ascend, steps or bits are none, or a network stands
            beside entries that it cannot have made.
    """

    sigma: Array
    step: Array
    shift: Array
    bits: Array
    log: Array = field(default_factory=lambda: np.zeros((), bool))
    network: TimeNetwork | None = None

    def __post_init__(self) -> None:
        length = len(self.sigma)
        log = np.asarray(self.log, bool)
        object.__setattr__(self, "log", log if log.ndim else np.full(length, log))
        if not (len(self.step) == len(self.shift) == len(self.bits) == len(self.log) == length > 0):
            raise RecipeError(
                f"activation table: lengths differ or are 0: sigma {length}, step {len(self.step)}, shift"
                f" {len(self.shift)}"
            )
        if np.any(np.diff(self.sigma) <= 0) or not np.all(np.isfinite(self.step)) or np.any(self.step <= 0):
            raise RecipeError("activation table: sigma must ascend and every step must be positive and finite")
        if np.ndim(self.shift) != 2 or not np.isfinite(self.shift).all() or not np.isfinite(self.sigma).all():
            raise RecipeError("activation table: shifts must be [T, 1 or in], and they and sigma finite")
        if unknown := set(np.unique(self.bits).tolist()) - set(BITS):
            raise RecipeError(f"activation table: bits must be of {BITS}, found {sorted(unknown)}")
        if self.network is not None and (self.shift.shape[1] > 1 or self.log.any() or len(np.unique(self.bits)) > 1):
            raise RecipeError(
                "activation table: a network over time gives uniform entries of the same bits with one shift each"
            )

    @classmethod
    def of_network(cls, network: TimeNetwork, sigma: Array, bits: int) -> ActivationTable:
        """The table of a network: its entries at noise levels [T], ascending, and between them what it says."""
        step, shift = network.entries(sigma)
        return cls(sigma.astype(np.float32), step, shift, np.full(len(sigma), bits, np.uint8), network=network)

    @property
    def span(self) -> Array:
        """From the smallest level to the largest, float64 [T]."""
        return self.step * np.where(self.log, 1, 2.0**self.bits - 1)

    def at(self, sigma: Array) -> Reading:
        """The entries that hold at some noise levels.

        At a calibrated level that is its own, bit for bit. Between two of them it is what the network says, where there
        is one; else the range is the envelope of both, with the larger bit width, logarithmic where the nearer one is.
        Outside, the nearest entry holds.

        Args:
            sigma: [B], in any order.
        """
        position = np.interp(sigma, self.sigma, np.arange(len(self.sigma)))
        # A level that was rounded to float32 on its way here is still the calibrated one.
        position = np.where(np.abs(position - np.rint(position)) < 1e-4, np.rint(position), position)
        below, above = np.floor(position).astype(int), np.ceil(position).astype(int)
        bits, log = np.maximum(self.bits[below], self.bits[above]), self.log[np.rint(position).astype(int)]
        low, high = self._ends()
        low, high = np.minimum(low[below], low[above]), np.maximum(high[below], high[above])
        step = (high - low).max(1) / np.where(log, 1, 2.0**bits - 1)
        shift = np.where(log[:, None], low, (low + high + step[:, None]) / 2)
        if self.network is not None:
            step, shift = self.network.entries(sigma)
        exact = below == above  # the entry itself: recomputed from its ends it would differ in the last bit
        step = np.where(exact, self.step[below], step)
        shift = np.where(exact[:, None], self.shift[below], shift)
        return Reading(step.astype(np.float32), shift.astype(np.float32), bits, log)

    def _ends(self) -> tuple[Array, Array]:
        """The smallest and the largest value of each entry's levels, float64 [T,1] or [T,in]."""
        edge = 2.0 ** (self.bits.astype(np.float64) - 1)
        below, above = np.where(self.log, 0, edge * self.step), np.where(self.log, self.step, (edge - 1) * self.step)
        return self.shift - below[:, None], self.shift + above[:, None]


def mantissa_rounding(bits: Array) -> tuple[Array, Array, Array]:
    """How to round float32s to ``bits - 4`` mantissa bits: what is added to their bits and what of that is kept,
    uint32, and the least of the ``2^bits`` levels, float32; each in the shape of ``bits``.
    """
    width = bits.astype(np.uint32)
    dropped = MANTISSA + 4 - width
    half = np.where(width == 4, (1 << MANTISSA) - ROOT, 1 << (dropped - 1))
    least = ONE - (((1 << width) - 1) << dropped)
    return half.astype(np.uint32), ~((np.uint32(1) << dropped) - np.uint32(1)), least.astype(np.uint32).view(np.float32)


def nearest_levels(x: Array, bits: int) -> Array:
    """What a logarithmic entry makes of x, any shape, in units of its step and counted from its shift, float32.

    At 4 bits ``2^-q``, ``q = clip(round(-log2 x), 0, 15)``, TCAQ-DM's log2 quantizer (arXiv 2412.16700); at more bits
    the nearest level.
    """
    half, kept, least = mantissa_rounding(np.array(bits))
    clipped = np.clip(x.astype(np.float32), least, 1)
    return np.where(np.isnan(clipped), clipped, ((clipped.view(np.uint32) + half) & kept).view(np.float32))
