"""SmoothQuant's divisor: its endpoints, its scale, and channels that have nothing to trade."""

import numpy as np
import pytest

from mlxquant.methods.transforms.smoothquant import candidate, divisor, peaks, spike
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.numerics.transform import Transform


def data(width=40, seed=0):
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(size=width)).astype(np.float32), [
        rng.normal(size=(n, width)).astype(np.float32) for n in (8, 3)
    ]


def columns(weights):
    return np.max([np.abs(w).max(0) for w in weights], axis=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_divisor_is_the_papers_up_to_one_factor(alpha):
    inputs, weights = data()
    found = divisor(inputs, weights, alpha)
    ratio = found / (inputs.astype(np.float64) ** alpha / columns(weights) ** (1 - alpha))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert found.dtype == np.float32
    assert np.log(found).mean() == pytest.approx(0, abs=1e-5)


def test_at_one_the_inputs_become_even_and_at_zero_the_weights():
    inputs, weights = data()
    np.testing.assert_allclose(np.ptp(inputs / divisor(inputs, weights, 1.0)), 0, atol=1e-5)
    np.testing.assert_allclose(np.ptp(columns(weights) * divisor(inputs, weights, 0.0)), 0, atol=1e-5)


def test_the_function_is_preserved():
    inputs, (weight, _) = data()
    x, d = np.random.default_rng(1).normal(size=(9, 40)) * inputs, divisor(inputs, [weight]).astype(np.float64)
    np.testing.assert_allclose((x / d) @ (weight * d).T, x @ weight.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_are_left_alone_and_move_nobody_else(alpha):
    inputs, weights = data()
    alive = divisor(inputs[2:], [w[:, 2:] for w in weights], alpha)
    inputs[0] = 0
    for weight in weights:
        weight[:, 1] = 0
    found = divisor(inputs, weights, alpha)
    np.testing.assert_array_equal(found[:2], 1)
    np.testing.assert_allclose(found[2:], alive, rtol=1e-6)
    np.testing.assert_array_equal(divisor(np.zeros(4, np.float32), [np.zeros((2, 4), np.float32)], alpha), 1)


def test_nearly_dead_channels_stay_within_bounds():
    inputs, weights = data()
    inputs[0] = 1e-38
    assert divisor(inputs, weights, 1.0)[0] == pytest.approx(1e-4)


@pytest.mark.parametrize("width", [32, 192, 1536])
def test_a_lone_spike_is_a_candidate_at_any_width(width):
    channels = np.ones(width)
    assert not candidate(channels)
    channels[5] = 4.9
    assert not candidate(channels)
    channels[5] = 5.1
    assert candidate(channels)
    assert spike(channels) == (pytest.approx(5.1), 1 / width)


def test_many_large_channels_are_no_spike():
    channels = np.ones(100)
    channels[:4] = 50  # the 99th percentile is one of them
    assert not candidate(channels)
    few = np.array([1.0] * 9 + [50.0])  # one of ten is no small share
    assert spike(few) == (50, 0.1)
    assert not candidate(few)


def test_dead_channels_do_not_make_a_spike():
    channels = np.zeros(100)
    assert spike(channels) == (1, 0)
    channels[:50] = 1
    channels[0] = 4
    assert spike(channels) == (4, 0.02)
    assert not candidate(channels)


def test_dividing_ranges():
    least, most = np.array([[-2.0, -1.0], [0.0, -3.0]]), np.array([[1.0, 4.0], [6.0, 1.0]])
    rows = np.arange(8.0).reshape(2, 2, 2)
    ranges = InputRanges(np.array([0.1, 0.9]), least / 2, most / 2, least, most, rows)
    np.testing.assert_array_equal(peaks(ranges), [6, 4])
    half = Transform(np.array([2.0, 4.0])).ranges(ranges)
    np.testing.assert_array_equal(peaks(half), [3, 1])
    np.testing.assert_array_equal(half.rows[0], rows[0] / [2, 4])
    np.testing.assert_array_equal(half.low, least / 2 / [2, 4])
