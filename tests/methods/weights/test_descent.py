"""Coordinate descent: monotone, stops where no single change helps, near the optimum where that can be enumerated."""

import itertools

import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.weights.descent import descend, gptq_descent
from mlxquant.methods.weights.gptq import damped_problem, gptq, nearest_plane
from mlxquant.methods.weights.rtn import rtn
from mlxquant.methods.weights.steps import search
from mlxquant.numerics.cholesky import Factor
from mlxquant.numerics.moments import Moments, energy


def layer(rows, width, seed=0):
    random = np.random.default_rng(seed)
    weight = random.standard_t(5, (rows, width)) * 0.02
    return weight, Moments.of(random.standard_normal((4 * width, width)) @ random.standard_normal((width, width)))


@pytest.mark.parametrize("text", ["w2", "w4", "w4-g32", "w4-tensor"])
def test_every_pass_lowers_every_row_or_leaves_it(text):
    weight, moments = layer(20, 96)
    grid = search(weight, WeightFormat.parse(text), moments)
    codes = rtn(weight, grid)
    losses = [energy(weight - grid.dequantize(codes), moments.gram)]
    for _ in range(5):
        given = codes.copy()
        codes = descend(weight, grid, codes, moments.gram, passes=1, block=32)
        losses.append(energy(weight - grid.dequantize(codes), moments.gram))
        assert (losses[-1] <= losses[-2] * (1 + 1e-6)).all()
        np.testing.assert_array_equal(descend(weight, grid, given, moments.gram, passes=1, block=7), codes)
    assert losses[-1].sum() < 0.8 * losses[0].sum()


def test_it_ends_where_no_single_code_can_be_changed_for_the_better():
    weight, moments = layer(6, 24)
    grid = search(weight, WeightFormat(3), moments)
    codes = descend(weight, grid, rtn(weight, grid), moments.gram, passes=100)
    ended = energy(weight - grid.dequantize(codes), moments.gram)
    for column, code in itertools.product(range(24), range(8)):
        other = codes.copy()
        other[:, column] = code
        assert (energy(weight - grid.dequantize(other), moments.gram) >= ended * (1 - 1e-6)).all()


def test_the_codes_given_are_not_changed():
    weight, moments = layer(1, 32)
    grid = search(weight, WeightFormat(2), moments)
    codes = rtn(weight, grid)
    given = codes.copy()
    assert (descend(weight, grid, codes, moments.gram) != given).any()
    np.testing.assert_array_equal(codes, given)


def test_columns_without_a_hessian_keep_their_codes():
    weight, moments = layer(8, 32)
    gram = moments.gram.copy()
    gram[[4, 9]], gram[:, [4, 9]] = 0, 0
    grid = search(weight, WeightFormat(3), moments)
    codes = np.full(weight.shape, 5, np.uint8)
    found = descend(weight, grid, codes, gram)
    assert (found[:, [4, 9]] == 5).all()
    assert (found != 5).any()


def test_it_starts_from_gptq_and_improves_it():
    weight, moments = layer(40, 128)
    grid = search(weight, WeightFormat(3), moments)
    target, hessian = damped_problem(weight, moments.gram, 0.01)
    before = energy(weight - grid.dequantize(nearest_plane(target, grid, Factor.of(hessian))), hessian)
    after = energy(weight - grid.dequantize(gptq_descent(weight, grid, moments)), hessian)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.95 * before.sum()


def test_near_the_optimum_by_brute_force():
    codes = np.array(list(itertools.product(range(4), repeat=6)), np.uint8)
    best, found = [], {rtn: [], gptq: [], gptq_descent: []}
    for seed in range(8):
        weight, moments = layer(8, 6, seed)
        grid = search(weight, WeightFormat(2), moments)
        steps = zip(weight, grid.scales[:, 0], grid.biases[:, 0], strict=True)
        best.append([energy(w - (codes * np.float64(s) + b), moments.gram).min() for w, s, b in steps])
        for method, losses in found.items():
            losses.append(energy(weight - grid.dequantize(method(weight, grid, moments)), moments.gram))
    excess = {method: np.sum(losses) / np.sum(best) - 1 for method, losses in found.items()}
    for losses in found.values():
        assert (np.array(losses) >= np.array(best) * (1 - 1e-5)).all()
    assert excess[gptq_descent] < excess[gptq] < excess[rtn]
    assert excess[gptq_descent] < 0.35
    assert np.isclose(found[gptq_descent], best, rtol=1e-5).mean() > 0.5


def test_it_ends_where_no_code_can_be_changed_for_the_better_on_the_damped_hessian():
    """And not on the plain one, which trusts these few tokens more."""
    weight, moments = layer(6, 24)
    grid = search(weight, WeightFormat(3), moments)
    codes = gptq_descent(weight, grid, moments, damping=1.0, passes=100)
    _, hessian = damped_problem(weight, moments.gram, 1.0)
    improved = {"damped": 0, "plain": 0}
    for name, gram in (("damped", hessian), ("plain", moments.gram)):
        ended = energy(weight - grid.dequantize(codes), gram)
        for column, code in itertools.product(range(24), range(8)):
            other = codes.copy()
            other[:, column] = code
            improved[name] += int((energy(weight - grid.dequantize(other), gram) < ended * (1 - 1e-6)).sum())
    assert improved["damped"] == 0
    assert improved["plain"] > 0
