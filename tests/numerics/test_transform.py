"""Transforms as data: composed, and refused where they cannot be."""

import numpy as np
import pytest

from mlxquant.numerics.transform import Transform


def test_nothing_changes_nothing():
    x = np.arange(6.0).reshape(2, 3)
    assert Transform().nothing
    np.testing.assert_array_equal(Transform().inputs(x), x)
    np.testing.assert_array_equal(Transform().weight(x), x)


def test_order_of_the_parts():
    """Divided by the divisor of the channel, then put in order, then rotated."""
    x = np.array([[1.0, 2, 3, 4]])
    transform = Transform(divisor=np.array([1.0, 2, 3, 4]), order=np.array([3, 2, 1, 0]))
    np.testing.assert_array_equal(transform.inputs(x), [[1, 1, 1, 1]])
    np.testing.assert_array_equal(transform.weight(x), [[16, 9, 4, 1]])
    rotated = Transform(order=np.array([3, 2, 1, 0]), block=4).inputs(x)
    np.testing.assert_array_equal(rotated, (10 - 2 * x[:, ::-1]) / 2)


PARTS = {
    "nothing": Transform(),
    "divisor": Transform(divisor=np.array([1.0, 2, 4, 8, 16, 32, 64, 128])),
    "order": Transform(order=np.array([5, 0, 7, 1, 6, 2, 4, 3])),
    "both": Transform(divisor=np.array([3.0, 1, 2, 5, 4, 7, 6, 8]), order=np.array([1, 2, 3, 4, 5, 6, 7, 0])),
    "rotation": Transform(block=4),
    "all": Transform(divisor=np.array([3.0, 1, 2, 5, 4, 7, 6, 8]), order=np.array([1, 2, 3, 4, 5, 6, 7, 0]), block=4),
}


@pytest.mark.parametrize("second", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("first", PARTS.values(), ids=PARTS)
def test_two_as_one(first, second):
    x = np.random.default_rng(0).standard_normal((5, 8))
    if first.block > 1 and not second.nothing:
        with pytest.raises(ValueError, match="what was rotated"):
            first.then(second)
        return
    both = first.then(second)
    np.testing.assert_allclose(both.inputs(x), second.inputs(first.inputs(x)), rtol=1e-12)
    np.testing.assert_allclose(both.weight(x), second.weight(first.weight(x)), rtol=1e-12)


@pytest.mark.parametrize("transform", PARTS.values(), ids=PARTS)
def test_slopes_are_the_adjoint_of_what_is_written(transform):
    """g' · x' = g · x for every error of what is written, whether gradients are rows or a Hessian's."""
    random = np.random.default_rng(2)
    written, slopes = random.normal(size=(2, 5, 8))
    moved = transform.slopes(slopes)
    np.testing.assert_allclose((moved * transform.inputs(written)).sum(1), (slopes * written).sum(1), rtol=1e-12)
    undone = np.linalg.inv(transform.inputs(np.eye(8)))
    np.testing.assert_allclose(moved, slopes @ undone.T, rtol=1e-12)
    assert transform.nothing == (moved is slopes)


@pytest.mark.parametrize("transform", PARTS.values(), ids=PARTS)
def test_costs_are_of_the_errors_that_are_undone(transform):
    """An error in one transformed channel costs what it is in the channels themselves."""
    costs = np.random.default_rng(1).random((3, 8))
    undone = np.linalg.inv(transform.inputs(np.eye(8)))  # x' = x M, so e = e' M^-1; its rows are unit errors
    np.testing.assert_allclose(transform.costs(costs), costs @ np.square(undone).T, rtol=1e-12)
