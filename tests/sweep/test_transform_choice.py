"""Of the transforms that a method proposes a tensor gets the one with the least error, or stays as it is."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from dataclasses import replace

import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods import registry
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.numerics.transform import Place, Transform
from mlxquant.recipes.recipe import ActivationSpec, LayerSpec
from mlxquant.sweep.inputs import LayerInput
from mlxquant.sweep.transform_choice import Consumer, propose

SIZES = np.float32([1, 64])  # of the two channels; divided by these, both lie on a grid of 4 bits
X = np.arange(16, dtype=np.float32)[:, None] * SIZES


@pytest.fixture
def consumer():
    """Two outputs that copy two channels, at one noise level."""
    low, high = X.min(0)[None], X.max(0)[None]
    ranges = InputRanges(np.float32([0.5]), low, high, low, high, X[None])
    return Consumer(LayerInput(ranges, np.eye(2, dtype=np.float32)), LayerSpec(WeightFormat(8), ActivationSpec(4)))


@pytest.fixture
def proposed(monkeypatch):
    """Makes a method propose divisors; what it was given, ranges and weights, is the list."""

    def method(*divisors):
        given = []

        def function(ranges, weights, place):
            given.append((ranges, weights))
            return [Transform(np.float32(divisor)) for divisor in divisors]

        smoothquant = registry.get("transform", "smoothquant")
        monkeypatch.setitem(registry._METHODS, ("transform", "smoothquant"), replace(smoothquant, function=function))
        return given

    return method


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_proposal_that_puts_all_channels_on_the_grid_is_chosen(consumer, proposed, order):
    divisors = [(1, 8), SIZES, (1, 4096)]
    proposed(*(divisors[index] for index in order))
    found = propose("smoothquant", [consumer], Place(), Transform())
    np.testing.assert_array_equal(found.transform.divisor, SIZES)
    assert found.after == pytest.approx(0, abs=1e-7)
    assert found.before > 1e-4


def test_a_tensor_stays_as_it_is_where_nothing_is_better(consumer, proposed):
    current = Transform(SIZES)
    given = proposed((1, 8), (64, 1))
    found = propose("smoothquant", [consumer], Place(), current)
    assert found.transform is current
    assert found.after == found.before == pytest.approx(0, abs=1e-7)
    (ranges, weights), *_ = given  # the method looks at the tensor as it is now
    np.testing.assert_array_equal(ranges.rows[0], X / SIZES)
    np.testing.assert_array_equal(weights[0], np.diag(SIZES))
