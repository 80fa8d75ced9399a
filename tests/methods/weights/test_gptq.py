"""GPTQ against an independent textbook implementation, and its identity."""

import gc
import tracemalloc

import numpy as np
import pytest

from mlxquant.errors import CalibrationError, NumericsError
from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.weights.gptq import damped_problem, gptq, nearest_plane
from mlxquant.methods.weights.rtn import rtn
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.cholesky import Factor
from mlxquant.numerics.moments import Moments, energy


@pytest.fixture
def layer():
    """A weight [12,64] and 300 correlated inputs with outlier channels."""
    random = np.random.default_rng(0)
    weight = random.standard_t(5, (12, 64)) * 0.02
    inputs = random.standard_normal((300, 64)) @ random.standard_normal((64, 64))
    inputs[:, [3, 40]] *= 15
    return weight, Moments.of(inputs)


def textbook(weight, grid, hessian):
    """Algorithm 1 of the paper, one column at a time, in float64: codes and Σ e² [out]."""
    width = weight.shape[1]
    scales, biases = (
        np.broadcast_to(grid.expand(v.astype(np.float64), width), weight.shape) for v in (grid.scales, grid.biases)
    )
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    remaining, codes, losses = weight[:, order].copy(), np.empty(weight.shape, np.uint8), np.zeros(len(weight))
    for i, column in enumerate(order):
        scale, bias = scales[:, column], biases[:, column]
        codes[:, column] = np.clip(np.rint((remaining[:, i] - bias) / scale), 0, grid.format.levels - 1)
        error = (remaining[:, i] - (codes[:, column] * scale + bias)) / upper[i, i]
        remaining[:, i:] -= np.outer(error, upper[i, i:])
        losses += error**2
    return codes, losses


def exact(grid, codes):
    """The dequantized weight in float64."""
    return codes * grid.expand(grid.scales.astype(np.float64), codes.shape[1]) + grid.expand(
        grid.biases, codes.shape[1]
    )


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w4-asym", "w4-g32", "w3-g64-sym", "w4-tensor", "w8"])
@pytest.mark.parametrize("damping", [1e-3, 0.01, 0.1])
def test_codes_and_identity_of_the_textbook(layer, text, damping):
    weight, moments = layer
    grid = search(weight, WeightFormat.parse(text), moments)
    target, hessian = damped_problem(weight, moments.gram, damping)
    np.testing.assert_allclose(hessian, moments.gram + damping * np.diagonal(moments.gram).mean() * np.eye(64))
    codes = nearest_plane(target, grid, Factor.of(hessian))
    expected, losses = textbook(weight, grid, hessian)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(energy(weight - exact(grid, codes), hessian), losses, rtol=1e-10)


@pytest.mark.parametrize("text", ["w2", "w4", "w4-asym", "w4-g32", "w8"])
def test_float32_moments_cost_nothing(layer, text):
    weight, exact = layer
    moments = Moments(exact.gram.astype(np.float32), exact.count)
    grid = search(weight, WeightFormat.parse(text), exact)
    error, reference = (
        energy(weight - grid.dequantize(gptq(weight.astype(m.gram.dtype), grid, m)), exact.gram)
        for m in (moments, exact)
    )
    assert error.sum() < 1.01 * reference.sum()
    nearest = energy(weight - grid.dequantize(rtn(weight, grid)), exact.gram)
    assert (error <= nearest * (1 + 1e-5)).all()


def test_float32_survives_inputs_far_from_zero_and_outliers():
    random = np.random.default_rng(3)
    weight = random.standard_normal((12, 96))
    inputs = (random.standard_normal((60, 96)) + 100 * random.standard_normal(96)).astype(np.float32)
    inputs[:, :2] *= 1000
    exact, moments = Moments.of(inputs.astype(np.float64)), Moments.of(inputs)
    grid = search(weight, WeightFormat(4), exact)
    error, reference = (
        energy(weight - grid.dequantize(gptq(weight, grid, m)), exact.gram).sum() for m in (moments, exact)
    )
    assert error < 1.05 * reference


def test_memory_is_that_of_less_than_three_matrices():
    random = np.random.default_rng(0)
    weight, moments = (
        random.standard_normal((16, 1024)).astype(np.float32),
        Moments.of(random.standard_normal((64, 1024), np.float32)),
    )
    grid = extremes(weight, WeightFormat(4))
    assert moments.gram.dtype == np.float32
    gc.disable()
    try:
        tracemalloc.start()
        gptq(weight, grid, moments)
        left, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    finally:
        gc.enable()
    assert peak + moments.gram.nbytes < 2.6 * 1024**2 * 8
    assert left < 0.1 * moments.gram.nbytes  # nothing waits for the garbage collector


def test_it_earns_its_keep(layer):
    weight, moments = layer
    grid = extremes(weight, WeightFormat(4))
    error, baseline = (
        energy(weight - grid.dequantize(f(weight, grid, moments)), moments.gram).sum() for f in (gptq, rtn)
    )
    assert error < 0.2 * baseline


def test_rows_that_gptq_would_spoil_are_rounded_to_nearest():
    # hardly correlated inputs: little to gain, and the luck of each row decides
    random = np.random.default_rng(0)
    weight, moments = random.standard_normal((100, 32)), Moments.of(random.standard_normal((2500, 32)))
    grid, damping = extremes(weight, WeightFormat(3)), 0.01
    target, hessian = damped_problem(weight, moments.gram, damping)
    raw, nearest = nearest_plane(target, grid, Factor.of(hessian)), rtn(weight, grid)
    loss = {name: energy(weight - grid.dequantize(c), moments.gram) for name, c in (("raw", raw), ("nearest", nearest))}
    codes = gptq(weight, grid, moments, damping=damping)
    worse = loss["raw"] > loss["nearest"]
    assert worse.any()
    assert not worse.all()
    np.testing.assert_array_equal(codes, np.where(worse[:, None], nearest, raw))


def test_dead_columns_go_to_zero_and_leave_the_others_alone(layer):
    weight, moments = layer
    dead = [0, 17, 63]
    gram = moments.gram.copy()
    gram[dead], gram[:, dead] = 0, 0
    grid = extremes(weight, WeightFormat(4))
    codes = gptq(weight, grid, Moments(gram, moments.count))
    assert (grid.dequantize(codes)[:, dead] == 0).all()
    live = np.setdiff1d(np.arange(64), dead)
    # the mean of the diagonal is over all columns; keep the damping the same
    alone = gptq(weight[:, live], grid, Moments(gram[np.ix_(live, live)], moments.count), damping=0.01 * len(live) / 64)
    np.testing.assert_array_equal(codes[:, live], alone)


def test_an_input_that_is_always_zero_gives_a_zero_weight(layer):
    weight, _ = layer
    grid = extremes(weight, WeightFormat(4))
    assert (grid.dequantize(gptq(weight, grid, Moments(np.zeros((64, 64)), 5))) == 0).all()


def test_a_singular_hessian_needs_damping():
    weight = np.random.default_rng(0).standard_normal((4, 16))
    gram = np.ones((16, 16))
    gram[0, 1] = gram[1, 0] = 1.5
    grid = extremes(weight, WeightFormat(4))
    with pytest.raises(NumericsError, match="more damping"):
        gptq(weight, grid, Moments(gram, 1), damping=0.0)
    assert gptq(weight, grid, Moments.of(np.ones((1, 16)))).shape == (4, 16)


def test_it_does_not_run_uncalibrated(layer):
    weight, _ = layer
    with pytest.raises(CalibrationError, match="calibrate first"):
        gptq(weight, extremes(weight, WeightFormat(4)), None)
