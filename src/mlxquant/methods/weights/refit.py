"""Refit: for the codes that were found, the steps that serve them best, then the codes again, by turns.

A search for the step looks at rounding to nearest under the diagonal of H; only once the codes are there does the whole
of H say which step suits them. With the codes fixed the error is quadratic in the scales (and biases) of a row: least
squares.
"""

from __future__ import annotations

import numpy as np

from ...grids.weights import Grid, WeightFormat, snap, snap_biases
from ...numerics.arrays import Array
from ...numerics.moments import Moments, calibrated_gram, energy
from ..registry import register
from .descent import descend
from .gptq import damped_problem

CHUNK = 2**22  # numbers in the normal equations of the rows that are solved at once


@register("refine", "refit", summary="steps that fit the codes by least squares, then coordinate descent, by turns")
def refit(
    weight: Array,
    grid: Grid,
    codes: Array,
    moments: Moments | None,
    *,
    damping: float = 0.01,
    rounds: int = 4,
    passes: int = 4,
) -> tuple[Grid, Array]:
    """A grid of the same format and codes uint8 [out,in] on it with no more error d H dᵀ, d = w − q, H damped, than
    those given.

    In each of at most ``rounds`` the scales, and the biases of asymmetric grids, are the least squares of weight on
    code under H, s = (w·Hq) / (q·Hq) where a row has but one, snapped; a row takes them only where it gains.
    Then ``descend`` makes ``passes`` over the codes. Ends early when no row takes new steps. One step for a whole
    tensor is refitted on all rows together.

    Raises what ``gptq`` raises.
    """
    gram = calibrated_gram(moments, weight.shape[1])
    target, hessian = damped_problem(weight, gram, damping)
    for _ in range(rounds):
        refitted = _better(target, grid, _fitted(target, grid, codes, hessian), codes, hessian)
        if np.array_equal(refitted.scales, grid.scales) and np.array_equal(refitted.biases, grid.biases):
            break
        grid = refitted
        codes = descend(target, grid, codes, hessian, passes=passes)
    return grid, codes


def _fitted(target: Array, grid: Grid, codes: Array, hessian: Array) -> Grid:
    """The grid on which ``codes`` come closest to ``target`` [out,in] under the ``hessian``, before anyone looks
    whether it is better.

    Each group of columns has a part [out,in] of its own to scale: its codes counted from the zero code where the format
    is symmetric, its codes and ones otherwise. The normal equations are in the products of parts under H.
    """
    rows, width = target.shape
    format, groups = grid.format, grid.scales.shape[1]
    if format.group == "tensor":
        normal, right = (part.sum(0, keepdims=True) for part in _normal_equations(target, codes, format, hessian))
        found = np.repeat(_solved(normal, right), rows, 0)
    else:
        size = max(1, CHUNK // (len(hessian) // format.columns(width)) ** 2)
        chunks = [slice(start, start + size) for start in range(0, rows, size)]
        found = np.concatenate(
            [_solved(*_normal_equations(target[some], codes[some], format, hessian)) for some in chunks]
        )
    scales = found[:, :groups]
    scales = np.where(scales > 0, scales, grid.scales)
    if format.symmetric:
        return Grid.symmetric(format, scales)
    scales = snap(scales, format)
    return Grid(format, scales, snap_biases(found[:, groups:], scales, format))


def _normal_equations(target: Array, codes: Array, format: WeightFormat, hessian: Array) -> tuple[Array, Array]:
    """By row the products of its parts with one another [rows,parts,parts] and with the target [rows,parts], under the
    Hessian.
    """
    rows, width = target.shape
    columns = format.columns(width)
    groups = width // columns
    values = codes.astype(hessian.dtype) - (format.zero_code if format.symmetric else 0)
    parts = [values] if format.symmetric else [values, np.ones_like(values)]
    count, split = len(parts) * groups, (rows, groups, columns)
    normal, right = np.zeros((rows, count, count)), np.zeros((rows, count))
    for p, part in enumerate(parts):
        for g in range(groups):
            here = slice(g * columns, (g + 1) * columns)
            pushed = part[:, here] @ hessian[here]
            right[:, p * groups + g] = np.einsum("oi,oi->o", pushed, target)
            for o, other in enumerate(parts):
                normal[:, p * groups + g, o * groups : (o + 1) * groups] = np.einsum(
                    "ogi,ogi->og", pushed.reshape(split), other.reshape(split)
                )
    return normal, right


def _solved(normal: Array, right: Array) -> Array:
    found: Array = np.einsum("oij,oj->oi", np.linalg.pinv(normal, hermitian=True), right)
    return found


def _better(target: Array, grid: Grid, other: Grid, codes: Array, hessian: Array) -> Grid:
    """``grid``, but in each row (a tensor's only step: in all) that of ``other`` where the codes leave less error on
    it.
    """
    ours, theirs = (energy(target - g.dequantize(codes), hessian) for g in (grid, other))
    if grid.format.group == "tensor":
        ours, theirs = (np.broadcast_to(v.sum(), v.shape) for v in (ours, theirs))
    gains = (theirs < ours)[:, None]
    return Grid(grid.format, np.where(gains, other.scales, grid.scales), np.where(gains, other.biases, grid.biases))
