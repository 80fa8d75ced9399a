"""The Fréchet distance against cases with a known answer, and against the eigenvalues of the product of covariances."""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.metrics.frechet import Gaussian, frechet_distance

RNG = np.random.default_rng(0)


def reference_distance(x, y):
    """tr (C₁C₂)^½ as the sum of the roots of the product's eigenvalues."""
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(c1 @ c2).real, 0))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * roots.sum()


@pytest.mark.parametrize("samples", [(300, 300), (300, 12), (9, 12), (2, 300)])
def test_float64_reference(samples):
    """Also with fewer pictures than features, where covariances are singular."""
    x, y = (RNG.standard_normal((n, 16)) @ RNG.standard_normal((16, 16)) + RNG.standard_normal(16) for n in samples)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(reference_distance(x, y), rel=1e-6)


def test_diagonal_covariances():
    a, b = (
        Gaussian.from_covariance(np.full(3, mean), np.diag(np.square(deviations)))
        for mean, deviations in ((0, [1, 2, 3]), (1, [2, 2, 0]))
    )
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 9)


def test_a_set_is_at_nothing_from_itself_in_any_order():
    x = RNG.standard_normal((40, 64))
    assert frechet_distance(Gaussian.of(x), Gaussian.of(x[::-1])) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(x + 1)) == pytest.approx(64)


def test_covariance_and_features_say_the_same():
    x, y = RNG.standard_normal((50, 8)), 2 * RNG.standard_normal((50, 8))
    given = [Gaussian.from_covariance(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)]
    assert frechet_distance(*given) == pytest.approx(frechet_distance(Gaussian.of(x), Gaussian.of(y)))


def test_symmetry_and_single_precision():
    x, y = (RNG.standard_normal((30, 6)).astype(np.float32) for _ in range(2))
    a, b = Gaussian.of(x), Gaussian.of(y)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_what_has_no_distance_is_refused():
    with pytest.raises(NumericsError, match="at least two pictures, found one"):
        Gaussian.of(np.ones((1, 4)))
    for features in (np.ones(4), np.ones((0, 4)), np.full((3, 4), np.nan)):
        with pytest.raises(NumericsError, match="finite features"):
            Gaussian.of(features)
    with pytest.raises(NumericsError, match="mean"):
        Gaussian.from_covariance(np.ones(4), np.ones((3, 3)))
    with pytest.raises(NumericsError, match="4 and 5 numbers"):
        frechet_distance(Gaussian.of(RNG.random((6, 4))), Gaussian.of(RNG.random((6, 5))))
