"""Range methods: from the ranges of a layer's input to its static activation table.

All use one affine grid for the whole tensor at each noise level, ``step = (high - low) / (2^bits - 1)`` with the lowest
code on ``low``; they differ in how much of the range they keep. With a single noise level each is the plain static
case.
"""

from __future__ import annotations

import numpy as np

from ...grids.tables import ActivationTable
from ...numerics.arrays import Array
from ...numerics.input_ranges import InputRanges
from ..registry import Citation, register

TAQDIT = Citation(
    "taqdit",
    """@article{liu2024taqdit,
  title = {{TaQ-DiT}: Time-aware Quantization for Diffusion Transformers},
  author = {Liu, Xinyan and Shi, Huihong and Xu, Yang and Wang, Zhongfeng},
  journal = {arXiv preprint arXiv:2411.14172},
  year = {2024}
}""",
)

EXTREMES = 1.0  # for how many sampled rows each channel's smallest value, and its largest, count in ``error``


def affine_table(sigma: Array, low: Array, high: Array, bits: int) -> ActivationTable:
    """The table whose codes span [low, high] [T] exactly; an empty range gets step 1."""
    span = (high - low).astype(np.float64)
    step = np.where(span > 0, span / (2**bits - 1), 1.0).astype(np.float32)
    shift = low.astype(np.float32) + np.float32(2 ** (bits - 1)) * step
    return ActivationTable(sigma.astype(np.float32), step, shift[:, None], np.full(len(sigma), bits, np.uint8))


@register("range", "extremes", summary="the smallest and largest value seen")
def extremes(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """Nothing that calibration saw is clipped. ``weight`` [out,in] is not used."""
    return affine_table(ranges.sigma, ranges.least.min(1), ranges.most.max(1), bits)


@register("range", "average", citation=TAQDIT, summary="mean over batches of each batch's minimum and maximum")
def average(ranges: InputRanges, weight: Array, bits: int) -> ActivationTable:
    """Averaged min-max (TaQ-DiT, arXiv 2411.14172, section III): less swayed by one outlying batch.

    How many samples make a batch decides how much is clipped; ``numerics.input_ranges`` says how they are cut. The
    means are of each channel, and the codes span the lowest and the highest of them. ``weight`` is not used.
    """
    return affine_table(ranges.sigma, ranges.low.min(1), ranges.high.max(1), bits)


@register("range", "error", summary="the clipping with the least error in the layer's output")
def error(ranges: InputRanges, weight: Array, bits: int, candidates: int = 18, values: int = 2**15) -> ActivationTable:
    """Search how far to clip each end, by the output error on sampled rows and on the extremes.

    The error of input channel c counts with ``||W_:c||^2``, the diagonal of W^T W. Each end is searched in turn over
    ``candidates`` shrink factors from 1 to 0.3, starting from the extremes, until neither moves; so the result is never
    worse than ``extremes`` on what it looks at (at most about ``values`` entries of the rows). The rows are few and
    hold hardly any of the largest values, so by them alone clipping looks free: each channel's extremes count as well,
    as one row each. ``python benchmarks/time_networks.py`` compares it with ``extremes`` on held-out prompts.
    """
    importance = (weight.astype(np.float64) ** 2).sum(0).astype(np.float32)
    low, high = ranges.least.min(1).astype(np.float64), ranges.most.max(1).astype(np.float64)
    shrink = np.linspace(1.0, 0.3, candidates)
    for t, rows in enumerate(ranges.rows):
        stride = max(1, rows.size // values) | 1  # odd, so that it walks through all channels
        heft = np.broadcast_to(importance, rows.shape).reshape(-1)[::stride]
        rare = importance * np.float32(EXTREMES / stride)
        flat = np.concatenate([rows.reshape(-1)[::stride], ranges.least[t], ranges.most[t]]).astype(np.float32)
        heft = np.concatenate([heft, rare, rare])

        def cost(lo: float, hi: float, flat: Array = flat, heft: Array = heft) -> float:
            if hi <= lo:
                return float("inf")
            step = np.float32((hi - lo) / (2**bits - 1))
            q = np.clip(np.rint((flat - np.float32(lo)) / step), 0, 2**bits - 1) * step + np.float32(lo)
            return float(np.dot((q - flat) ** 2, heft))

        lo_edge, hi_edge = low[t], high[t]
        best, lo, hi = cost(lo_edge, hi_edge), lo_edge, hi_edge
        for _ in range(3):
            before = best
            for end in (0, 1):
                trials = [(lo_edge * f, hi) if end == 0 else (lo, hi_edge * f) for f in shrink]
                costs = [cost(*trial) for trial in trials]
                if min(costs) < best:
                    best = min(costs)
                    lo, hi = trials[int(np.argmin(costs))]
            if best == before:
                break
        low[t], high[t] = lo, hi
    return affine_table(ranges.sigma, low, high, bits)
