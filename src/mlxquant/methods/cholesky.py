"""Cholesky factors of large matrices, in place: NumPy's own keeps two more copies and leaves cores idle.

The matrix is halved until its pieces are small, and nearly all of the work becomes products of large pieces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SMALL = 128  # up to here LAPACK factorizes and inverts; below, products are too small to pay
PANEL = 512  # of a symmetric product both triangles are computed inside pieces of this width, one outside


def factorize(matrix: Array) -> None:
    """Write L, L Lᵀ = ``matrix`` [n,n] floating, over the lower triangle; only that is read, and what is left above it means nothing.

    Raises numpy.linalg.LinAlgError when the matrix is not positive definite, and leaves it half done.
    """
    if len(matrix) <= SMALL:
        matrix[:] = np.linalg.cholesky(matrix)
        return
    half = len(matrix) // 2
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    factorize(first)
    _solve(first, below)
    _subtract_square(last, below)
    factorize(last)


def _solve(factor: Array, rows: Array) -> None:
    """Replace ``rows`` B [m,n] by X with X Lᵀ = B, L the [n,n] that ``factorize`` left: its smallest pieces are zero above the diagonal.

    Those are inverted: a product takes a third of the time of a solution, and costs no digits unless a piece is itself near singular.
    """
    if len(factor) <= SMALL:
        rows[:] = rows @ np.linalg.inv(factor).T
        return
    half = len(factor) // 2
    first, last = rows[:, :half], rows[:, half:]
    _solve(factor[:half, :half], first)
    last -= first @ factor[half:, :half].T
    _solve(factor[half:, half:], last)


def _subtract_square(matrix: Array, rows: Array) -> None:
    """Subtract X Xᵀ, X = ``rows`` [n,m], from the lower triangle of ``matrix`` [n,n]."""
    if len(matrix) <= PANEL:
        matrix -= rows @ rows.T
        return
    half = len(matrix) // 2
    _subtract_square(matrix[:half, :half], rows[:half])
    matrix[half:, :half] -= rows[half:] @ rows[:half].T
    _subtract_square(matrix[half:, half:], rows[half:])
