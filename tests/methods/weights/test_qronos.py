"""Qronos: its two forms agree, it is GPTQ where nothing has been lost, and it wins where something has."""

import numpy as np
import pytest

from mlxquant.grids.weights import Grid, WeightFormat
from mlxquant.methods.weights.correction import corrected_target
from mlxquant.methods.weights.gptaq import gptaq
from mlxquant.methods.weights.gptq import gptq
from mlxquant.methods.weights.qronos import base_form, qronos
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.moments import Moments

TEXTS = ["w2", "w3", "w4", "w4-asym", "w4-g32", "w4-tensor", "w8"]


def inputs(width=64, tokens=400, loss=0.15, seed=0):
    """X and X~ [tokens,width]: what the full-precision model's inputs have become."""
    random = np.random.default_rng(seed)
    exact = random.standard_normal((tokens, width)) @ random.standard_normal((width, width))
    exact[:, [3, width * 5 // 8]] *= 15
    return exact, exact + loss * random.standard_normal((tokens, width)) * exact.std(0) + 0.1 * exact[:, ::-1]


def streams(exact, seen):
    moments = Moments.empty(exact.shape[1], np.float64)
    moments.add(seen, exact)
    return moments


def weight_of(width=64, rows=12):
    return np.random.default_rng(1).standard_t(5, (rows, width)) * 0.02


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 0.1])
def test_the_efficient_form_gives_the_codes_of_the_base_form(text, damping):
    weight, moments = weight_of(), streams(*inputs())
    grid = search(weight, WeightFormat.parse(text), moments)
    codes = qronos(weight, grid, moments, damping=damping)
    np.testing.assert_array_equal(codes, base_form(weight, grid, moments, damping=damping))
    assert (codes != gptq(weight, grid, moments, damping=damping)).any()


@pytest.mark.parametrize("text", ["w2", "w3", "w4", "w4-asym", "w4-tensor", "w8"])
def test_the_base_form_is_that_of_the_paper(text):
    """Each column in turn by least squares on the tokens themselves, without damping."""
    weight, (exact, seen) = weight_of(rows=4, width=24), inputs(24, 200)
    grid = search(weight, WeightFormat.parse(text), streams(exact, seen))
    order = np.argsort(-np.einsum("ti,ti->i", seen, seen), kind="stable")
    expected = np.zeros(weight.shape, np.uint8)
    for row, w in enumerate(weight):
        own = Grid(grid.format, grid.scales[[row]], grid.biases[[row]])
        target, current = exact @ w, w.copy()
        for at, column in enumerate(order):
            others = np.delete(current, column)
            residual = target - np.delete(seen, column, 1) @ others
            current[column] = seen[:, column] @ residual / (seen[:, column] @ seen[:, column])
            expected[row] = np.where(np.arange(24) == column, own.quantize(current[None])[0], expected[row])
            current[column] = own.dequantize(expected[[row]])[0, column]
            rest = order[at + 1 :]
            if len(rest):
                done = order[: at + 1]
                current[rest] = np.linalg.lstsq(seen[:, rest], target - seen[:, done] @ current[done], rcond=None)[0]
    codes = base_form(weight, grid, streams(exact, seen), damping=0.0)
    assert (codes == expected).all(1).mean() >= 0.75  # the paper has no guard: a row that it would spoil may differ
    better = np.linalg.norm(exact @ weight.T - seen @ grid.dequantize(codes).T, axis=0)
    assert (better <= np.linalg.norm(exact @ weight.T - seen @ grid.dequantize(expected).T, axis=0) * (1 + 1e-9)).all()


@pytest.mark.parametrize("method", [qronos, gptaq])
@pytest.mark.parametrize("text", TEXTS)
def test_where_both_streams_are_the_same_it_is_gptq(method, text):
    weight, (exact, _) = weight_of(), inputs()
    moments = Moments.of(exact)
    same = Moments(moments.gram, moments.count, moments.gram.copy())
    grid = search(weight, WeightFormat.parse(text), moments)
    np.testing.assert_array_equal(method(weight, grid, same, damping=0.01), gptq(weight, grid, moments, damping=0.01))


def error(weight, quantized, exact, seen):
    return np.linalg.norm(exact @ weight.T - seen @ quantized.T) / np.linalg.norm(exact @ weight.T)


def test_it_makes_up_for_what_the_inputs_have_lost():
    weight, (exact, seen) = weight_of(rows=40), inputs(tokens=800, loss=0.03)
    moments = streams(exact[:400], seen[:400])
    grid = search(weight, WeightFormat(4), moments)
    for tokens in (slice(0, 400), slice(400, 800)):
        q, a, g = (
            error(weight, grid.dequantize(f(weight, grid, moments)), exact[tokens], seen[tokens])
            for f in (qronos, gptaq, gptq)
        )
        assert q < 0.8 * g
        assert a < g


@pytest.mark.parametrize("strength", [None, 0.5])
def test_gptaq_hands_on_what_each_column_has_lost(strength):
    """Against the sum of its definition: each column's loss made up for by least squares of the columns that come after
    it, all of it as in the paper unless a strength is given.
    """
    given, share = ({}, 1.0) if strength is None else ({"strength": strength}, strength)
    weight, (exact, seen) = weight_of(width=16), inputs(16)
    moments = streams(exact, seen)
    hessian = moments.gram + 0.01 * np.diagonal(moments.gram).mean() * np.eye(16)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    aim = weight.copy()
    for at, column in enumerate(order):
        rest = order[at + 1 :]
        lost = (exact - seen)[:, column] @ seen[:, rest]
        aim[:, rest] += share * np.outer(weight[:, column], np.linalg.solve(hessian[np.ix_(rest, rest)], lost))
    fine = extremes(2 * weight, WeightFormat(8))
    codes = gptaq(weight, fine, moments, **given)
    expected = gptq(aim, fine, moments)
    assert (codes == expected).mean() > 0.99  # their guards differ: of what rounding to nearest does


def test_float32_moments_cost_nothing():
    weight, (exact, seen) = weight_of(rows=40), inputs(tokens=800)
    double = streams(exact, seen)
    single = Moments(double.gram.astype(np.float32), double.count, double.cross.astype(np.float32))
    grid = search(weight, WeightFormat(4), double)
    reference = error(weight, grid.dequantize(qronos(weight, grid, double)), exact, seen)
    assert error(weight, grid.dequantize(qronos(weight, grid, single)), exact, seen) == pytest.approx(
        reference, rel=0.01
    )
    np.testing.assert_allclose(corrected_target(weight, single), corrected_target(weight, double), rtol=0.01, atol=1e-4)
