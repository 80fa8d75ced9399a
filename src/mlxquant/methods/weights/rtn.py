"""Round to nearest: the baseline that every rounding method has to beat, row by row."""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid, grouped
from ...numerics.arrays import Array
from ...numerics.moments import Moments, excess
from ..registry import register

ROWS = 32


@register("round", "rtn", summary="round to nearest")
def rtn(weight: Array, grid: Grid, moments: Moments | None = None) -> Array:
    """Codes uint8 [out,in] of the values on the grid nearest to ``weight`` [out,in]; ``moments`` is not used.

    Computed in float64, so that methods which compute in float64 meet the same ties, a few rows at a time. Raises
    NumericsError when the weight is not finite, RecipeError when the grid's groups do not divide its width.
    """
    grouped(weight, grid.format)
    codes = np.empty(weight.shape, np.uint8)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        codes[rows] = Grid(grid.format, grid.scales[rows], grid.biases[rows]).quantize(weight[rows].astype(np.float64))
    return codes


def better_rows(
    weight: Array, grid: Grid, codes: Array, nearest: Array, gram: Array, missing: Array | None = None
) -> Array:
    """``codes`` [out,in], but row by row ``nearest`` where that has less output error d H dᵀ, d = w − q.

    Greedy methods have no guarantee of their own: clipping or an unlucky order can cost a row more than the method
    gained. With ``missing`` [out,in], the ``moments.shortfall`` of the weight, errors are those against the
    full-precision model's outputs.
    """
    ours, theirs = (excess(weight - grid.dequantize(c), gram, missing) for c in (codes, nearest))
    return np.where((ours > theirs)[:, None], nearest, codes)
