"""Choosing the grid: never worse than the extremes, better where it can be, and near the best there is."""

import numpy as np
import pytest

from mlxquant.grids.weights import Grid, WeightFormat, fit_extremes
from mlxquant.methods.weights import steps
from mlxquant.methods.weights.steps import extremes, mse, search
from mlxquant.numerics.moments import Moments


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_t(4, (32, 128)).astype(np.float32) * 0.02


@pytest.fixture
def moments():
    power = np.random.default_rng(1).pareto(1.5, 128) + 0.01
    return Moments(np.diag(power), 256)


def loss(weight, grid, power):
    """[out], the weighted squared error of round-to-nearest, in float64."""
    quantized = grid.dequantize(grid.quantize(weight.astype(np.float64)))
    return (weight.astype(np.float64) - quantized) ** 2 @ power


def test_extremes_is_the_grid_of_formats(weight):
    format = WeightFormat(4)
    np.testing.assert_array_equal(extremes(weight, format).scales, fit_extremes(weight, format).scales)


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w4-asym", "w4-g32", "w4-g64-sym", "w4-tensor", "w8"])
def test_a_search_lowers_its_own_error(weight, moments, text):
    format = WeightFormat.parse(text)
    widest = fit_extremes(weight, format)
    for find, power in ((mse, np.ones(128)), (search, np.diagonal(moments.gram))):
        before, after = loss(weight, widest, power), loss(weight, find(weight, format, moments), power)
        if format.group == "tensor":
            before, after = before.sum(), after.sum()
        assert (after <= before * (1 + 1e-5)).all()
        if (
            format.bits <= 4 and format.group != "tensor"
        ):  # one step for all hangs on the few loudest weights, near the extremes
            assert after.sum() < 0.95 * before.sum()


def test_search_beats_mse_where_it_is_measured_and_only_there(weight, moments):
    format, power = WeightFormat(3), np.diagonal(moments.gram)
    plain, weighted = mse(weight, format), search(weight, format, moments)
    assert loss(weight, weighted, power).sum() < loss(weight, plain, power).sum()
    assert loss(weight, weighted, np.ones(128)).sum() > loss(weight, plain, np.ones(128)).sum()


def test_search_finds_nearly_the_best_symmetric_step(weight, moments):
    format, power = WeightFormat(3), np.diagonal(moments.gram)
    found = loss(weight, search(weight, format, moments), power)
    widest = fit_extremes(weight, format).scales
    best = np.min(
        [loss(weight, Grid.symmetric(format, widest * f), power) for f in np.linspace(0.05, 1.2, 2000)], axis=0
    )
    assert found.sum() < 1.03 * best.sum()


def test_without_moments_search_is_mse(weight):
    format = WeightFormat.parse("w4-g32")
    np.testing.assert_array_equal(search(weight, format, None).scales, mse(weight, format).scales)


@pytest.mark.parametrize("text", ["w4", "w4-asym", "w4-g32"])
def test_a_grid_that_fits_exactly_is_kept(text):
    format = WeightFormat.parse(text)
    lowest = 1 if format.symmetric else 0
    codes = np.random.default_rng(2).integers(lowest, 16, (6, 64))
    codes[:, ::32], codes[:, 1::32] = lowest, 15
    scales = np.full((6, 64 // format.columns(64)), 2.0**-6, np.float32)
    grid = Grid(format, scales, -format.zero_code * scales)
    weight = grid.dequantize(codes)
    found = mse(weight, format)
    np.testing.assert_array_equal(found.dequantize(found.quantize(weight)), weight)


def test_rows_and_chunks_do_not_meet(weight, monkeypatch):
    whole = mse(weight, WeightFormat.parse("w4-g32"))
    monkeypatch.setattr("mlxquant.methods.weights.steps.CHUNK", 300)
    pieces = mse(weight, WeightFormat.parse("w4-g32"))
    np.testing.assert_array_equal(pieces.scales, whole.scales)
    np.testing.assert_array_equal(pieces.biases, whole.biases)


def test_channels_that_never_fire_do_not_matter(weight):
    power = np.ones(128)
    power[64:] = 0
    loud = weight.copy()
    loud[:, 64:] *= 8
    format = WeightFormat(4)
    found = search(loud, format, Moments(np.diag(power), 10))
    assert loss(loud, found, power).sum() < 0.1 * loss(loud, fit_extremes(loud, format), power).sum()


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w4-asym", "w4-g32", "w8"])
def test_stopping_early_changes_nothing(text, monkeypatch):
    weight = np.random.default_rng(3).standard_t(4, (100, 32))  # few columns: errors rise and fall as the grid narrows
    monkeypatch.setattr(steps, "CHUNK", 1)
    found, offer = mse(weight, WeightFormat.parse(text)), steps._Best.offer

    def never(self, scales, biases):
        offer(self, scales, biases)
        return np.float32(-np.inf)

    monkeypatch.setattr(steps._Best, "offer", never)
    whole = mse(weight, WeightFormat.parse(text))
    np.testing.assert_array_equal(found.scales, whole.scales)
    np.testing.assert_array_equal(found.biases, whole.biases)
