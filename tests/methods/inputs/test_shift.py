"""The post-GELU shift and migration: exact without rounding, better with it where channels differ, and as the layer
runs it.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.methods.inputs.clipping import average, extremes
from mlxquant.methods.inputs.shift import centred, migration, shifted
from mlxquant.methods.inputs.tiers import quantized, relative_errors
from mlxquant.numerics.transform import Transform
from mlxquant.sweep.collecting import InputStatistics

WEIGHT = np.random.default_rng(9).normal(size=(8, 128)).astype(np.float32)


def collect(offset, stretch=1.0, levels=(0.2, 0.9)):
    """Inputs whose channels lie around ``offset`` [in] and reach ``stretch`` [in] from there."""
    rng = np.random.default_rng(0)
    statistics = InputStatistics(nn.Linear(128, 1), rows=64)
    for i, sigma in enumerate(levels):
        x = rng.uniform(-1, 1, (4, 40, 128)) * stretch * (i + 1) + offset * (i + 1)
        statistics.add((mx.array(x.astype(np.float32)),), sigma)
    return statistics.ranges


def centres(ranges):
    return (ranges.least + ranges.most) / 2


def test_the_whole_transform_preserves_the_function():
    rng = np.random.default_rng(0)
    x, w, b = rng.normal(size=(20, 64)), rng.normal(size=(16, 64)), rng.normal(size=16)
    s, m = rng.normal(size=64), rng.integers(1, 9, 64).astype(np.float64)
    y = ((x - s) / m) @ (w @ np.diag(m)).T + (b + w @ s)
    np.testing.assert_allclose(y, x @ w.T + b, rtol=1e-12, atol=1e-12)


def test_shifting_moves_every_range():
    ranges = collect(np.linspace(-5, 5, 128))
    moved = shifted(ranges, centres(ranges))
    np.testing.assert_allclose(moved.least, -moved.most, atol=1e-5)
    np.testing.assert_allclose(moved.low, ranges.low - centres(ranges))
    np.testing.assert_allclose(moved.rows[1], ranges.rows[1] - centres(ranges)[1])


def test_a_shift_shrinks_the_step_of_channels_that_lie_apart():
    ranges = collect(np.linspace(-5, 5, 128))
    plain, table = extremes(ranges, WEIGHT, 8), centred(ranges, centres(ranges), WEIGHT, 8)
    assert table.shift.shape == (2, 128)
    assert (table.step < plain.step / 5).all()
    assert (relative_errors(ranges, WEIGHT, table) < relative_errors(ranges, WEIGHT, plain) / 4).all()


def test_a_shifted_range_clips_nothing_and_uses_all_codes():
    ranges = collect(np.linspace(-5, 5, 128))
    table = centred(ranges, centres(ranges), WEIGHT, 8)
    for t in range(2):
        assert np.rint((ranges.most[t] - table.shift[t]) / table.step[t]).max() == 127
        assert np.rint((ranges.least[t] - table.shift[t]) / table.step[t]).min() == -128
        assert np.abs(quantized(table, t, ranges.rows[t]) - ranges.rows[t]).max() <= table.step[t] * 0.501


def test_any_range_method_can_span_the_shifted_input():
    ranges = collect(np.linspace(-5, 5, 128))
    s = centres(ranges)
    expected = average(shifted(ranges, s), WEIGHT, 6)
    table = centred(ranges, s, WEIGHT, 6, average)
    np.testing.assert_array_equal(table.step, expected.step)
    np.testing.assert_allclose(table.shift, expected.shift + s, rtol=1e-6)


def test_migration_is_for_outlier_channels_alone_and_an_integer():
    stretch = np.ones(128)
    stretch[7] = 6.0
    ranges = collect(np.zeros(128), stretch)
    m = migration(ranges, centres(ranges))
    assert m.dtype == np.float32
    assert m[7] == 6
    np.testing.assert_array_equal(np.delete(m, 7), 1)


def test_migration_looks_at_all_timesteps():
    early = np.ones(128)
    ranges = collect(np.zeros(128), early)
    ranges.most[0, 3], ranges.least[0, 3] = (
        20.0,
        -20.0,
    )  # an outlier at the first timestep only; others reach 2 at the second
    assert migration(ranges, centres(ranges))[3] == 10


def test_dead_and_equal_channels_need_no_migration():
    for stretch in (np.zeros(128), np.ones(128), np.eye(128)[0]):
        ranges = collect(np.zeros(128), stretch)
        np.testing.assert_array_equal(migration(ranges, np.zeros((2, 128), np.float32)), 1)


def test_the_layer_runs_the_transform_as_the_paper_writes_it():
    stretch = np.ones(128)
    stretch[[7, 30]] = 6.0, 3.0
    ranges = collect(np.linspace(-1, 1, 128), stretch)
    s, m = centres(ranges), migration(ranges, centres(ranges))
    transformed = WEIGHT * m
    table = centred(Transform(m).ranges(ranges), s / m, transformed, 8)
    grid, clock = fit_extremes(transformed, WeightFormat(8)), Clock()
    codes, bias = grid.quantize(transformed), np.linspace(-1, 1, 8).astype(np.float32)
    layer = QuantizedLinear(codes, grid, mx.array(bias), mx.array(m))
    layer.set_activations(table, clock)
    with clock.at(0.9):
        y = np.array(layer(mx.array(ranges.rows[1])))
    w_m, x = grid.dequantize(codes).astype(np.float64), ranges.rows[1].astype(np.float64)
    offset = table.shift[1] - s[1] / m  # of the affine grid, one number for all channels
    np.testing.assert_allclose(offset, offset[0], atol=1e-5)
    q = np.clip(np.rint(((x - s[1]) / m - offset) / table.step[1]), -128, 127)
    np.testing.assert_allclose(y, (q * table.step[1] + offset) @ w_m.T + bias + (w_m / m) @ s[1], rtol=1e-3, atol=1e-3)
    exact = x @ WEIGHT.T + bias
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)
