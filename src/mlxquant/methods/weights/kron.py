"""Two-sided rounding: GPTQ's feedback from column to column, and from row to row as well.

GPTQ takes each output of a layer for itself. But what a model predicts hangs on outputs together: an error that two of
them make may add up, or cancel, in everything that comes after. With a Hessian of the prediction in Kronecker form, H =
H_O ⊗ H_I, the loss of an error D is tr(H_O D H_I Dᵀ). H_I [in,in] is what GPTQ has; H_O [out,out] says how errors of
outputs add up. Both are factored, and then a weight's error is made up for by those to its left and by those above it.

The value that is rounded hangs on all to its right and on all below it. So it seems that one goes weight by weight; but
all of an antidiagonal are free at once. The weight is cut into square pieces: between pieces feedback is matrix
products, all pieces of an antidiagonal of pieces are worked on together, and inside of them all of an antidiagonal of
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...grids.weights import Grid
from ...numerics.arrays import Array
from ...numerics.cholesky import Factor
from ...numerics.moments import PANEL, Moments, calibrated_gram, calibrated_outputs
from ..registry import Citation, register
from .gptq import damped_diagonal, gptq, without_dead_columns
from .rtn import rtn

YAQA = Citation(
    "yaqa",
    """@inproceedings{tseng2025yaqa,
  title = {Model-Preserving Adaptive Rounding},
  author = {Tseng, Albert and Sun, Zhaofeng and De Sa, Christopher},
  year = {2025},
  note = {arXiv:2505.22988}
}""",
)


@register(
    "round",
    "kron",
    citation=YAQA,
    summary="GPTQ with feedback from row to row as well: errors of outputs make up for each other",
    two_sided=True,
)
def kron(
    weight: Array,
    grid: Grid,
    moments: Moments | None,
    *,
    damping: float = 0.01,
    output_damping: float = 0.05,
    block: int = 64,
) -> Array:
    """Codes uint8 [out,in] for ``weight`` [out,in] that make tr(H_O (W−Q) H_I (W−Q)ᵀ) small, H_I = ``moments.gram`` and
    H_O = ``moments.outputs``.

    Both are damped, by ``damping`` and ``output_damping`` times their mean diagonal. Rows and columns go by descending
    diagonal and the scales of ``grid`` stay as they are. The result does not depend on ``block``. Codes that lose more
    than rounding to nearest does, by that loss, are not taken. Without H_O, or where it is diagonal (errors of outputs
    do not meet, or nothing hangs on any), this is ``gptq``, which judges row by row.

    Source: 2505.22988, section 3.3 (two-sided LDLQ), computed as Babai's nearest plane, see ``gptq.nearest_plane``.

    Raises as ``gptq`` does, also on H_O of another layer or one that is not finite.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    outputs = calibrated_outputs(moments, len(weight))
    if outputs is None or not errors_meet(outputs):
        return gptq(weight, grid, moments, damping=damping)
    target = without_dead_columns(weight, gram)
    nearest = rtn(target, grid)
    inputs = Factor.of(gram, damped_diagonal(gram, damping))
    rows = Factor.of(outputs, damped_diagonal(outputs, output_damping))
    codes, ours = two_sided(target, grid, inputs, rows, block)
    return nearest if ours > kronecker_loss(target - grid.dequantize(nearest), inputs, rows) else codes


def errors_meet(outputs: Array) -> bool:
    """Whether errors of different outputs add up or cancel in what comes after, by H_O [out,out]."""
    return bool(np.count_nonzero(outputs) > np.count_nonzero(np.diagonal(outputs)))


def kronecker_loss(error: Array, inputs: Factor, outputs: Factor) -> float:
    """tr(H_O D H_I Dᵀ) of an error D [out,in], which is |L_Oᵀ D L_I|², by the factors of H_I and H_O."""
    ordered = error[outputs.order][:, inputs.order]
    for lower in (outputs.lower, inputs.lower):  # L_Oᵀ D, and then (L_Iᵀ (L_Oᵀ D)ᵀ)ᵀ
        some = [slice(start, start + PANEL) for start in range(0, len(lower), PANEL)]
        parts = [np.tril(lower[here.start :, here]).astype(error.dtype).T @ ordered[here.start :] for here in some]
        ordered = np.concatenate(parts).T
    return float(np.einsum("oi,oi->", ordered, ordered, dtype=np.float64))


@dataclass(frozen=True)
class _Side:
    """Feedback along one side of a weight, cut into pieces of ``block``: ``scaled`` [n,n] is L_ji / L_ii, zero on the
    diagonal and above it. What is filled in to make whole pieces stands in front, where it is last and hands on
    nothing.
    """

    order: Array
    scaled: Array
    diagonal: Array
    filled: int

    @classmethod
    def of(cls, factor: Factor, block: int, dtype: np.dtype) -> _Side:
        size = len(factor.order)
        filled = -size % block
        scaled = np.zeros((filled + size, filled + size), dtype)
        scaled[filled:, filled:] = np.tril(factor.lower, -1) / np.diagonal(factor.lower)
        diagonal = np.concatenate([np.zeros(filled, dtype), np.diagonal(factor.lower).astype(dtype)])
        return cls(factor.order, scaled, diagonal, filled)

    def pieces(self, block: int) -> Array:
        """Those on the diagonal, transposed: [pieces, block, block], row i of each with what comes to i."""
        at = range(0, len(self.scaled), block)
        return np.stack([self.scaled[i : i + block, i : i + block].T for i in at])


