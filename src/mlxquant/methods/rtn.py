"""Round to nearest: the baseline that every rounding method has to beat, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats import Grid, grouped
from .moments import Moments
from .registry import register

Array = npt.NDArray[Any]


@register("round", "rtn", summary="round to nearest")
def rtn(weight: Array, grid: Grid, moments: Moments | None = None) -> Array:
    """Codes uint8 [out,in] of the values on the grid nearest to ``weight`` [out,in]; ``moments`` is not used.

    Computed in float64, so that methods which compute in float64 meet the same ties. Raises NumericsError when the weight is not
    finite, RecipeError when the grid's groups do not divide its width.
    """
    grouped(weight, grid.format)
    return grid.quantize(weight.astype(np.float64))


def better_rows(weight: Array, grid: Grid, codes: Array, nearest: Array, gram: Array) -> Array:
    """``codes`` [out,in], but row by row ``nearest`` where that has less output error d H dᵀ, d = w − q.

    Greedy methods have no guarantee of their own: clipping or an unlucky order can cost a row more than the method gained. The
    losses are compared by their difference (a−b) H (a+b)ᵀ, which takes one product with the gram matrix H [in,in] and not two.
    """
    a, b = (weight.astype(np.float64) - grid.dequantize(c) for c in (codes, nearest))
    excess = np.einsum("oi,oi->o", (a - b) @ gram, a + b)
    return np.where(excess[:, None] > 0, nearest, codes)
