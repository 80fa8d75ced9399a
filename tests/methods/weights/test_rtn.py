"""Rounding to nearest, a few rows at a time, and the guard that falls back on it."""

import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.weights.rtn import ROWS, better_rows, rtn
from mlxquant.methods.weights.steps import extremes


@pytest.mark.parametrize("text", ["w4", "w3-asym", "w4-g32", "w8-tensor"])
@pytest.mark.parametrize("rows", [ROWS - 1, ROWS, 3 * ROWS + 5])
def test_every_row_is_rounded_on_its_own_grid(text, rows):
    weight = np.random.default_rng(0).normal(size=(rows, 64)) * np.geomspace(0.01, 10, rows)[:, None]
    grid = extremes(weight, WeightFormat.parse(text))
    scales, biases = (grid.expand(v, 64).astype(np.float64) for v in (grid.scales, grid.biases))
    places = np.clip((weight - biases) / scales, 0, grid.format.levels - 1)
    assert np.abs(rtn(weight, grid) - places).max() <= 0.5 + 1e-9


def test_the_better_of_two_is_taken_row_by_row():
    """By their outputs on tokens: of the second row the codes are worse than nearest, of the others better."""
    random = np.random.default_rng(1)
    weight, inputs = random.normal(size=(3, 32)), random.normal(size=(99, 32)) @ random.normal(size=(32, 32))
    grid = extremes(weight, WeightFormat(2))
    nearest = rtn(weight, grid)
    many = random.integers(0, 4, (20_000, 3, 32)).astype(np.uint8)
    many = np.where(random.random(many.shape) < 0.05, many, nearest)
    losses = np.array([np.square(inputs @ (weight - grid.dequantize(codes)).T).sum(0) for codes in many])
    codes = np.stack([many[losses[:, row].argmin(), row] for row in range(3)])
    codes[1] = many[losses[:, 1].argmax(), 1]
    found = better_rows(weight, grid, codes, nearest, inputs.T @ inputs)
    np.testing.assert_array_equal(found, [codes[0], nearest[1], codes[2]])
