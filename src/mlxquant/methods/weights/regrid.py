"""Regrid: steps for the values that are rounded, which are not those of the weight.

Rounding with feedback does not round the weight. What it rounds is the weight and what it makes up for of the errors
before, and that is wider: by as much as those errors are large. A step that was searched for the weight alone clips
such values, at two bits most of all, and what is clipped is an error that nobody planned for.

But once a weight is rounded, the values that it was given are known, and so is what an error of each costs: the loss is
Σ (L_jj r_ij)², r what rounding leaves of them, L the Cholesky factor of the Hessian (``gptq.nearest_plane``). So the
step that suits them is found as it would be for a weight whose columns count L_jj². On it the weight is rounded again;
its feedback, and so its values, are now others, but less so each time.
"""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid
from ...numerics.arrays import Array
from ...numerics.cholesky import Factor
from ...numerics.moments import PANEL, Moments, calibrated_gram, calibrated_outputs
from ..registry import register
from .gptq import damped_diagonal, nearest_plane, without_dead_columns
from .kron import errors_meet, two_sided
from .steps import fitted

LARGE = 2**20  # weights; with more a round takes seconds, and the first gains most


@register("refine", "regrid", summary="steps for what feedback makes of the weights, then feedback again, by turns")
def regrid(
    weight: Array,
    grid: Grid,
    codes: Array,
    moments: Moments | None,
    *,
    damping: float = 0.01,
    output_damping: float = 0.05,
    rounds: int | None = None,
) -> tuple[Grid, Array]:
    """A grid of the same format and codes uint8 [out,in] on it with no more loss than those given: tr(D H_I Dᵀ) of
    each row, D = W − Q, or where ``moments`` have H_O tr(H_O D H_I Dᵀ) of all, both damped as ``gptq`` and ``kron`` do.

    In each of ``rounds`` (3, in a large layer 1) the grid is that on which the values that rounding was given, each
    rounded for itself, have the least Σ (L_O,ii L_I,jj r_ij)². The weight is rounded on it by ``gptq``'s feedback, or
    ``kron``'s. Of all rounds and what was there, the best is returned; row by row where rows have steps of their own
    and do not meet in H_O.

    Raises what ``gptq`` raises.
    """
    gram, outputs = calibrated_gram(moments, weight.shape[1]), calibrated_outputs(moments, len(weight))
    target, format = without_dead_columns(weight, gram), grid.format
    inputs = Factor.of(gram, damped_diagonal(gram, damping))
    rows = None
    if outputs is not None and errors_meet(outputs):
        rows = Factor.of(outputs, damped_diagonal(outputs, output_damping))
    counts = _in_place(np.diagonal(inputs.lower) ** 2, inputs)
    by_row = np.ones(len(weight)) if rows is None else _in_place(np.diagonal(rows.lower) ** 2, rows)

    def judged(grid: Grid, codes: Array) -> tuple[Array, Array]:
        """The values that these codes were rounded from, and the loss of each row, or of all."""
        values = given(target, target - grid.dequantize(codes), inputs, rows)
        losses = by_row * (np.square(values - grid.dequantize(codes)) @ counts)
        return values, losses if rows is None and format.group != "tensor" else np.full_like(losses, losses.sum())

    if rounds is None:
        rounds = 3 if weight.size <= LARGE else 1
    values, least = judged(grid, codes)
    for _ in range(rounds):
        other = fitted(values, format, counts)
        found = nearest_plane(target, other, inputs) if rows is None else two_sided(target, other, inputs, rows)[0]
        values, losses = judged(other, found)
        better = (losses < least)[:, None]
        least, codes = np.minimum(losses, least), np.where(better, found, codes)
        steps = [(other.scales, grid.scales), (other.biases, grid.biases)]
        grid = Grid(format, *(np.where(better, new, old) for new, old in steps))
    return grid, codes


def given(target: Array, error: Array, inputs: Factor, outputs: Factor | None) -> Array:
    """The values [out,in] that rounding with feedback was given where it left an ``error`` D [out,in] of its
    ``target``: with F_ij = Σ_j' D_ij' f_I(j',j) of the columns j' that went before and f = L_ji / L_ii they are w_ij +
    F_ij, and where rows have feedback, too, + Σ_i' f_O(i',i) (D_i'j + F_i'j).
    """
    fed = _fed(error, inputs)
    return target + fed + (0 if outputs is None else _fed((error + fed).T, outputs).T)


def _fed(errors: Array, factor: Factor) -> Array:
    """What errors [m,n] add to each of the values [m,n] that are rounded after them."""
    ordered, lower = errors.take(factor.order, 1), factor.lower
    found = np.empty_like(ordered)
    for start in range(0, len(lower), PANEL):
        here = slice(start, start + PANEL)
        feedback = np.tril(lower[start:, here], -1) / np.diagonal(lower)[here]
        found[:, here] = ordered[:, start:] @ feedback.astype(errors.dtype)
    return _in_place(found, factor)


def _in_place(ordered: Array, factor: Factor) -> Array:
    """What is in the order of a factor along its last axis, where it belongs."""
    found = np.empty_like(ordered)
    found[..., factor.order] = ordered
    return found
