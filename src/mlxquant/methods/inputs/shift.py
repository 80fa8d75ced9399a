"""The post-GELU transform of TaQ-DiT (arXiv 2411.14172, section III): shift each channel to its centre, then even the
channels out.

GELU writes channels that are skewed and of unequal reach, and one step for the tensor has to span them all. With the
shift ``s`` and the integer migration ``m`` of each channel,

    y = Q((x - s) / m) (W diag m)ᵀ + (b + W s)

is the same function without Q. In ``QuantizedLinear`` m is ``act_divisor``, the integer weight stands for ``W
diag(m)``, the table's shift is ``s / m`` plus the grid's own, and the layer folds ``W s`` into its bias.

What quantizes such a layer has to round the *transformed* weight: the paper's public code initialises its learned
rounding on W instead, and passes m through ``round`` without a straight-through estimator, so m never learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...grids.tables import ActivationTable
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from .clipping import extremes

RangeMethod = Callable[[InputRanges, Array, int], ActivationTable]


def shifted(ranges: InputRanges, shift: Array) -> InputRanges:
    """The ranges of ``x - shift`` for a shift [T,in]."""
    moved = {name: getattr(ranges, name) - shift for name in ("low", "high", "least", "most")}
    return replace(ranges, **moved, rows=ranges.rows - shift[:, None])


def centred(
    ranges: InputRanges, shift: Array, weight: Array, bits: int, find: RangeMethod = extremes
) -> ActivationTable:
    """The table of x that quantizes ``x - shift`` [T,in] with one step a timestep: ``act_shift`` [T,in].

    ``find`` is the range method that spans ``x - shift`` over all channels; ``weight`` [out,in] is for it. A network
    over time that it made is not kept: it knows nothing of the channels' shifts.
    """
    table = find(shifted(ranges, shift), weight, bits)
    return replace(table, shift=(table.shift + shift).astype(np.float32), network=None)


def migration(ranges: InputRanges, shift: Array, percentile: float = 99.0) -> Array:
    """Integers m [in] >= 1, as float32, that even out the reach of the channels of ``x - shift`` (shift [T,in]).

    ``m_c = max(1, round(Δ_c / Δ_n))``, Δ_c in proportion to the largest |x_c - s_c| over all timesteps, because one m
    is folded into the weight for all of them, and Δ_n its ``percentile`` over channels: the reach of a normal channel.
    Only channels beyond 1.5 Δ_n, the outliers, get more than 1. The paper finds Δ_n by search; a percentile needs no
    second pass over the data.
    """
    reach = np.maximum(np.abs(ranges.least - shift), np.abs(ranges.most - shift)).max(0).astype(np.float64)
    normal = float(np.percentile(reach, percentile))
    if normal == 0:
        return np.ones(len(reach), np.float32)
    return np.maximum(1, np.rint(reach / normal)).astype(np.float32)