def two_sided(target: Array, grid: Grid, inputs: Factor, outputs: Factor, block: int = 64) -> tuple[Array, float]:
    """Codes uint8 [out,in] for ``target`` [out,in] by factors of H_I and H_O, in the precision of the target, and their
    ``kronecker_loss``, which spares its products: it is Σ (L_O,ii L_I,jj r_ij)² with r what rounding leaves of the
    value that it is given.

    With D = W − Q of what is done, f = L_ji / L_ii of a side, F_ij = Σ_j' D_ij' f_I(j',j): what is rounded is w_ij +
    F_ij + Σ_i' f_O(i',i) (D_i'j + F_i'j).
    """
    dtype = target.dtype
    down, along = _Side.of(outputs, block, dtype), _Side.of(inputs, block, dtype)
    width = target.shape[1]
    groups = np.arange(width) // grid.format.columns(width)

    def laid_out(values: Array, fill: float) -> Array:
        """[out,in] in the order of both factors, with what is filled in."""
        ordered = np.broadcast_to(values, target.shape)[outputs.order][:, inputs.order]
        return np.pad(ordered.astype(dtype), ((down.filled, 0), (along.filled, 0)), constant_values=fill)

    wanted = laid_out(target, 0)
    scales, biases = (laid_out(v[:, groups], fill) for v, fill in ((grid.scales, 1), (grid.biases, 0)))
    lost, carried = np.zeros_like(wanted), np.zeros_like(wanted)  # D, and D + F
    codes, loss = np.empty(wanted.shape, np.uint8), 0.0
    pieces_down, pieces_along = down.pieces(block), along.pieces(block)
    high, wide = len(pieces_down), len(pieces_along)
    for diagonal in reversed(range(high + wide - 1)):
        at = [(i, diagonal - i) for i in range(max(0, diagonal - wide + 1), min(high, diagonal + 1))]
        here = [(slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)) for i, j in at]
        from_right = np.stack([lost[r, c.stop :] @ along.scaled[c.stop :, c] for r, c in here])
        from_below = np.stack([down.scaled[r.stop :, r].T @ carried[r.stop :, c] for r, c in here])
        whole, steps, zeros = (np.stack([values[place] for place in here]) for values in (wanted, scales, biases))
        towards, downwards = pieces_along[[j for _, j in at]], pieces_down[[i for i, _ in at]]
        found = _settle(whole, steps, zeros, from_right, from_below, towards, downwards, grid.format.levels - 1)
        for (i, j), place, error, handed_on, code, left in zip(at, here, *found, strict=True):
            lost[place], carried[place], codes[place] = error, handed_on, code
            left *= down.diagonal[i * block : (i + 1) * block, None] * along.diagonal[j * block : (j + 1) * block]
            loss += float(np.einsum("ij,ij->", left, left, dtype=np.float64))
    rounded = np.empty(target.shape, np.uint8)
    rounded[np.ix_(outputs.order, inputs.order)] = codes[down.filled :, along.filled :]
    return rounded, loss


def _settle(
    wanted: Array,
    scales: Array,
    biases: Array,
    from_right: Array,
    from_below: Array,
    along: Array,
    down: Array,
    top: int,
) -> tuple[Array, Array, Array, Array]:
    """Round pieces [P,b,b] that have had the feedback of all outside of them: D, D + F, codes, and what rounding has
    left of the values that it was given, [P,b,b] each.
    """
    lost, carried, left = (np.zeros_like(wanted) for _ in range(3))  # the second by columns: [P,j,i]
    codes = np.empty(wanted.shape, np.uint8)
    size = wanted.shape[1]
    flipped = [values[:, :, ::-1] for values in (wanted, scales, biases, from_right, from_below)]
    for diagonal in reversed(range(2 * size - 1)):
        first, last = max(0, diagonal - size + 1), min(size - 1, diagonal)  # of rows, and of columns alike
        rows, columns = slice(first, last + 1), _falling(last, first)
        offset = size - 1 - diagonal
        value, scale, bias, right, below = (np.diagonal(values, offset, 1, 2) for values in flipped)
        done = slice(first, None)  # nothing of a piece comes from in front of its antidiagonal
        handed_on = right + np.einsum("pqk,pqk->pq", lost[:, rows, done], along[:, columns, done])
        added = below + np.einsum("pqk,pqk->pq", carried[:, columns, done], down[:, rows, done])
        given = value + handed_on + added
        code = np.clip(np.rint((given - bias) / scale), 0, top)
        rounded = code * scale + bias
        error = value - rounded
        i, j = np.arange(first, last + 1), np.arange(last, first - 1, -1)
        lost[:, i, j], carried[:, j, i], codes[:, i, j], left[:, i, j] = error, error + handed_on, code, given - rounded
    return lost, carried.swapaxes(1, 2), codes, left


def _falling(last: int, first: int) -> slice:
    """Indices from ``last`` down to ``first``, as a slice."""
    return slice(last, first - 1 if first else None, -1)
