"""Steps for the values that feedback makes of the weights: those values are what the codes were rounded from, and no
loss grows.
"""

from itertools import pairwise

import numpy as np
import pytest

from mlxquant.errors import CalibrationError
from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.weights.gptq import damped_problem, gptq, nearest_plane
from mlxquant.methods.weights.kron import kron, two_sided
from mlxquant.methods.weights.regrid import given, regrid
from mlxquant.methods.weights.rtn import rtn
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.cholesky import Factor
from mlxquant.numerics.moments import Moments

FORMATS = ["w2", "w3", "w4", "w4-asym", "w3-g32", "w4-tensor"]


def correlated(random, size):
    rows = random.standard_normal((4 * size, size)) @ random.standard_normal((size, size))
    return rows.T @ rows


def problem(text, height=24, width=64, seed=0):
    random = np.random.default_rng(seed)
    weight = random.standard_t(5, (height, width)) * 0.02
    plain, both = (Moments(correlated(random, width), width) for _ in range(2))
    both.outputs = correlated(random, height)
    return weight, WeightFormat.parse(text), plain, both


def damped(hessian, damping=0.01):
    return damped_problem(hessian[:1], hessian, damping)[1]


def losses(weight, grid, codes, moments):
    """d H dᵀ by row, or all of tr(H_O D H_I Dᵀ), damped, by their definition."""
    error = (weight - grid.dequantize(codes)).astype(np.float64)
    by_row = np.einsum("oi,ij,pj->op", error, damped(moments.gram), error)
    return np.diagonal(by_row) if moments.outputs is None else np.vdot(damped(moments.outputs, 0.05), by_row)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("both_sides", [False, True])
def test_codes_are_the_given_values_rounded(text, both_sides):
    weight, form, plain, both = problem(text)
    grid, inputs = extremes(weight, form), Factor.of(damped((both if both_sides else plain).gram))
    rows = Factor.of(damped(both.outputs, 0.05)) if both_sides else None
    codes = two_sided(weight, grid, inputs, rows)[0] if both_sides else nearest_plane(weight, grid, inputs)
    values = given(weight, weight - grid.dequantize(codes), inputs, rows)
    np.testing.assert_array_equal(rtn(values, grid), codes)
    assert np.abs(values - weight).max() > 0.1 * grid.scales.min()  # and they are not the weights'


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("steps", [extremes, search])
def test_no_loss_grows_and_more_rounds_are_no_worse(text, both_sides, steps):
    weight, form, plain, both = problem(text)
    moments, rounding = (both, kron) if both_sides else (plain, gptq)
    grid = steps(weight, form, moments)
    codes, found = rounding(weight, grid, moments), []
    for rounds in range(4):
        new, others = regrid(weight, grid, codes, moments, rounds=rounds)
        assert new.format == form
        assert others.dtype == np.uint8
        found.append(losses(weight, new, others, moments))
    np.testing.assert_allclose(found[0], losses(weight, grid, codes, moments))
    for before, after in pairwise(found):
        whole = text == "w4-tensor"
        assert ((after.sum() if whole else after) <= (before.sum() if whole else before) * (1 + 1e-6)).all()


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w2-g32"])
def test_it_is_worth_its_time(text):
    before, after = np.zeros(2), np.zeros(2)  # one-sided, two-sided
    for seed in range(3):
        weight, form, plain, both = problem(text, 48, 96, seed)
        for side, (moments, rounding) in enumerate(((plain, gptq), (both, kron))):
            grid = search(weight, form, moments)
            codes = rounding(weight, grid, moments)
            before[side] += losses(weight, grid, codes, moments).sum()
            after[side] += losses(weight, *regrid(weight, grid, codes, moments), moments).sum()
    assert after[0] < 0.9 * before[0]
    assert after[1] < before[1]


def test_outputs_that_do_not_meet_are_rows_for_themselves():
    weight, form, plain, _ = problem("w3")
    apart = Moments(plain.gram, plain.count)
    apart.outputs = np.diag(np.arange(1.0, len(weight) + 1))
    grid = extremes(weight, form)
    codes = gptq(weight, grid, plain)
    ours, theirs = (regrid(weight, grid, codes, moments) for moments in (apart, plain))
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[0].scales, theirs[0].scales)


def test_dead_columns_and_rows_of_zeros_stay_finite():
    weight, form, plain, _ = problem("w2")
    plain.gram[:, 3] = plain.gram[3] = 0
    weight[5] = 0
    grid = extremes(weight, form)
    new, codes = regrid(weight, grid, gptq(weight, grid, plain), plain)
    assert np.isfinite(new.scales).all()
    np.testing.assert_array_equal(new.dequantize(codes)[5], 0)


def test_without_moments_it_is_refused():
    weight, form, _, _ = problem("w4")
    grid = extremes(weight, form)
    with pytest.raises(CalibrationError):
        regrid(weight, grid, rtn(weight, grid), None)
