"""Qronos: the first column rounds for what the layers before got wrong, the others make up for it (arXiv 2505.11695).

Per row of the weight it minimises ½‖Xw − X~q‖² with X the full-precision model's inputs and X~ those of the partly
quantized one. Both forms of the paper are here: ``base_form`` is the definition, one solution a column; ``qronos`` the
efficient form, one for all.
"""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid
from ...numerics.arrays import Array
from ...numerics.cholesky import Factor
from ...numerics.moments import Moments, calibrated_gram, shortfall
from ..registry import Citation, register
from .gptq import damped_problem, nearest_plane
from .rtn import better_rows, rtn

QRONOS = Citation(
    "qronos",
    """@article{zhang2025qronos,
  title = {{Qronos}: Correcting the Past by Shaping the Future... in Post-Training Quantization},
  author = {Zhang, Shihao and Zhang, Haoyu and Colbert, Ian and Saab, Rayan},
  journal = {arXiv preprint arXiv:2505.11695},
  year = {2025}
}""",
)


@register(
    "round",
    "qronos",
    citation=QRONOS,
    cross=True,
    summary="GPTQ towards the full-precision model's output, on the quantized model's inputs",
)
def qronos(weight: Array, grid: Grid, moments: Moments | None, *, damping: float = 1e-3, block: int = 32) -> Array:
    """Codes uint8 [out,in] for ``weight`` [out,in] that make ‖XWᵀ − X~Qᵀ‖ small; arguments and errors as for ``gptq``.

    Source: 2505.11695, the efficient form. With H = X~ᵀX~ and G = X~ᵀX damped by the same λ it rounds (G₁w −
    H₁,₂:w₂:)/H₁₁ to q₁, moves the other weights to H₂:,₂:⁻¹(G₂:w − H₂:,₁q₁) and is GPTQ from there. Computed as GPTQ's
    nearest plane towards the corrected target W* (``correction``), which is the same: q₁ is all that Qronos rounds from
    another value than GPTQ would, w₁ + ((G−H)w)₁/H₁₁.

    Departures: ``damping`` is λ relative to mean(diag H) instead of 1e-6 of the largest eigenvalue, which outliers
    decide; the first column is damped as well. Not in the paper: a row that ends up further from the full-precision
    output, ‖Xw − X~q‖, than it would rounded to nearest is rounded to nearest. Raises CalibrationError also when the
    moments have no cross term.
    """
    problem = _Problem(weight, grid, moments, damping)
    factor = Factor.of(problem.hessian)
    aim = problem.weight + factor.solve(problem.missing)
    codes = nearest_plane(aim, grid, factor, block, first=problem.alone(factor.order[-1]))
    return problem.guarded(codes)


def base_form(weight: Array, grid: Grid, moments: Moments | None, *, damping: float = 1e-3) -> Array:
    """The same codes, slowly: after each column all others move to where they make up best for those that are done.

    Source: 2505.11695, the iterates that define the method. One system of equations a column: for tests and for
    reading.
    """
    problem = _Problem(weight, grid, moments, damping)
    hessian, wanted = problem.hessian, problem.weight @ problem.hessian + problem.missing  # (G + λI) w
    order = np.argsort(np.diagonal(hessian), kind="stable")[::-1]
    values, codes = problem.weight.copy(), np.zeros(weight.shape, np.uint8)
    for at, column in enumerate(order):
        others, left = np.delete(np.arange(len(order)), column), order[at + 1 :]
        values[:, column] = (wanted[:, column] - values[:, others] @ hessian[others, column]) / hessian[column, column]
        codes[:, column] = grid.quantize(values)[:, column]
        values[:, column] = grid.dequantize(codes)[:, column]
        done = order[: at + 1]
        rest = wanted[:, left] - values[:, done] @ hessian[np.ix_(done, left)]
        values[:, left] = np.linalg.solve(hessian[np.ix_(left, left)], rest.T).T
    return problem.guarded(codes)


class _Problem:
    """A layer whose output is to be met: ``weight`` [out,in], dead columns zero, damped ``hessian`` [in,in],
    ``missing`` (G − H)w.
    """

    def __init__(self, weight: Array, grid: Grid, moments: Moments | None, damping: float):
        self._gram, self._grid = calibrated_gram(moments, weight.shape[1]), grid
        assert moments is not None
        self.weight, self.hessian = damped_problem(weight, self._gram, damping)
        self._nearest = rtn(self.weight, grid)
        self.missing = shortfall(weight, moments)

    def alone(self, column: int) -> Array:
        """The value [out] of one column that meets the output best while the others keep their weights."""
        value: Array = self.weight[:, column] + self.missing[:, column] / self.hessian[column, column]
        return value

    def guarded(self, codes: Array) -> Array:
        return better_rows(self.weight, self._grid, codes, self._nearest, self._gram, self.missing)
