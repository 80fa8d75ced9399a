"""Tier rules and the errors they measure, against plain float64 arithmetic."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.activations import ActivationTable
from mlxquant.formats import WeightFormat, fit_extremes
from mlxquant.layers import QuantizedLinear
from mlxquant.methods.ranges import extremes
from mlxquant.methods.tiers import combined_errors, error, lowered, mixed, output_errors, quantized, rms, threshold
from mlxquant.schedule import Clock
from mlxquant.statistics import InputRanges


def ranges_of(*rows):
    """Ranges whose rows [R,in], one array a timestep, are all that was seen."""
    x = np.stack(rows).astype(np.float32)
    low, high = x.min(1), x.max(1)
    return InputRanges(np.linspace(0.1, 0.9, len(x)).astype(np.float32), low, high, low, high, x)


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def tables(ranges, weight):
    return {bits: extremes(ranges, weight, bits) for bits in (4, 6, 8)}


@pytest.mark.parametrize("out", [4, 400])  # through the weight, through the gram matrix
def test_output_errors_match_float64(out):
    ranges, weight = ranges_of(normal(30, 24), normal(30, 24, seed=1, scale=3)), normal(out, 24, seed=2)
    for bits, table in tables(ranges, weight).items():
        found = output_errors(ranges, weight, table)
        for t, x in enumerate(ranges.rows.astype(np.float64)):
            codes = np.clip(np.rint((x - table.shift[t]) / table.step[t]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            noise = (codes * table.step[t] + table.shift[t] - x) @ weight.T.astype(np.float64)
            np.testing.assert_allclose(found[t], np.linalg.norm(noise) / np.linalg.norm(x @ weight.T.astype(np.float64)), rtol=2e-3)


def test_combined_errors_are_those_of_the_layer_that_runs():
    ranges, weight = ranges_of(normal(30, 32)), normal(12, 32, seed=2)
    grid, table = fit_extremes(weight, WeightFormat(4)), extremes(ranges, weight, 6)
    codes, clock = grid.quantize(weight), Clock()
    layer = QuantizedLinear(codes, grid)
    layer.set_activations(table, clock)
    with clock.at(float(ranges.sigma[0])):
        y = np.array(layer(mx.array(ranges.rows[0])))
    exact = ranges.rows[0] @ weight.T
    found = combined_errors(ranges, weight, grid.dequantize(codes), table)
    np.testing.assert_allclose(found, np.linalg.norm(y - exact) / np.linalg.norm(exact), rtol=1e-4)


def test_an_output_of_zero_is_no_division_by_zero():
    ranges, weight = ranges_of(normal(5, 4)), np.zeros((3, 4), np.float32)
    assert output_errors(ranges, weight, extremes(ranges, weight, 4)) == 0


def test_thresholds_are_the_seeds():
    def bits(peak):
        return int(threshold(ranges_of(np.linspace(-peak, peak, 20).reshape(5, 4)), None, {})[0])

    assert [bits(p) for p in (5.99, 6.0, 9.99, 10.0)] == [4, 6, 6, 8]


def test_heavy_tails_get_eight_bits_whatever_their_sign():
    x = normal(50, 8, scale=0.01)
    x[:, 0] = -3.0
    assert threshold(ranges_of(x), None, {}) == 8
    assert threshold(ranges_of(x), None, {}, outlier_ratio=1e6) == 4


def test_the_error_rule_takes_the_fewest_bits_within_the_budget():
    ranges, weight = ranges_of(normal(40, 16), normal(40, 16, seed=1)), normal(16, 16, seed=2)
    choices = tables(ranges, weight)
    measured = {bits: output_errors(ranges, weight, table) for bits, table in choices.items()}
    assert measured[4].min() > measured[6].max() > measured[8].max()
    for budget, expected in ((measured[4].max(), 4), (measured[6].max(), 6), (measured[8].min() / 2, 8)):
        np.testing.assert_array_equal(error(ranges, weight, choices, budget=budget), expected)


def test_what_the_weight_ignores_does_not_count():
    x = normal(40, 16)
    x[:, 3] *= 1e3
    weight = normal(8, 16, seed=1)
    ranges = ranges_of(x)
    assert error(ranges, weight, tables(ranges, weight), budget=0.05) == 6  # the outlier channel is the output
    weight[:, 3] = 0
    assert error(ranges, weight, tables(ranges, weight), budget=0.05) == 8  # and now the step that it needs is all there is


def test_scaling_input_against_weight_changes_a_threshold_and_no_error():
    ranges, weight = ranges_of(normal(40, 16)), normal(8, 16, seed=1)
    larger = ranges_of(ranges.rows[0] * 4)
    assert threshold(ranges, weight, {}) < threshold(larger, weight / 4, {})
    errors = [output_errors(r, w, extremes(r, w, 6)) for r, w in ((ranges, weight), (larger, weight / 4))]
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


def test_small_helpers():
    np.testing.assert_array_equal(lowered(np.array([8, 6, 4], np.uint8)), [6, 4, 4])
    assert rms(np.array([3.0, 4.0])) == pytest.approx(np.sqrt(12.5))


def test_quantized_values_lie_on_the_grid():
    ranges = ranges_of(normal(40, 16))
    table = extremes(ranges, None, 4)
    assert len(np.unique(quantized(table, 0, ranges.rows[0]))) <= 16
