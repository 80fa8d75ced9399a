"""Tier rules and the errors they measure, against plain float64 arithmetic."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.methods.inputs.clipping import extremes
from mlxquant.methods.inputs.tiers import (
    OutputErrors,
    error,
    lowered,
    mixed,
    quantized,
    relative_errors,
    rms,
    threshold,
)
from mlxquant.numerics.input_ranges import InputRanges


def ranges_of(*rows):
    """Ranges whose rows [R,in], one array a timestep, are all that was seen."""
    x = np.stack(rows).astype(np.float32)
    low, high = x.min(1), x.max(1)
    return InputRanges(np.linspace(0.1, 0.9, len(x)).astype(np.float32), low, high, low, high, x)


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def tables(ranges, weight):
    return {bits: extremes(ranges, weight, bits) for bits in (4, 6, 8)}


def noise(ranges, weight, table, t):
    """What a table makes of the outputs at timestep t, [R,out] float64, and the exact outputs."""
    x, edge = ranges.rows[t].astype(np.float64), 2.0 ** (int(table.bits[t]) - 1)
    codes = np.clip(np.rint((x - table.shift[t]) / table.step[t]), -edge, edge - 1)
    return (codes * table.step[t] + table.shift[t] - x) @ weight.T.astype(np.float64), x @ weight.T.astype(np.float64)


def test_errors_match_float64():
    ranges, weight = ranges_of(normal(30, 24), normal(30, 24, seed=1, scale=3)), normal(12, 24, seed=2)
    costs = np.random.default_rng(3).random((2, 12))
    for table in tables(ranges, weight).values():
        weighed, plain, people = (
            OutputErrors(ranges, weight, costs)(table),
            OutputErrors(ranges, weight)(table),
            relative_errors(ranges, weight, table),
        )
        for t in range(2):
            wrong, exact = noise(ranges, weight, table, t)
            np.testing.assert_allclose(weighed[t], (wrong**2).mean(0) @ costs[t], rtol=2e-3)
            np.testing.assert_allclose(plain[t], (wrong**2).sum() / (exact**2).sum(), rtol=2e-3)
            np.testing.assert_allclose(people[t], np.linalg.norm(wrong) / np.linalg.norm(exact), rtol=2e-3)


def test_errors_with_a_rounded_weight_are_those_of_the_layer_that_runs():
    ranges, weight = ranges_of(normal(30, 32)), normal(12, 32, seed=2)
    grid, table = fit_extremes(weight, WeightFormat(4)), extremes(ranges, weight, 6)
    codes, clock = grid.quantize(weight), Clock()
    layer = QuantizedLinear(codes, grid)
    layer.set_activations(table, clock)
    with clock.at(float(ranges.sigma[0])):
        y = np.array(layer(mx.array(ranges.rows[0])))
    exact, costs = ranges.rows[0] @ weight.T, np.linspace(0, 2, 12)[None]
    rounded = grid.dequantize(codes)
    relative = np.linalg.norm(y - exact) ** 2 / np.linalg.norm(exact) ** 2
    np.testing.assert_allclose(OutputErrors(ranges, weight)(table, rounded), relative, rtol=1e-4)
    np.testing.assert_allclose(
        OutputErrors(ranges, weight, costs)(table, rounded), ((y - exact) ** 2).mean(0) @ costs[0], rtol=1e-4
    )


def test_an_output_of_zero_is_no_division_by_zero():
    ranges, weight = ranges_of(normal(5, 4)), np.zeros((3, 4), np.float32)
    assert OutputErrors(ranges, weight)(extremes(ranges, weight, 4)) == 0


def test_outputs_that_cost_nothing_need_no_bits_and_dear_ones_more():
    ranges, weight = ranges_of(normal(40, 16), normal(40, 16, seed=1)), normal(8, 16, seed=2)
    choices, measured = tables(ranges, weight), OutputErrors(ranges, weight, np.ones((2, 8)))
    budget = float(measured(choices[6]).max())
    ones = np.ones((2, 1)) * np.ones(8)
    for factors, expected in (((0, 0), [4, 4]), ((1, 1), [6, 6]), ((100, 1), [8, 6]), ((1, 0), [6, 4])):
        costs = ones * np.array(factors)[:, None]
        np.testing.assert_array_equal(error(ranges, weight, choices, costs, budget=budget * 1.01), expected)


def test_an_error_counts_at_the_output_where_it_is():
    """The first input channel makes the error, and only the first output reads it."""
    x = normal(40, 2)
    x[:, 0] *= 100
    x[:, 1] = np.rint(x[:, 1])
    ranges, weight = ranges_of(x), np.eye(2, dtype=np.float32)
    table = extremes(ranges, weight, 8)
    first, second = (OutputErrors(ranges, weight, np.eye(2)[[o]])(table)[0] for o in range(2))
    wrong, _ = noise(ranges, weight, table, 0)
    np.testing.assert_allclose([first, second], (wrong**2).mean(0), rtol=1e-3)
    assert abs(first - second) > 0.01 * first


def test_thresholds_are_at_six_and_ten():
    def bits(peak):
        ranges = ranges_of(np.linspace(-peak, peak, 20).reshape(5, 4))
        return int(threshold(ranges, None, tables(ranges, None))[0])

    assert [bits(p) for p in (5.99, 6.0, 9.99, 10.0)] == [4, 6, 6, 8]


def test_heavy_tails_get_eight_bits_whatever_their_sign():
    x = normal(50, 8, scale=0.01)
    x[:, 0] = -3.0
    ranges = ranges_of(x)
    assert threshold(ranges, None, tables(ranges, None)) == 8
    assert threshold(ranges, None, tables(ranges, None), outlier_ratio=1e6) == 4


def test_the_error_rule_takes_the_fewest_bits_within_the_budget():
    ranges, weight = ranges_of(normal(40, 16), normal(40, 16, seed=1)), normal(16, 16, seed=2)
    choices = tables(ranges, weight)
    measured = {bits: OutputErrors(ranges, weight)(table) for bits, table in choices.items()}
    assert measured[4].min() > measured[6].max() > measured[8].max()
    for budget, expected in ((measured[4].max(), 4), (measured[6].max(), 6), (measured[8].min() / 2, 8)):
        np.testing.assert_array_equal(error(ranges, weight, choices, budget=budget), expected)


def test_what_the_weight_ignores_does_not_count():
    x = normal(40, 16)
    x[:, 3] *= 1e3
    weight = normal(8, 16, seed=1)
    ranges = ranges_of(x)
    assert error(ranges, weight, tables(ranges, weight), budget=0.05**2) == 6  # the outlier channel is the output
    weight[:, 3] = 0
    assert (
        error(ranges, weight, tables(ranges, weight), budget=0.05**2) == 8
    )  # and now the step that it needs is all there is


def test_scaling_input_against_weight_changes_a_threshold_and_no_error():
    ranges, weight = ranges_of(normal(40, 16)), normal(8, 16, seed=1)
    larger = ranges_of(ranges.rows[0] * 4)
    assert threshold(ranges, weight, tables(ranges, weight)) < threshold(larger, weight / 4, tables(larger, weight))
    errors = [OutputErrors(r, w)(extremes(r, w, 6)) for r, w in ((ranges, weight), (larger, weight / 4))]
    np.testing.assert_allclose(*errors, rtol=1e-4)


def test_mixed_tables_broadcast_shifts_and_refuse_unknown_tiers():
    sigma, one = np.array([0.1, 0.9], np.float32), np.ones(2, np.float32)
    narrow = ActivationTable(sigma, one, np.ones((2, 1), np.float32), np.full(2, 4, np.uint8))
    wide = ActivationTable(sigma, 2 * one, np.arange(6, dtype=np.float32).reshape(2, 3), np.full(2, 8, np.uint8))
    table = mixed({4: narrow, 8: wide}, np.array([8, 4]))
    np.testing.assert_array_equal(table.shift, [[0, 1, 2], [1, 1, 1]])
    np.testing.assert_array_equal(table.step, [2, 1])
    with pytest.raises(ValueError, match="6 is not in list"):
        mixed({4: narrow, 8: wide}, np.array([6, 6]))


def test_logarithmic_entries_stay_logarithmic_among_others():
    x = np.abs(normal(3, 40, 16))
    ranges, (sigma, one, low) = ranges_of(*x), (np.float32([0.1, 0.5, 0.9]), np.ones(3, np.float32), np.zeros((3, 1)))
    log = ActivationTable(sigma, 4 * one, low.astype(np.float32), np.full(3, 4, np.uint8), np.ones(3, bool))
    choices, bits = {4: log, 8: extremes(ranges, None, 8)}, np.array([8, 4, 8])
    table = mixed(choices, bits)
    for t, tier in enumerate(bits):
        np.testing.assert_array_equal(quantized(table, t, x[t]), quantized(choices[tier], t, x[t]))


def test_small_helpers():
    np.testing.assert_array_equal(lowered(np.array([8, 6, 4], np.uint8)), [6, 4, 4])
    assert rms(np.array([3.0, 4.0])) == pytest.approx(np.sqrt(12.5))


def test_quantized_values_lie_on_the_grid():
    ranges = ranges_of(normal(40, 16))
    table = extremes(ranges, None, 4)
    assert len(np.unique(quantized(table, 0, ranges.rows[0]))) <= 16
