"""GPTAQ: GPTQ that hands on, from column to column, also what each input itself has lost (arXiv 2504.02692)."""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid
from ...numerics.arrays import Array
from ...numerics.cholesky import Factor, solve_lower, solve_transposed
from ...numerics.moments import Moments, calibrated_gram, shortfall
from ..registry import Citation, register
from .gptq import damped_problem, nearest_plane
from .rtn import better_rows, rtn

GPTAQ = Citation(
    "gptaq",
    """@inproceedings{li2025gptaq,
  title = {{GPTAQ}: Efficient Finetuning-Free Quantization for Asymmetric Calibration},
  author = {Li, Yuhang and Yin, Ruokai and Lee, Donghyun and Xiao, Shiting and Panda, Priyadarshini},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  note = {arXiv:2504.02692}
}""",
)


@register(
    "round",
    "gptaq",
    citation=GPTAQ,
    cross=True,
    summary="GPTQ that also makes up, column by column, for what its inputs have lost",
)
def gptaq(
    weight: Array, grid: Grid, moments: Moments | None, *, damping: float = 0.01, block: int = 32, strength: float = 1.0
) -> Array:
    """Codes uint8 [out,in] for ``weight`` [out,in]; arguments, guard and errors as for ``qronos``.

    Source: 2504.02692, algorithm 1: the columns to come make up for w_i(x−x~)_i of each column i as it is done, which
    moves them by w_i P_i,: with P = ((ΔX X~ᵀ Uᵀ) ⊙ M) U, H⁻¹ = UᵀU, M strictly upper. With the columns reversed U is
    L⁻¹: no inverse is needed.

    Departure: w_i is the weight of the full-precision model, whose output is to be met, not what compensation has made
    of it (as 2604.07955 argues). GPTQ's target is then W(I + P), which needs no change of GPTQ. ``strength`` multiplies
    P: 1 as in the paper. Its public code has 0.25, an empirical choice for compensated weights; on the benchmark layer,
    with these, 1 is far better.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    assert moments is not None
    target, hessian = damped_problem(weight, gram, damping)
    nearest, missing = rtn(target, grid), shortfall(weight, moments)
    factor = Factor.of(hessian)
    aim = target + strength * _handed_on(weight, moments, factor)
    codes = nearest_plane(aim, grid, factor, block)
    return better_rows(target, grid, codes, nearest, gram, missing)


def _handed_on(weight: Array, moments: Moments, factor: Factor) -> Array:
    """W P [out,in], in the precision of the moments: how the columns to come make up for each column's own lost
    input.
    """
    assert moments.cross is not None
    order = factor.order
    lost = (moments.cross - moments.gram).T.take(order, 0).take(order, 1)  # ΔX X~ᵀ
    solve_transposed(factor.lower, lost)
    carried = weight.astype(lost.dtype, copy=False).take(order, 1) @ np.tril(lost, -1)
    solve_lower(factor.lower, carried)
    moved = np.empty_like(carried)
    moved[:, order] = carried
    return moved
