"""The corrected target: the optimum it claims to be, the identity that lets any rounder inherit it, and bounded
memory.
"""

import gc
import tracemalloc

import numpy as np
import pytest

from mlxquant.errors import CalibrationError, NumericsError
from mlxquant.methods.weights.correction import corrected_target
from mlxquant.numerics.moments import Moments, excess, shortfall


@pytest.fixture
def problem():
    """A weight [5,24], X and X~ [100,24], and their moments."""
    random = np.random.default_rng(0)
    weight, exact = (
        random.standard_normal((5, 24)),
        random.standard_normal((100, 24)) @ random.standard_normal((24, 24)),
    )
    seen = exact + 0.3 * random.standard_normal(exact.shape)
    moments = Moments.empty(24, np.float64)
    moments.add(seen, exact)
    return weight, exact, seen, moments


@pytest.mark.parametrize("given", [(), (1e-9,), (1e-3,), (0.5,)])
def test_it_is_the_ridge_regression_of_the_exact_output(problem, given):
    weight, exact, seen, moments = problem
    (damping,) = given or (1e-3,)
    ridge = np.sqrt(damping * np.diagonal(moments.gram).mean()) * np.eye(24)
    expected = np.linalg.lstsq(np.vstack([seen, ridge]), np.vstack([exact, ridge]) @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(corrected_target(weight, moments, *given), expected, rtol=1e-8, atol=1e-10)


def test_the_error_splits_into_what_cannot_be_met_and_the_distance_from_the_target(problem):
    weight, exact, seen, moments = problem
    target = corrected_target(weight, moments, 0.0)
    other = weight + np.random.default_rng(1).standard_normal(weight.shape)
    whole = np.square(exact @ weight.T - seen @ other.T).sum()
    parts = np.square(exact @ weight.T - seen @ target.T).sum() + np.square(seen @ (target - other).T).sum()
    assert whole == pytest.approx(parts, rel=1e-12)


def test_the_excess_is_what_replacing_the_weight_adds(problem):
    weight, exact, seen, moments = problem
    other = weight + 0.1 * np.random.default_rng(1).standard_normal(weight.shape)
    before, after = (np.square(exact @ weight.T - seen @ w.T).sum(0) for w in (weight, other))
    np.testing.assert_allclose(
        excess(weight - other, moments.gram, shortfall(weight, moments)), after - before, rtol=1e-10, atol=1e-9
    )


def test_the_same_inputs_leave_the_weight_alone(problem):
    weight, _, _, moments = problem
    same = Moments(moments.gram, moments.count, moments.gram.copy())
    np.testing.assert_array_equal(corrected_target(weight, same), weight)


def test_dead_columns_keep_their_weights(problem):
    weight, exact, seen, _ = problem
    seen[:, [2, 9]] = 0
    moments = Moments.empty(24, np.float64)
    moments.add(seen, exact)
    target, live = corrected_target(weight, moments), np.setdiff1d(np.arange(24), [2, 9])
    np.testing.assert_array_equal(target[:, [2, 9]], weight[:, [2, 9]])
    # the others make up for what no longer comes through them
    assert (
        np.square(exact @ weight.T - seen @ target.T).sum() < 0.5 * np.square(exact @ weight.T - seen @ weight.T).sum()
    )
    assert np.isfinite(target[:, live]).all()


def test_it_needs_both_streams_and_a_regular_hessian(problem):
    weight, exact, seen, moments = problem
    with pytest.raises(CalibrationError, match="cross"):
        corrected_target(weight, Moments(moments.gram, moments.count))
    few = Moments.empty(24, np.float64)
    few.add(seen[:5], exact[:5])
    few.gram[0, 0] = few.gram[1, 0] / 10
    with pytest.raises(NumericsError, match="more damping"):
        corrected_target(weight, few, 0.0)


def test_memory_is_that_of_less_than_three_gram_matrices():
    random = np.random.default_rng(0)
    weight, moments = random.standard_normal((16, 1024)).astype(np.float32), Moments.empty(1024)
    moments.add(*(random.standard_normal((2, 64, 1024), np.float32)))
    assert np.isfinite(moments.gram).all()
    gc.disable()
    try:
        tracemalloc.start()
        target = corrected_target(weight, moments)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    finally:
        gc.enable()
    assert target.dtype == np.float32
    # the factor is allocated whole in float64 and touched by half: two gram matrices that take the room of one
    assert peak < 4.2 * moments.gram.nbytes
