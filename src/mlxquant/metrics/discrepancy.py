"""Maximum mean discrepancies between two sets of features: KID on Inception's, CMMD on CLIP's.

``MMD² = E k(x,x') + E k(y,y') − 2 E k(x,y)`` (Gretton et al., JMLR 13, 2012, eq. 2 to 5). Unlike FID they assume no
Gaussian, and KID's estimate does not depend on the sample size, only its spread does. float64; kernels are summed in
strips, so that memory stays small.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError

Matrix = npt.NDArray[np.float64]
STRIP = 1024  # rows of a kernel matrix at a time
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0


def _checked(features: npt.ArrayLike, reference: npt.ArrayLike, metric: str) -> tuple[Matrix, Matrix]:
    x, y = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or 0 in x.shape or 0 in y.shape or x.shape[1] != y.shape[1]:
        raise NumericsError(
            f"{metric}: expected two sets of features [N,D] of equal width, found {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NumericsError(f"{metric}: a feature is NaN or infinite")
    return x, y


def _total(kernel: Callable[[Matrix, Matrix], Matrix], x: Matrix, y: Matrix) -> float:
    """The sum of ``k(x_i, y_j)``."""
    return float(sum(kernel(x[i : i + STRIP], y).sum() for i in range(0, len(x), STRIP)))


def _cubic(x: Matrix, y: Matrix) -> Matrix:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _unbiased(x: Matrix, y: Matrix) -> float:
    """KID of one pair of subsets of equal size n: pairs of a feature with itself do not count."""
    n = len(x)
    own = sum(_total(_cubic, z, z) - float((((z * z).sum(axis=1) / z.shape[1] + 1) ** 3).sum()) for z in (x, y))
    return own / (n * (n - 1)) - 2 * _total(_cubic, x, y) / n**2


def kid(
    features: npt.ArrayLike, reference: npt.ArrayLike, subsets: int = 100, size: int = 1000, seed: int = 0
) -> float:
    """Kernel Inception distance of features [N,D] to reference features [M,D], N, M ≥ 2 (arXiv 1801.01401, section 4).

    The mean of the unbiased estimate, with the kernel ``(x·y/D + 1)³``, over ``subsets`` draws of ``min(N, M, size)``
    features each, without replacement, as clean-fid and torch-fidelity have it; when that is all of both sets, there is
    one draw. It may be slightly negative. Not multiplied by 1000.
    """
    x, y = _checked(features, reference, "kid")
    n = min(len(x), len(y), size)
    if n < 2:
        raise NumericsError("kid: an unbiased estimate needs at least two pictures a set, found one")
    if n == len(x) == len(y):
        return _unbiased(x, y)
    rng = np.random.default_rng(seed)
    draws = [
        _unbiased(x[rng.choice(len(x), n, replace=False)], y[rng.choice(len(y), n, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(draws))


def _gaussian(x: Matrix, y: Matrix) -> Matrix:
    squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None, :] - 2 * (x @ y.T)
    return np.asarray(np.exp(np.maximum(squares, 0) / (-2 * CMMD_SIGMA**2)))


def cmmd(embeddings: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """CLIP-MMD of unit-norm embeddings [N,D] to reference embeddings [M,D] (arXiv 2401.09603, eq. 4), times 1000.

    A Gaussian kernel of fixed width 10, and, as in the published code, the biased estimate, in which pairs of an
    embedding with itself count: it is never negative, and a set is at 0 from itself.
    """
    x, y = _checked(embeddings, reference, "cmmd")
    terms = [_total(_gaussian, a, b) / (len(a) * len(b)) for a, b in ((x, x), (y, y), (x, y))]
    return max(CMMD_SCALE * (terms[0] + terms[1] - 2 * terms[2]), 0.0)
