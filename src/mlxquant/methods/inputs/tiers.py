"""Tiers: with how many bits a layer's input is quantized at each timestep.

A rule sees the ranges of the input, the layer's weight [out,in], the layer's activation table at every tier that it may
take, and what an error of each output costs; it returns one bit width a timestep. ``mixed`` then puts the table
together. Errors are of the layer's output on the sampled rows, because an error of the input counts only as far as the
weight lets it through.

One convention holds wherever errors are weighed: the error of a layer at timestep t is ``sum_o costs[t,o]
mean_rows(e_o^2)``, squared, with e_o the error of output o. With the costs of ``curvature.sensitivity`` that is the
mean squared error of the velocity, to first order; without costs, ``costs[t,o] = 1 / sum_o mean_rows(y_o^2)``, the
relative squared output error.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...grids.tables import BITS, ActivationTable, nearest_levels
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ..registry import register

TIERS = BITS[:-1]  # of quantized inputs; 16 leaves them as they are
BUDGET = 6.5e-7  # of mean squared velocity error: one input may change the velocity by 8e-4 of its size
Tables = Mapping[int, ActivationTable]
TINY = float(np.finfo(np.float32).tiny)


@register("tier", "threshold", summary="A4, A6 or A8 by the magnitude of the range")
def threshold(
    ranges: InputRanges,
    weight: Array,
    tables: Tables,
    costs: Array | None = None,
    a4: float = 6.0,
    a6: float = 10.0,
    outlier_ratio: float = 50.0,
) -> Array:
    """4 bits where the largest averaged |range| of any channel is below ``a4``, 6 below ``a6``, else 8: uint8 [T].

    It is averaged over batches of samples, as by the range method ``average``, so their size counts here, too. Also 8
    where the 99th percentile of |x| on the rows is more than ``outlier_ratio`` times its median: 50 is several times
    what normal (4), Student-t (6) and post-GELU (about 20) inputs have. This is the rule of the TaQ-DiT pipeline for
    SD3-Medium, kept for its users; 5 and 8 are its thresholds for a shifted input, whose shifted ranges the caller
    passes. Comparing a magnitude with a bit width has no basis in the paper (arXiv 2411.14172): doubling an input and
    halving the weight changes the tier and not the error. Never more bits than the largest tier of ``tables``;
    ``weight`` and ``costs`` are not used.
    """
    magnitude = np.maximum(np.abs(ranges.low), np.abs(ranges.high)).max(1)
    median, high = np.percentile(np.abs(ranges.rows).reshape(len(ranges.rows), -1), [50, 99], axis=1)
    bits = np.where(magnitude < a4, 4, np.where(magnitude < a6, 6, 8))
    return np.minimum(np.where(high > outlier_ratio * median, 8, bits), max(tables)).astype(np.uint8)


@register("tier", "error", summary="the fewest bits whose output error stays within a budget")
def error(
    ranges: InputRanges, weight: Array, tables: Tables, costs: Array | None = None, budget: float = BUDGET
) -> Array:
    """The fewest bits whose error (see ``OutputErrors``) is at most ``budget``, the most of ``tables`` where none's is:
    uint8 [T].

    The budget is in the units of the error: mean squared velocity error with the ``costs`` [T,out] of a sensitivity,
    relative squared output error without.
    """
    measure = OutputErrors(ranges, weight, costs)
    most, *fewer = sorted(tables, reverse=True)
    bits = np.full(len(ranges.sigma), most, np.uint8)
    for tier in fewer:
        bits[measure(tables[tier]) <= budget] = tier
    return bits


def mixed(tables: Tables, bits: Array) -> ActivationTable:
    """The table whose entry t is that of ``tables[bits[t]]``; shifts of different widths are broadcast. A network over
    time is kept where all bits are the same.
    """
    order = sorted(tables)
    entry = [order.index(int(b)) for b in bits], np.arange(len(bits))
    step = np.stack([tables[tier].step for tier in order])[entry]
    shift = np.stack(np.broadcast_arrays(*(tables[tier].shift for tier in order)))[entry]
    log = np.stack([tables[tier].log for tier in order])[entry]
    network = tables[order[entry[0][0]]].network if len(set(entry[0])) == 1 else None
    return ActivationTable(tables[order[0]].sigma, step, shift, np.asarray(bits, np.uint8), log, network)


def lowered(bits: Array) -> Array:
    """One tier down where there is one: 8 to 6, 6 to 4, 4 stays."""
    return np.maximum(bits.astype(np.uint8) - 2, min(TIERS)).astype(np.uint8)


def quantized(table: ActivationTable, t: int, x: Array) -> Array:
    """x [...,in] as entry ``t`` of a table of 4 to 8 bits represents it, float32: what a layer makes of it at that
    noise level.
    """
    edge, offset = 2.0 ** (int(table.bits[t]) - 1), (x.astype(np.float32) - table.shift[t]) / table.step[t]
    levels = nearest_levels(offset, int(table.bits[t])) if table.log[t] else np.clip(np.rint(offset), -edge, edge - 1)
    return (levels * table.step[t] + table.shift[t]).astype(np.float32)


class OutputErrors:
    """Measures tables on X, the rows of ``ranges``, against the exact outputs ``X Wᵀ``, by the convention at the top of
    this file.

    ``costs`` [T,out] is what a unit of squared error costs in each output; None measures relative squared errors.
    """

    def __init__(self, ranges: InputRanges, weight: Array, costs: Array | None = None):
        self._rows, self._weight = ranges.rows.astype(np.float32), weight.astype(np.float32)
        if costs is None:
            energy = [np.square(x @ self._weight.T).mean(0).sum(dtype=np.float64) for x in self._rows]
            costs = np.broadcast_to(1 / np.maximum(energy, TINY)[:, None], (len(self._rows), len(weight)))
        self._costs = costs

    def __call__(self, table: ActivationTable | None, rounded: Array | None = None) -> Array:
        """Errors [T] float64 with inputs on ``table``, or as they are, and with the ``rounded`` weight [out,in] in
        place of W, if any.
        """
        errors = np.empty(len(self._rows))
        for t, x in enumerate(self._rows):
            seen = x if table is None else quantized(table, t, x)
            wrong = (
                (seen - x) @ self._weight.T
                if rounded is None
                else seen @ rounded.astype(np.float32).T - x @ self._weight.T
            )
            errors[t] = np.square(wrong).mean(0) @ self._costs[t]
        return errors


def relative_errors(ranges: InputRanges, weight: Array, table: ActivationTable) -> Array:
    """‖(Q(X) − X) Wᵀ‖ / ‖X Wᵀ‖ [T], X the sampled rows: not squared and without costs, for people to read."""
    return np.sqrt(OutputErrors(ranges, weight)(table))


def rms(errors: Array) -> float:
    """Root mean square over timesteps."""
    return float(np.sqrt(np.mean(np.square(errors))))
