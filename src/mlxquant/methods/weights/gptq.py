"""GPTQ: round column by column and let the columns still to come make up for the error (arXiv 2210.17323)."""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid
from ...numerics.arrays import Array
from ...numerics.cholesky import Factor
from ...numerics.moments import Moments, calibrated_gram, energy
from ..registry import Citation, register
from .rtn import rtn

GPTQ = Citation(
    "gptq",
    """@inproceedings{frantar2023gptq,
  title = {{GPTQ}: Accurate Post-Training Quantization for Generative Pre-trained Transformers},
  author = {Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan},
  booktitle = {International Conference on Learning Representations},
  year = {2023},
  note = {arXiv:2210.17323}
}""",
)


@register("round", "gptq", citation=GPTQ, summary="column by column with error feedback, largest inputs first")
def gptq(weight: Array, grid: Grid, moments: Moments | None, *, damping: float = 0.01, block: int = 32) -> Array:
    """Codes uint8 [out,in] for ``weight`` [out,in] that make the output error tr((W−Q)H(W−Q)ᵀ) small, H =
    ``moments.gram``.

    ``damping`` times mean(diag H) is added to the diagonal of H: less trust in these inputs, less error on others.
    Feedback comes in matrix products down to ``block`` columns, inside of which it comes column by column; the result
    does not depend on it. Columns go by descending diag H (act-order) and the scales of ``grid`` stay as they are. A
    dead column (H_jj = 0) gets the code nearest to zero. A row that ends up with more error than rounded to nearest is
    rounded to nearest; the paper has no such guard.

    Raises CalibrationError without moments or with those of another layer, NumericsError when weight or moments are not
    finite or the damped H is not positive definite, RecipeError when the grid's groups do not divide the width.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    target, diagonal = without_dead_columns(weight, gram), damped_diagonal(gram, damping)
    nearest = rtn(target, grid)
    columns = _Columns(target, grid, Factor.of(gram, diagonal))  # a damped copy would be the largest thing in memory
    columns.settle(0, target.shape[1], block)
    ours = columns.losses(diagonal - np.diagonal(gram))
    theirs = energy(target - grid.dequantize(nearest), gram)
    return np.where((ours > theirs)[:, None], nearest, columns.rounded())


def damped_problem(weight: Array, gram: Array, damping: float) -> tuple[Array, Array]:
    """The weight [out,in] to approximate and the damped Hessian [in,in], both in the precision of ``gram``."""
    hessian = gram.copy()
    np.fill_diagonal(hessian, damped_diagonal(gram, damping))
    return without_dead_columns(weight, gram), hessian


def damped_diagonal(gram: Array, damping: float) -> Array:
    """That of the damped Hessian [in], 1 where a column is dead."""
    power = np.diagonal(gram)
    return np.where(power > 0, power + damping * power.mean(), gram.dtype.type(1))


def without_dead_columns(weight: Array, gram: Array) -> Array:
    """The weight [out,in] to approximate: zero in dead columns, in the precision of ``gram``."""
    return np.where(np.diagonal(gram) > 0, weight.astype(gram.dtype, copy=False), gram.dtype.type(0))


def nearest_plane(target: Array, grid: Grid, factor: Factor, block: int = 32, first: Array | None = None) -> Array:
    """GPTQ's codes uint8 [out,in] for ``target`` [out,in] and the ``factor`` of the Hessian, in the precision of the
    target.

    ``first`` [out] is what the column that goes first is rounded from, where that is not its target.

    Source: 2210.17323, algorithm 1, computed as Babai's nearest plane (2507.18553), which gives the same codes. The
    paper factors H⁻¹ = UᵀU and subtracts e·U_i,i: from the columns to come, e = (w−q)/U_ii. With the columns reversed H
    = LLᵀ, L the reversed U⁻¹, and the value to round is w_i + Σ_j (w_j−q_j) L_ji / L_ii over the columns j done before:
    no inverse, no changed weights.
    """
    columns = _Columns(target, grid, factor)
    if first is not None:
        columns.wanted[-1] = first
    columns.settle(0, target.shape[1], block)
    return columns.rounded()


class _Columns:
    """The columns of a weight on their way to the nearest plane, in the order of the factor.

    ``errors`` [in,out] are w − q of the columns that are done and w of the others; ``wanted`` [in,out] w and the
    feedback on it, or e of the columns that are done.
    """

    def __init__(self, target: Array, grid: Grid, factor: Factor):
        self._order, self._factor, self._diagonal = factor.order, factor.lower, np.diagonal(factor.lower)
        self._group, self._top = factor.order // grid.format.columns(len(factor.order)), grid.format.levels - 1
        self._scales, self._biases = (np.ascontiguousarray(v.T, target.dtype) for v in (grid.scales, grid.biases))
        self._errors = target.T.take(factor.order, 0)  # a column is rounded at once: keep it contiguous
        self.wanted = self._errors.copy()
        self._codes = np.empty(self._errors.shape, np.uint8)

    def _feedback(self, done: slice, to: slice) -> Array:
        """L_ji / L_ii [i,j], of the columns j that are ``done`` to columns i."""
        scaled = np.divide(self._factor[done, to], self._diagonal[to], dtype=self._errors.dtype, casting="same_kind")
        return scaled.T

    def settle(self, start: int, stop: int, block: int) -> None:
        """Round the columns from ``start`` to ``stop``, which have had the feedback of all after them: the later half
        first.
        """
        if stop - start > block:
            middle = (start + stop) // 2
            self.settle(middle, stop, block)
            self.wanted[start:middle] += (
                self._feedback(slice(middle, stop), slice(start, middle)) @ self._errors[middle:stop]
            )
            self.settle(start, middle, block)
            return
        feedback = np.ascontiguousarray(self._feedback(slice(start, stop), slice(start, stop)))
        for i in reversed(range(start, stop)):
            k, scale, bias = i - start, self._scales[self._group[i]], self._biases[self._group[i]]
            value = self.wanted[i] + feedback[k, k + 1 :] @ self._errors[i + 1 : stop]
            code = np.clip(np.rint((value - bias) / scale), 0, self._top)
            rounded = code * scale + bias
            self._errors[i] -= rounded
            self.wanted[i] = (value - rounded) * self._diagonal[i]
            self._codes[i] = code

    def rounded(self) -> Array:
        """The codes uint8 [out,in], in the weight's own order."""
        codes = np.empty_like(self._codes)
        codes[self._order] = self._codes
        return np.ascontiguousarray(codes.T)

    def losses(self, damping: Array) -> Array:
        """What is left of each row's error, float64 [out], without the ``damping`` [in] that was added to H's diagonal.

        Damped it is Σ e² (2210.17323), which spares a product with H.
        """
        added = damping[self._order]
        return np.einsum("io,io->o", self.wanted, self.wanted, dtype=np.float64) - np.einsum(
            "io,io,i->o", self._errors, self._errors, added, dtype=np.float64
        )
