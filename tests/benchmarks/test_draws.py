"""The interval over draws and prompts holds the truth as often as it says, where an interval over prompts does not."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")


@pytest.fixture
def draws(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return import_module("draws")


@pytest.mark.parametrize(("spread", "prompts", "rest"), [(1.0, 1.0, 1.0), (0.3, 2.0, 1.0), (0.0, 1.0, 0.5)])
def test_it_covers(draws, spread, prompts, rest):
    rng = np.random.default_rng(0)
    found = [
        spread * rng.standard_normal((3, 1))
        + prompts * rng.standard_normal((1, 64))
        + rest * rng.standard_normal((3, 64))
        for _ in range(2000)
    ]
    assert np.mean([draws.tied(draws.interval(values)) for values in found]) >= 0.94
    if spread == 1:  # what an interval over the prompts of one draw is worth
        assert np.mean([draws.tied(draws.interval(values[:1])) for values in found[:200]]) < 0.5


def test_it_is_the_t_interval_of_the_draws_where_nothing_else_varies(draws):
    values = np.array([[1.0], [2.0], [6.0]]).repeat(64, 1)
    half = 4.302652729911275 * np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(draws.interval(values), [3 - half, 3 + half])


def test_it_is_that_of_the_prompts_where_draws_agree(draws):
    prompts = np.random.default_rng(1).standard_normal(64)
    low, high = draws.interval(np.tile(prompts, (3, 1)))
    half = 1.9983405417721956 * prompts.std(ddof=1) / 8
    np.testing.assert_allclose([low, high], [prompts.mean() - half, prompts.mean() + half])


def test_constant_values_have_no_width(draws):
    assert draws.interval(np.full((3, 64), 7.0)) == [7, 7]
