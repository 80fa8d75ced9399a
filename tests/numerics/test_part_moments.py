"""Moments of a weight in parts, against the tokens themselves in float64."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import numpy as np
import pytest

from mlxquant.numerics.moments import Moments
from mlxquant.numerics.part_moments import PartMoments

PARTS, OUT, WIDTH = 3, 4, 5
RNG = np.random.default_rng(3)
CHANGE = RNG.normal(size=(PARTS, OUT, WIDTH))


def seen(tokens):
    moments = Moments.empty(WIDTH)
    if len(tokens):
        moments.add(tokens[None])
    return moments


def test_experts_write_one_output_together_each_for_its_own_tokens():
    tokens = [RNG.normal(size=(count, WIDTH)).astype(np.float32) for count in (7, 0, 2)]
    moments = PartMoments([seen(some) for some in tokens], alone=True)
    expected = sum(np.square(some @ change.T).sum(0) for some, change in zip(tokens, CHANGE, strict=True))
    np.testing.assert_allclose(moments.errors(CHANGE.reshape(-1, WIDTH)), expected, rtol=1e-5)
    assert (moments.count, moments.without_data) == (9, [1])


def test_groups_write_outputs_of_their_own_for_every_token():
    tokens = [RNG.normal(size=(7, WIDTH)).astype(np.float32) for _ in range(PARTS)]
    moments = PartMoments([seen(some) for some in tokens])
    expected = np.concatenate([np.square(some @ change.T).sum(0) for some, change in zip(tokens, CHANGE, strict=True)])
    np.testing.assert_allclose(moments.errors(CHANGE.reshape(-1, WIDTH)), expected, rtol=1e-5)
    assert (moments.count, moments.without_data) == (7, [])


def test_a_tables_rows_count_as_often_as_they_were_looked_up():
    looked_up, change = np.array([3.0, 0.0, 1.0]), CHANGE[:, 0]
    moments = PartMoments.of_table(looked_up, WIDTH)
    np.testing.assert_allclose(moments.errors(change), looked_up @ np.square(change))
    assert moments.count == 4
    wrong, signal = looked_up @ np.square(change - 1).sum(1), looked_up @ np.square(change).sum(1)
    assert moments.relative_error(change, np.ones_like(change)) == pytest.approx(np.sqrt(wrong / signal))
