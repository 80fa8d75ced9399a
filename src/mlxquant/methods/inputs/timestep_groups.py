"""One entry for several neighbouring noise levels: more samples for each entry, and fewer entries, than one a timestep.

Calibration with few pictures sees little of each noise level. Where neighbours look alike, one range for all of them is
estimated from more rows, and covers what a single level happened to miss; where they do not, it makes every one of them
coarser. Which levels belong together is decided exactly, by dynamic programming.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from ...grids.tables import ActivationTable
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ..registry import register
from .clipping import error


def group_costs(low: Array, high: Array) -> Array:
    """What sharing one range costs, float64 [T,T]: entry (i, j) for levels i to j, infinite for j < i.

    The error of a uniform quantizer grows with its step squared, so a level that takes the group's span for its own
    multiplies its error by ``(span of the group / own span)²``; the cost is the sum of these factors. A level whose own
    span is 0 counts with the smallest that is not.
    """
    low, high = low.astype(np.float64), high.astype(np.float64)
    own = high - low
    if not (own > 0).any():
        return np.where(np.tri(len(own), k=-1, dtype=bool), np.inf, 0.0)
    own = np.maximum(own, own[own > 0].min())
    costs = np.full((len(own), len(own)), np.inf)
    for i in range(len(own)):
        span = np.maximum.accumulate(high[i:]) - np.minimum.accumulate(low[i:])
        costs[i, i:] = span**2 * np.cumsum(1 / own[i:] ** 2)
    return costs


def best_groups(costs: Array, groups: int) -> list[slice]:
    """The cut of T neighbours into at most ``groups`` runs with the least total cost; ``costs`` [T,T] as
    ``group_costs`` has them.
    """
    count = len(costs)
    groups = min(groups, count)
    totals, first = np.full((groups + 1, count + 1), np.inf), np.zeros((groups + 1, count + 1), int)
    totals[:, 0] = 0
    for used in range(1, groups + 1):
        through = totals[used - 1, :count, None] + costs
        first[used, 1:], totals[used, 1:] = through.argmin(0), through.min(0)
    cuts, stop = list[slice](), count
    for used in range(groups, 0, -1):
        if stop > 0:
            cuts.append(slice(int(first[used, stop]), stop))
            stop = cuts[-1].start
    return cuts[::-1]


def part(ranges: InputRanges, levels: slice) -> InputRanges:
    """The ranges of some of the noise levels."""
    return InputRanges(*(getattr(ranges, field.name)[levels] for field in fields(ranges)))


@register(
    "range",
    "grouped",
    summary="a few groups of neighbouring noise levels, each with the clipping of least error",
    over_time=True,
)
def grouped(ranges: InputRanges, weight: Array, bits: int, groups: int = 4) -> ActivationTable:
    """One entry, by ``clipping.error``, for each of at most ``groups`` runs of noise levels; repeated for all levels of
    its run.
    """
    cuts = best_groups(group_costs(ranges.least.min(1), ranges.most.max(1)), groups)
    tables = [error(part(ranges, levels).merged(), weight, bits) for levels in cuts]
    sizes = [levels.stop - levels.start for levels in cuts]
    step, shift, width = (
        np.repeat(np.concatenate([getattr(t, name) for t in tables]), sizes, 0) for name in ("step", "shift", "bits")
    )
    return ActivationTable(ranges.sigma.astype(np.float32), step, shift, width)
