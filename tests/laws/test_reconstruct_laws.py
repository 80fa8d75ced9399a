"""Laws of all methods that learn codes by a loss ("reconstruct"); a new method is covered by being registered."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods import registry
from mlxquant.methods.weights.adaround import Settings, choose
from mlxquant.methods.weights.rtn import rtn
from mlxquant.methods.weights.steps import search
from mlxquant.numerics.moments import Moments

RECONSTRUCT = [pytest.param(method.function, id=method.name) for method in registry.members("reconstruct")]
every = pytest.mark.parametrize("learn", RECONSTRUCT)


def chain(bits, seed=0):
    """Two layers with a nonlinearity between them, their grids, and the loss of the chain's output in units of
    rounding's.
    """
    random = np.random.default_rng(seed)
    x = mx.array((random.standard_normal((256, 24)) @ random.standard_normal((24, 24))).astype(np.float32))
    exact = {"first": random.standard_normal((32, 24)) / 5, "second": random.standard_normal((8, 32)) / 6}

    def run(weights):
        return mx.maximum(x @ weights["first"].T, 0) @ weights["second"].T

    target = run({name: mx.array(w.astype(np.float32)) for name, w in exact.items()})
    grids = {name: search(w, WeightFormat(bits), Moments.identity(w.shape[1])) for name, w in exact.items()}
    start = {name: rtn(w, grids[name]) for name, w in exact.items()}

    def hard(codes):
        weights = {name: mx.array(grids[name].dequantize(c)) for name, c in codes.items()}
        return mx.square(run(weights) - target).mean().item()

    unit = hard(start)
    return exact, grids, start, hard, lambda weights: mx.square(run(weights) - target).mean() / unit


@every
@pytest.mark.parametrize("bits", [2, 4])
def test_hard_codes_are_neighbours_and_beat_their_start(learn, bits):
    exact, grids, start, hard, loss = chain(bits)
    choices = {name: choose(w, grids[name], start[name]) for name, w in exact.items()}
    learned = learn(loss, choices, grids, lambda i: (), Settings(iterations=200, rate=0.05, pressure=10.0))
    assert set(learned.codes) == set(exact)
    for name, codes in learned.codes.items():
        assert codes.dtype == np.uint8
        assert codes.max() < 2**bits
        assert set(np.unique(codes.astype(int) - choices[name].base)) <= {0, 1}
    assert hard(learned.codes) < 0.8 * hard(start)


@every
def test_equal_runs_give_equal_codes(learn):
    exact, grids, start, _, loss = chain(3)
    choices = {name: choose(w, grids[name], start[name]) for name, w in exact.items()}
    one, other = (learn(loss, choices, grids, lambda i: (), Settings(iterations=50)) for _ in range(2))
    for name, codes in one.codes.items():
        np.testing.assert_array_equal(codes, other.codes[name])
    assert one.facts == other.facts


@every
def test_a_weight_on_the_grid_stays(learn):
    _, grids, start, _, _ = chain(4)
    on_grid = {name: grids[name].dequantize(codes).astype(np.float64) for name, codes in start.items()}
    choices = {name: choose(w, grids[name]) for name, w in on_grid.items()}
    targets = {name: mx.array(w.astype(np.float32)) for name, w in on_grid.items()}
    learned = learn(
        lambda weights: sum(mx.square(w - targets[name]).mean() for name, w in weights.items()) * 1e4,
        choices, grids, lambda i: (), Settings(iterations=100),
    )  # fmt: skip
    for name, codes in learned.codes.items():
        np.testing.assert_array_equal(codes, start[name])
