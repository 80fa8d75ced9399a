"""Cholesky factors of large matrices, in place: NumPy's own keeps two more copies and leaves cores idle.

The matrix is halved until its pieces are small, and nearly all of the work becomes products of large pieces.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from ..errors import NumericsError
from .arrays import Array

SMALL = 128  # up to here LAPACK factorizes and inverts; below, products are too small to pay
PANEL = 512  # of a symmetric product both triangles are computed inside pieces of this width, one outside
ROWS = 512  # rows solved for at a time


@dataclass(frozen=True)
class Factor:
    """``H[order][:, order] = L Lᵀ`` with ``lower`` L float64 [n,n], whatever the precision of H: inputs that hardly
    differ leave it little to divide by. What is above L's diagonal means nothing. ``order`` [n] is by ascending
    diagonal: who goes first is last.
    """

    order: Array
    lower: Array

    @classmethod
    def of(cls, hessian: Array, diagonal: Array | None = None) -> Factor:
        """The factor of a ``hessian`` [n,n], or of one with this ``diagonal`` [n] in place of its own, which spares a
        copy of it; raises NumericsError when that is not positive definite.
        """
        width, diagonal = len(hessian), np.diagonal(hessian) if diagonal is None else diagonal
        order = np.argsort(diagonal, kind="stable")
        lower = _half_used(width)
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            lower[start:stop, :stop] = hessian.take(order[start:stop], 0).take(order[:stop], 1)
        np.fill_diagonal(lower, diagonal[order])
        try:
            factorize(lower)
        except np.linalg.LinAlgError as error:
            raise NumericsError(
                f"the Hessian of {width} inputs is not positive definite; use more damping (0.01 is usual) or more"
                " calibration tokens"
            ) from error
        return cls(order, lower)

    def solve(self, rows: Array) -> Array:
        """X [m,n] with X H = ``rows`` [m,n], in the precision of those."""
        found = np.empty_like(rows)
        for start in range(0, len(rows), ROWS):
            some = slice(start, start + ROWS)
            ordered = rows[some].take(self.order, 1).astype(np.float64)
            solve_transposed(self.lower, ordered)
            solve_lower(self.lower, ordered)
            found[some][:, self.order] = ordered
        return found


def _half_used(width: int) -> Array:
    """Zeros float64 [width,width]. What is never written takes no memory; in huge pages, which NumPy asks Linux for,
    both halves would.
    """
    if not width or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros((width, width))
    pages = mmap.mmap(-1, 8 * width * width)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float64).reshape(width, width)


def factorize(matrix: Array) -> None:
    """Write L, L Lᵀ = ``matrix`` [n,n] floating, over the lower triangle; only that is read, and what is left above it
    means nothing.

    Raises numpy.linalg.LinAlgError when the matrix is not positive definite, and leaves it half done.
    """
    if len(matrix) <= SMALL:
        matrix[:] = np.linalg.cholesky(matrix)
        return
    half = len(matrix) // 2
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    factorize(first)
    solve_transposed(first, below)
    _subtract_square(last, below)
    factorize(last)


def solve_transposed(factor: Array, rows: Array) -> None:
    """Replace ``rows`` B [m,n] by X with X Lᵀ = B, L the [n,n] that ``factorize`` left: its smallest pieces are zero
    above the diagonal.

    Those are inverted: a product takes a third of the time of a solution, and costs no digits unless a piece is itself
    near singular.
    """
    if len(factor) <= SMALL:
        rows[:] = rows @ np.linalg.inv(factor).T
        return
    half = len(factor) // 2
    first, last = rows[:, :half], rows[:, half:]
    solve_transposed(factor[:half, :half], first)
    last -= first @ factor[half:, :half].T
    solve_transposed(factor[half:, half:], last)


def solve_lower(factor: Array, rows: Array) -> None:
    """Replace ``rows`` B [m,n] by X with X L = B, L the [n,n] that ``factorize`` left."""
    if len(factor) <= SMALL:
        rows[:] = rows @ np.linalg.inv(factor)
        return
    half = len(factor) // 2
    first, last = rows[:, :half], rows[:, half:]
    solve_lower(factor[half:, half:], last)
    first -= last @ factor[half:, :half]
    solve_lower(factor[:half, :half], first)


def _subtract_square(matrix: Array, rows: Array) -> None:
    """Subtract X Xᵀ, X = ``rows`` [n,m], from the lower triangle of ``matrix`` [n,n]."""
    if len(matrix) <= PANEL:
        matrix -= rows @ rows.T
        return
    half = len(matrix) // 2
    _subtract_square(matrix[:half, :half], rows[:half])
    matrix[half:, :half] -= rows[half:] @ rows[:half].T
    _subtract_square(matrix[half:, half:], rows[half:])
