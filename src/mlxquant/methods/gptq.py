"""GPTQ: round column by column and let the columns still to come make up for the error (arXiv 2210.17323)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError
from ..formats import Grid
from .moments import Moments, calibrated_gram
from .registry import register
from .rtn import better_rows, rtn

Array = npt.NDArray[Any]


@register("round", "gptq", citation="gptq", summary="column by column with error feedback, largest inputs first")
def gptq(weight: Array, grid: Grid, moments: Moments | None, *, damping: float = 0.01, block: int = 128) -> Array:
    """Codes uint8 [out,in] for ``weight`` [out,in] that make the output error tr((W−Q)H(W−Q)ᵀ) small, H = ``moments.gram``.

    ``damping`` times mean(diag H) is added to the diagonal of H: less trust in these inputs, less error on others. ``block``
    columns share one matrix product; the result does not depend on it. Columns go by descending diag H (act-order) and the scales
    of ``grid`` stay as they are. A dead column (H_jj = 0) gets the code nearest to zero. A row that ends up with more error than
    rounded to nearest is rounded to nearest; the paper has no such guard.

    Raises CalibrationError without moments or with those of another layer, NumericsError when weight or moments are not finite or
    the damped H is not positive definite, RecipeError when the grid's groups do not divide the width.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    target, hessian = damped_problem(weight, gram, damping)
    nearest = rtn(target, grid)
    codes = nearest_plane(target, grid, hessian, block)
    return better_rows(target, grid, codes, nearest, gram)


def damped_problem(weight: Array, gram: Array, damping: float) -> tuple[Array, Array]:
    """The weight [out,in] to approximate, float64 with dead columns zero, and the damped Hessian [in,in], 1 where those cross."""
    power = np.diagonal(gram)
    hessian = gram.copy()
    np.fill_diagonal(hessian, np.where(power > 0, power + damping * power.mean(), 1.0))
    return np.where(power > 0, weight.astype(np.float64), 0.0), hessian


def nearest_plane(target: Array, grid: Grid, hessian: Array, block: int = 128) -> Array:
    """GPTQ's codes uint8 [out,in] for ``target`` [out,in] float64 and a positive definite ``hessian`` [in,in].

    Source: 2210.17323, algorithm 1, computed as Babai's nearest plane (2507.18553), which gives the same codes. The paper factors
    H⁻¹ = UᵀU and subtracts e·U_i,i: from the columns to come, e = (w−q)/U_ii. With the columns reversed H = LLᵀ, L the reversed
    U⁻¹, and the value to round is w_i + Σ_j (w_j−q_j) L_ji / L_ii over the columns j done before: no inverse, no changed weights.
    """
    width = target.shape[1]
    order = np.argsort(np.diagonal(hessian), kind="stable")  # the last goes first
    try:
        factor = np.linalg.cholesky(hessian[np.ix_(order, order)])
    except np.linalg.LinAlgError as error:
        raise NumericsError(
            f"the Hessian of {width} inputs is not positive definite; use more damping (0.01 is usual) or more calibration tokens"
        ) from error
    group = order // grid.format.columns(width)
    scales, biases = (np.ascontiguousarray(v.T, np.float64) for v in (grid.scales, grid.biases))
    target = np.ascontiguousarray(target.T[order])  # a column is rounded at once: keep it contiguous
    errors = np.empty_like(target)
    codes = np.empty(target.shape, np.uint8)
    for stop in range(width, 0, -block):
        start = max(stop - block, 0)
        feedback = (factor[start:, start:stop] / np.diagonal(factor)[start:stop]).T
        wanted = target[start:stop] + feedback[:, stop - start :] @ errors[stop:]
        inside = np.ascontiguousarray(feedback[:, : stop - start])
        for i in reversed(range(start, stop)):
            k, scale, bias = i - start, scales[group[i]], biases[group[i]]
            value = wanted[k] + inside[k, k + 1 :] @ errors[i + 1 : stop]
            code = np.clip(np.rint((value - bias) / scale), 0, grid.format.levels - 1)
            errors[i] = target[i] - (code * scale + bias)
            codes[i] = code
    in_place = np.empty_like(codes)
    in_place[order] = codes
    return np.ascontiguousarray(in_place.T)
