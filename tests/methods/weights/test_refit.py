"""Refitted steps: least squares as NumPy has it, and less error than a search alone leaves."""

import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.weights.descent import gptq_descent
from mlxquant.methods.weights.gptq import damped_problem, nearest_plane
from mlxquant.methods.weights.refit import refit
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.cholesky import Factor
from mlxquant.numerics.moments import Moments, energy


def layer(rows=12, width=64):
    random = np.random.default_rng(0)
    weight = random.standard_t(5, (rows, width)) * 0.02
    inputs = random.standard_normal((300, width)) @ random.standard_normal((width, width))
    return weight, inputs, Moments.of(inputs)


def features(format, codes, columns):
    """What each scale, then each bias, of a row multiplies: [parts, in]."""
    groups = len(codes) // columns
    places = np.repeat(np.eye(groups), columns, axis=1)
    if format.symmetric:
        return places * (codes.astype(float) - format.zero_code)
    return np.vstack([places * codes, places])


@pytest.mark.parametrize("text", ["w2", "w4", "w4-asym", "w4-g32", "w4-g32-sym"])
def test_one_round_is_least_squares_of_the_outputs(text):
    weight, inputs, moments = layer()
    format = WeightFormat.parse(text)
    grid = extremes(weight, format)  # far from what suits the codes
    codes = grid.quantize(weight)
    refined, same = refit(weight, grid, codes, moments, damping=0.0, rounds=1, passes=0)
    np.testing.assert_array_equal(same, codes)
    count = grid.scales.shape[1]
    for row in range(len(weight)):
        design = inputs @ features(format, codes[row], 64 // count).T
        best = np.linalg.lstsq(design, inputs @ weight[row], rcond=None)[0]
        np.testing.assert_allclose(refined.scales[row], best[:count], rtol=1e-3)  # float16
        if not format.symmetric:
            np.testing.assert_allclose(refined.biases[row], best[count:], rtol=1e-3, atol=1e-5)


def test_the_step_of_a_tensor_is_that_of_all_rows_together():
    weight, inputs, moments = layer()
    grid = extremes(weight, WeightFormat(3, "tensor"))
    codes = grid.quantize(weight)
    refined, _ = refit(weight, grid, codes, moments, damping=0.0, rounds=1, passes=0)
    outputs, units = inputs @ weight.T, inputs @ (codes.astype(float) - 4).T
    np.testing.assert_allclose(refined.scales, (outputs * units).sum() / (units * units).sum(), rtol=1e-3)


@pytest.mark.parametrize("text", ["w2", "w3", "w4-g32", "w3-asym"])
def test_it_betters_descent_and_more_rounds_are_no_worse(text):
    weight, _, moments = layer(rows=40)
    grid = search(weight, WeightFormat.parse(text), moments)
    codes = gptq_descent(weight, grid, moments)
    target, hessian = damped_problem(weight, moments.gram, 0.01)
    errors = [energy(target - grid.dequantize(codes), hessian)]
    for rounds in (1, 2, 4):
        refined, found = refit(weight, grid, codes, moments, rounds=rounds)
        errors.append(energy(target - refined.dequantize(found), hessian))
        assert (errors[-1] <= errors[-2] * (1 + 1e-6)).all()
    assert errors[-1].sum() < 0.99 * errors[0].sum()


def test_it_does_not_matter_how_the_codes_were_found():
    weight, _, moments = layer()
    grid = search(weight, WeightFormat(3), moments)
    target, hessian = damped_problem(weight, moments.gram, 0.01)
    for codes in (
        nearest_plane(target, grid, Factor.of(hessian)),
        grid.quantize(weight),
        np.full(weight.shape, 3, np.uint8),
    ):
        refined, found = refit(weight, grid, codes, moments)
        assert (
            energy(target - refined.dequantize(found), hessian) < energy(target - grid.dequantize(codes), hessian)
        ).all()


@pytest.mark.parametrize("text", ["w4", "w4-g32", "w4-tensor"])
def test_rows_are_solved_a_few_at_a_time_with_the_same_result(text, monkeypatch):
    weight, _, moments = layer()
    grid = extremes(weight, WeightFormat.parse(text))
    whole = refit(weight, grid, grid.quantize(weight), moments)
    monkeypatch.setattr("mlxquant.methods.weights.refit.CHUNK", 3)
    few = refit(weight, grid, grid.quantize(weight), moments)
    np.testing.assert_array_equal(few[0].scales, whole[0].scales)
    np.testing.assert_array_equal(few[1], whole[1])


@pytest.mark.parametrize("text", ["w4-asym", "w4-g32", "w3-tensor-asym"])
def test_a_row_keeps_its_steps_where_a_fit_is_worse(text):
    """Codes that fall where the weight rises: least squares wants negative steps, which no grid has, and the biases
    that go with them are far off.
    """
    weight, _, moments = layer()
    grid = extremes(weight, WeightFormat.parse(text))
    codes = (grid.format.levels - 1 - grid.quantize(weight)).astype(np.uint8)
    target, hessian = damped_problem(weight, moments.gram, 0.01)
    refined, same = refit(weight, grid, codes, moments, rounds=1, passes=0)
    np.testing.assert_array_equal(same, codes)
    before, after = (energy(target - g.dequantize(codes), hessian) for g in (grid, refined))
    rows = [slice(None)] if grid.format.group == "tensor" else list(range(len(weight)))
    for row in rows:
        assert after[row].sum() <= before[row].sum() * (1 + 1e-6)
    assert (refined.scales == grid.scales).all()
