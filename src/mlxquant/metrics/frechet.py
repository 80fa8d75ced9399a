"""The Fréchet distance between two sets of features, each taken as a Gaussian (FID: arXiv 1706.08500, eq. 6).

``d² = |m₁−m₂|² + tr C₁ + tr C₂ − 2 tr (C₁C₂)^½``. The last trace is the sum of the singular values of ``F₁F₂ᵀ`` where
``C = FᵀF``, so no matrix square root is taken: SciPy's ``sqrtm`` of a product, which the public codes use, becomes
complex or singular where there are fewer pictures than features, and this does not. The factors come from QR or, for
given covariances, from an eigendecomposition, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """A set of N features of width D: ``mean`` [D] and ``factor`` [R,D], R ≤ D, with ``factorᵀ factor`` the unbiased
    covariance.
    """

    mean: Matrix
    factor: Matrix

    @classmethod
    def of(cls, features: npt.ArrayLike) -> Gaussian:
        """Fitted to features [N,D], N ≥ 2; NumericsError on fewer, or on values that are not finite."""
        x = _checked(features)
        if len(x) < 2:
            raise NumericsError("fréchet distance: a covariance needs at least two pictures, found one")
        mean = x.mean(axis=0)
        factor = (x - mean) / np.sqrt(len(x) - 1)
        return cls(mean, np.asarray(np.linalg.qr(factor, mode="r")) if len(factor) > factor.shape[1] else factor)

    @classmethod
    def from_covariance(cls, mean: npt.ArrayLike, covariance: npt.ArrayLike) -> Gaussian:
        """From mean [D] and covariance [D,D], such as the ``mu`` and ``sigma`` of pytorch-fid's statistics files."""
        m, c = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
        if m.ndim != 1 or c.shape != (m.size, m.size) or not (np.isfinite(m).all() and np.isfinite(c).all()):
            raise NumericsError(
                f"fréchet distance: expected a finite mean [D] and covariance [D,D], found {m.shape} and {c.shape}"
            )
        values, vectors = np.linalg.eigh((c + c.T) / 2)
        return cls(m, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def _checked(features: npt.ArrayLike) -> Matrix:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
        raise NumericsError(f"fréchet distance: expected finite features [N,D], found shape {x.shape}")
    return x


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared distance, as FID reports it, never below 0; NumericsError when the two have other widths."""
    if a.mean.shape != b.mean.shape:
        raise NumericsError(f"fréchet distance: features of {a.mean.size} and {b.mean.size} numbers do not compare")
    overlap = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + (a.factor**2).sum() + (b.factor**2).sum() - 2 * overlap
    return max(float(distance), 0.0)
