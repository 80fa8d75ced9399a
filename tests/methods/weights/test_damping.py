"""Damping chosen on held-out tokens: judged on the right tokens by the right error, and worth it where tokens
are few.
"""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.grids.weights import WeightFormat
from mlxquant.methods.weights.correction import corrected_target
from mlxquant.methods.weights.damping import CANDIDATES, TARGETS, choose_damping
from mlxquant.methods.weights.gptq import gptq
from mlxquant.methods.weights.steps import search
from mlxquant.numerics.moments import Moments, output_error


def inputs(tokens, width=64, seed=0):
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((width, width)) * (1 + np.arange(width)) ** -1.0
    return random.standard_normal((tokens, width)) @ mixing.T + 0.3 * random.standard_normal((tokens, width))


def split(seen, exact=None):
    """Moments of the tokens with a quarter of them held out."""
    moments, held = Moments.empty(seen.shape[1], np.float64), np.arange(len(seen)) % 4 == 3
    for some, held_out in ((~held, False), (held, True)):
        moments.add(seen[some], None if exact is None else exact[some], held_out=held_out)
    return moments


def weight_of(rows=40, width=64):
    return np.random.default_rng(1).standard_t(5, (rows, width)) * 0.02


def rounded(weight, moments, damping):
    grid = search(weight, WeightFormat(3), moments)
    return grid.dequantize(gptq(weight, grid, moments, damping=damping))


def test_it_takes_the_damping_with_the_least_error_on_the_tokens_held_out():
    weight, tokens = weight_of(), inputs(80)
    held = np.arange(80) % 4 == 3
    expected = {}
    for damping in CANDIDATES:
        change = weight - rounded(weight, Moments.of(tokens[~held]), damping)
        expected[damping] = np.square(tokens[held] @ change.T).sum()
    choice = choose_damping(weight, rounded, split(tokens))
    assert choice.errors == pytest.approx(expected, rel=1e-5)
    assert choice.damping == min(expected, key=expected.get)


def test_few_tokens_want_more_of_it_than_many_and_gain_by_it():
    weight, fresh = weight_of(), Moments.of(inputs(4000, seed=5))
    few, many = (split(inputs(count)) for count in (72, 4000))
    assert choose_damping(weight, rounded, few).damping > choose_damping(weight, rounded, many).damping
    chosen = choose_damping(weight, rounded, few).damping
    error, careless = (
        output_error(weight, rounded(weight, few, damping), fresh) for damping in (chosen, CANDIDATES[0])
    )
    assert error < 0.97 * careless


def test_with_two_streams_the_error_is_that_of_the_exact_output():
    weight, exact = weight_of(), inputs(120)
    seen = exact + 0.1 * inputs(120, seed=3)
    moments, held = split(seen, exact), np.arange(120) % 4 == 3
    choice = choose_damping(weight, corrected_target, moments, TARGETS)
    before = np.square((exact - seen)[held] @ weight.T).sum()
    for damping, error in choice.errors.items():
        target = corrected_target(weight, moments.training, damping)
        assert error == pytest.approx(
            np.square(exact[held] @ weight.T - seen[held] @ target.T).sum() - before, rel=1e-6
        )


def test_a_few_rows_stand_for_all():
    weight, seen = weight_of(rows=50), []

    def spy(some, moments, damping):
        seen.append(some)
        return rounded(some, moments, damping)

    choose_damping(weight, spy, split(inputs(100)), candidates=(0.01, 0.1), rows=8)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0], weight[[0, 7, 14, 21, 28, 35, 42, 49]])


def test_without_held_out_tokens_there_is_no_choice():
    assert choose_damping(weight_of(), rounded, Moments.of(inputs(100))) is None


def test_a_damping_that_leaves_the_hessian_singular_is_not_chosen():
    weight, moments = weight_of(), split(inputs(80))

    def quantize(some, training, damping):
        if damping < 0.05:
            raise NumericsError("not positive definite")
        return rounded(some, training, damping)

    choice = choose_damping(weight, quantize, moments)
    assert choice.damping >= 0.05
    assert [damping for damping, error in choice.errors.items() if error == np.inf] == [0.003, 0.01, 0.03]
