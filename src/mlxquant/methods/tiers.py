"""Tiers: with how many bits a layer's input is quantized at each timestep.

A rule sees the ranges of the input, the layer's weight [out,in] and the layer's activation table at every tier, and returns one bit
width a timestep. ``mixed`` then puts the table together. Errors are of the layer's output on the sampled rows, because an error of
the input counts only as far as the weight lets it through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..activations import ActivationTable
from ..statistics import InputRanges
from .registry import register

Array = npt.NDArray[Any]
TIERS = (4, 6, 8)
Tables = Mapping[int, ActivationTable]
TINY = float(np.finfo(np.float32).tiny)


@register("tier", "threshold", summary="A4, A6 or A8 by the magnitude of the range")
def threshold(ranges: InputRanges, weight: Array, tables: Tables, a4: float = 6.0, a6: float = 10.0, outlier_ratio: float = 50.0) -> Array:
    """4 bits where the largest averaged |range| of any channel is below ``a4``, 6 below ``a6``, else 8: uint8 [T].

    Also 8 where the 99th percentile of |x| on the rows is more than ``outlier_ratio`` times its median: 50 is several times what
    normal (4), Student-t (6) and post-GELU (about 20) inputs have. This is the rule of the TaQ-DiT pipeline for SD3-Medium, kept for its
    users; 5 and 8 are its thresholds for a shifted input, whose shifted ranges the caller passes. Comparing a magnitude with a bit
    width has no basis in the paper (arXiv 2411.14172): doubling an input and halving the weight changes the tier and not the error.
    ``weight`` and ``tables`` are not used.
    """
    magnitude = np.maximum(np.abs(ranges.low), np.abs(ranges.high)).max(1)
    median, high = np.percentile(np.abs(ranges.rows).reshape(len(ranges.rows), -1), [50, 99], axis=1)
    bits = np.where(magnitude < a4, 4, np.where(magnitude < a6, 6, 8))
    return np.where(high > outlier_ratio * median, 8, bits).astype(np.uint8)


@register("tier", "error", summary="the fewest bits whose output error stays within a budget")
def error(ranges: InputRanges, weight: Array, tables: Tables, budget: float = 0.02) -> Array:
    """The fewest bits whose relative output error (see ``output_errors``) is at most ``budget``, 8 where none's is: uint8 [T]."""
    measure = OutputErrors(ranges, weight)
    bits = np.full(len(ranges.sigma), max(TIERS), np.uint8)
    for tier in sorted(TIERS, reverse=True)[1:]:
        bits[measure(tables[tier]) <= budget] = tier
    return bits


def mixed(tables: Tables, bits: Array) -> ActivationTable:
    """The table whose entry t is that of ``tables[bits[t]]``; shifts of different widths are broadcast."""
    order = sorted(tables)
    entry = [order.index(int(b)) for b in bits], np.arange(len(bits))
    step = np.stack([tables[tier].step for tier in order])[entry]
    shift = np.stack(np.broadcast_arrays(*(tables[tier].shift for tier in order)))[entry]
    return ActivationTable(tables[order[0]].sigma, step, shift, np.asarray(bits, np.uint8))


def lowered(bits: Array) -> Array:
    """One tier down where there is one: 8 to 6, 6 to 4, 4 stays."""
    return np.maximum(bits.astype(np.uint8) - 2, min(TIERS)).astype(np.uint8)


def quantized(table: ActivationTable, t: int, x: Array) -> Array:
    """x [...,in] as entry ``t`` of a table of 4 to 8 bits represents it, float32: what a layer makes of it at that noise level."""
    edge = 2.0 ** (int(table.bits[t]) - 1)
    codes = np.clip(np.rint((x.astype(np.float32) - table.shift[t]) / table.step[t]), -edge, edge - 1)
    return (codes * table.step[t] + table.shift[t]).astype(np.float32)


class OutputErrors:
    """Measures tables: ‖(Q(X) − X) Wᵀ‖ / ‖X Wᵀ‖ at each timestep, X the rows of ``ranges``.

    Energies go through WᵀW [in,in], computed once, where that takes fewer multiplications for about four measurements.
    """

    def __init__(self, ranges: InputRanges, weight: Array):
        self._rows, weight = ranges.rows, weight.astype(np.float32)
        rows, (out, width) = 4 * ranges.rows.shape[0] * ranges.rows.shape[1], weight.shape
        self._through_gram = width * (out + rows) < out * rows
        self._factor = weight.T @ weight if self._through_gram else weight.T
        self._signal = np.array([self._energy(x.astype(np.float32)) for x in self._rows])

    def _energy(self, rows: Array) -> float:
        """‖rows Wᵀ‖² of rows [R,in]."""
        product = rows @ self._factor
        return max(0.0, float(np.vdot(product, rows if self._through_gram else product)))

    def __call__(self, table: ActivationTable) -> Array:
        """Relative errors [T] float64."""
        noise = np.array([self._energy(quantized(table, t, x) - x) for t, x in enumerate(self._rows)])
        return np.sqrt(noise / np.maximum(self._signal, TINY))


def output_errors(ranges: InputRanges, weight: Array, table: ActivationTable) -> Array:
    """Relative error [T] that a table makes in the output of a layer with ``weight`` [out,in], on the sampled rows."""
    return OutputErrors(ranges, weight)(table)


def combined_errors(ranges: InputRanges, weight: Array, rounded: Array, table: ActivationTable) -> Array:
    """‖Q(X) Ŵᵀ − X Wᵀ‖ / ‖X Wᵀ‖ [T] on the sampled rows: the error of quantized inputs and ``rounded`` weights Ŵ [out,in] together."""
    weight, rounded = weight.astype(np.float32), rounded.astype(np.float32)
    errors = np.empty(len(ranges.sigma))
    for t, x in enumerate(ranges.rows):
        exact = x.astype(np.float32) @ weight.T
        errors[t] = np.linalg.norm(quantized(table, t, x) @ rounded.T - exact) / max(float(np.linalg.norm(exact)), TINY)
    return errors


def rms(errors: Array) -> float:
    """Root mean square over timesteps."""
    return float(np.sqrt(np.mean(np.square(errors))))
