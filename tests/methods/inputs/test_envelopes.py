"""Upper envelopes against the exact solution, found by trying every set of points that the curve could touch."""

from itertools import combinations

import numpy as np
import pytest

from mlxquant.methods.inputs.envelopes import envelope, upper_envelope
from mlxquant.numerics.input_ranges import InputRanges


def exact(basis, y):
    """The nearest curve on or above y: least squares through the right set of points, float64."""
    size, best = basis.shape[1], None
    for count in range(size + 1):
        for touched in combinations(range(len(y)), count):
            rows = basis[list(touched)]
            system = np.block([[basis.T @ basis, rows.T], [rows, np.zeros((count, count))]])
            solution = np.linalg.lstsq(system, np.concatenate([basis.T @ y, y[list(touched)]]), rcond=None)[0]
            curve = basis @ solution[:size]
            if (curve >= y - 1e-9).all():
                distance = float(((curve - y) ** 2).sum())
                if best is None or distance < best[0]:
                    best = distance, curve
    return best[1]


def legendre(count, degree):
    return np.polynomial.legendre.legvander(np.linspace(-1, 1, count), degree)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_the_nearest_envelope_is_found(seed, degree):
    y = np.random.default_rng(seed).normal(size=8) * 10
    found = upper_envelope(legendre(8, degree), y)
    assert (found >= y).all()
    np.testing.assert_allclose(found, exact(legendre(8, degree), y), atol=1e-3)


def test_a_curve_that_can_be_met_is_met():
    basis = legendre(20, 4)
    y = basis @ np.array([3.0, -1, 0.5, 0.2, -2])
    np.testing.assert_allclose(upper_envelope(basis, y), y, atol=1e-9)


def test_least_squares_would_have_clipped():
    y = np.random.default_rng(0).normal(size=28)
    basis = legendre(28, 4)
    least_squares = basis @ np.linalg.lstsq(basis, y, rcond=None)[0]
    assert (least_squares < y).mean() > 0.3
    found = upper_envelope(basis, y)
    assert (found >= y).all()
    assert (found - y).max() < 2 * np.ptp(y)


def test_both_ends_are_covered_and_the_curves_are_smooth():
    rng = np.random.default_rng(0)
    sigma = np.linspace(0.02, 1, 28).astype(np.float32)
    least, most = -1 - rng.random((28, 4)), 2 + sigma[:, None] * 5 + rng.random((28, 4))
    table = envelope(InputRanges(sigma, least, most, least, most, np.zeros((28, 1, 4))), np.ones((2, 4)), 8)
    low, high = table.shift[:, 0] - 128 * table.step, table.shift[:, 0] + 127 * table.step
    assert (low <= least.min(1) + 1e-4).all()
    assert (high >= most.max(1) - 1e-4).all()
    assert np.abs(np.diff(high, 5)).max() < 1e-3  # of degree 4
