"""The bootstrap interval covers, is reproducible, and never is NaN."""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.metrics.bootstrap import interval


def test_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(
        interval(values, draws=20_000), [values.mean() - half, values.mean() + half], atol=0.05 * half
    )


def test_the_truth_is_outside_one_time_in_twenty():
    rng = np.random.default_rng(0)
    found = [interval(rng.exponential(2.0, 64), draws=500) for _ in range(600)]
    assert 0.025 < np.mean([not low <= 2.0 <= high for low, high in found]) < 0.08


def test_same_seed_same_interval():
    values = np.arange(9.0)
    assert interval(values) == interval(list(values), seed=0, draws=2000)
    assert interval(values) != interval(values, seed=1)


def test_pairing_narrows_a_difference():
    rng = np.random.default_rng(1)
    prompts = rng.normal(0, 5, 50)
    a, b = prompts + rng.normal(0.5, 0.1, 50), prompts + rng.normal(0, 0.1, 50)
    low, high = interval(a - b)
    assert 0.4 < low < high < 0.6
    assert interval(a)[0] < interval(b)[1]  # the two separate intervals overlap widely


def test_few_values():
    assert interval([7.0]) is None
    assert interval([7.0, 7.0]) == [7.0, 7.0]
    for values in ([], [1.0, np.nan], [np.inf, 1.0], np.ones((2, 2))):
        with pytest.raises(NumericsError, match="finite values"):
            interval(values)
