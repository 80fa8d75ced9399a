"""AdaRound against the paper's equations in float64, against brute force, and against itself after an interruption."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import NumericsError, RecipeError
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.methods.weights import adaround as ada
from mlxquant.methods.weights.gptq import gptq
from mlxquant.methods.weights.rtn import rtn
from mlxquant.methods.weights.steps import search
from mlxquant.numerics.moments import Moments, energy


def problem(rows=6, width=24, bits=3, seed=0):
    """A weight, its grid, and correlated inputs with their moments."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, width))
    inputs = random.standard_normal((4 * width, width)) @ random.standard_normal((width, width))
    moments = Moments.of(inputs)
    return weight, search(weight, WeightFormat(bits), moments), inputs, moments


def soft(choice, grid):
    return (choice.base + np.array(ada.h(mx.array(choice.alpha)))) * grid.scales + grid.biases


def learn(weight, grid, inputs, choice, checkpoint=None, **settings):
    """Learn one linear layer on its whole output, full batch."""
    x, y = mx.array(inputs.astype(np.float32)), mx.array((inputs @ weight.T).astype(np.float32))
    start = mx.square(x @ mx.array(grid.dequantize(choice.codes(choice.alpha, grid))).T - y).mean()
    x, y = x / mx.sqrt(start), y / mx.sqrt(start)  # as a number in the loss it would be compiled anew each time

    def loss(weights, x, y):
        return mx.square(x @ weights["a.0.w"].T - y).mean()

    chosen = ada.Settings(**{"iterations": 300, "rate": 0.05, "pressure": 3.0, **settings})
    return ada.adaround(loss, {"a.0.w": choice}, {"a.0.w": grid}, lambda i: (x, y), chosen, checkpoint)


def test_soft_rounding_follows_the_paper():
    alpha = np.linspace(-6, 6, 101)
    expected = np.clip(1.2 / (1 + np.exp(-alpha)) - 0.1, 0, 1)
    np.testing.assert_allclose(np.array(ada.h(mx.array(alpha.astype(np.float32)))), expected, atol=1e-6)
    for b in (20.0, 7.5, 2.0):
        reference = 1 - np.abs(2 * expected - 1) ** b
        np.testing.assert_allclose(
            np.array(ada.regulariser(mx.array(alpha.astype(np.float32)), mx.array(b))), reference, atol=2e-5
        )


def test_regulariser_is_zero_exactly_where_the_choice_is_made():
    made, open_ = mx.array([-9.0, 9.0]), mx.array([-1.0, 0.0, 1.0])
    assert (np.array(ada.regulariser(made, mx.array(20.0))) == 0).all()
    assert (np.array(ada.regulariser(open_, mx.array(2.0))) > 0).all()


def test_exponent_is_annealed_after_the_warm_up():
    assert [ada.exponent(p, 0.2) for p in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([20, 20, 11, 2])


@pytest.mark.parametrize("text", ["w4", "w3-asym", "w2-g32"])
def test_it_starts_exactly_at_the_weight(text):
    random = np.random.default_rng(1)
    weight = random.standard_normal((5, 64)).astype(np.float32)
    grid = fit_extremes(weight, WeightFormat.parse(text))
    choice = ada.choose(weight, grid)
    scales, biases = (grid.expand(v, 64) for v in (grid.scales, grid.biases))
    start = (choice.base + np.array(ada.h(mx.array(choice.alpha)))) * scales + biases
    lowest, highest = grid.biases.repeat(64 // grid.biases.shape[1], 1), (grid.format.levels - 1) * scales + biases
    np.testing.assert_allclose(start, np.clip(weight, lowest, highest), atol=3e-6 * float(np.abs(weight).max()))
    np.testing.assert_array_equal(choice.codes(choice.alpha, grid), rtn(weight, grid))


def test_choices_are_the_codes_around_the_weight():
    weight, grid, _, _ = problem()
    choice = ada.choose(weight, grid)
    place = np.clip((weight - grid.biases) / grid.scales, 0, grid.format.levels - 1)
    for sign, edge in ((-9, np.floor), (9, np.ceil)):
        codes = choice.codes(np.full(weight.shape, sign), grid)
        inside = place < grid.format.levels - 1
        np.testing.assert_array_equal(codes[inside], np.where(place == np.floor(place), codes, edge(place))[inside])
        assert codes.max() <= grid.format.levels - 1


def test_a_start_is_kept_until_something_moves():
    weight, grid, _, moments = problem()
    codes = gptq(weight, grid, moments)
    choice = ada.choose(weight, grid, codes)
    np.testing.assert_array_equal(choice.codes(choice.alpha, grid), codes)
    both = np.stack([choice.codes(np.full(weight.shape, sign), grid).astype(int) for sign in (-1, 1)])
    assert ((both == codes).any(0)).all()
    assert (np.diff(both, axis=0) == 1).all()
    nearest = rtn(weight, grid)
    np.testing.assert_allclose(
        soft(ada.choose(weight, grid, nearest, trust=0.0), grid), soft(ada.choose(weight, grid), grid), atol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_nearly_what_brute_force_finds(seed):
    """32 rows of 9 weights, each with 512 choices: for two rows in five it is the best of them, for all one of the best
    8 %, and of what rounding to nearest loses against the best it wins back two thirds.
    """
    weight, grid, inputs, moments = problem(rows=32, width=9, bits=2, seed=seed)
    choice = ada.choose(weight, grid)
    learned = learn(weight, grid, inputs, choice, iterations=800).codes["a.0.w"]

    def losses(codes):
        return energy(weight - grid.dequantize(codes), moments.gram)

    every = np.array(list(itertools.product([-1, 1], repeat=9)))
    every = np.stack([losses(choice.codes(np.broadcast_to(ups, weight.shape), grid)) for ups in every])
    best, nearest, found = every.min(0), losses(rtn(weight, grid)), losses(learned)
    assert (found >= best * (1 - 1e-6)).all()
    assert (found <= best * (1 + 1e-6)).mean() > 0.4
    assert ((every < found * (1 - 1e-6)).sum(0) < 0.08 * 512).all()
    assert (found - best).sum() < (nearest - best).sum() / 3


def test_it_beats_rounding_and_improves_its_start():
    weight, grid, inputs, moments = problem(rows=16, width=48)
    error = {}
    for name, codes in {"rtn": rtn(weight, grid), "gptq": gptq(weight, grid, moments)}.items():
        start = None if name == "rtn" else codes
        learned = learn(weight, grid, inputs, ada.choose(weight, grid, start)).codes["a.0.w"]
        error[name], error[name + "+"] = (
            energy(weight - grid.dequantize(c), moments.gram).sum() for c in (codes, learned)
        )
    assert error["rtn+"] < 0.5 * error["rtn"]
    assert error["gptq+"] < error["gptq"]


def test_the_regulariser_does_not_swamp_the_reconstruction():
    """Summed over the weights it did: learning was rounding to nearest. Averaged, a wide layer is learned like a narrow
    one.
    """
    weight, grid, inputs, moments = problem(rows=64, width=64, bits=4)
    nearest = rtn(weight, grid)
    learned = learn(weight, grid, inputs, ada.choose(weight, grid)).codes["a.0.w"]
    assert 0.05 < (learned != nearest).mean() < 0.6
    assert (
        energy(weight - grid.dequantize(learned), moments.gram).sum()
        < 0.6 * energy(weight - grid.dequantize(nearest), moments.gram).sum()
    )


def test_pressure_means_the_same_for_a_layer_of_any_size():
    """The same rows 32 times are learned as they are once: the loss is a mean over them, and so is the regulariser."""
    weight, grid, inputs, moments = problem(rows=8, width=32)
    many = np.tile(weight, (32, 1))
    once = learn(weight, grid, inputs, ada.choose(weight, grid)).codes["a.0.w"]
    grid = search(many, grid.format, moments)
    found = learn(many, grid, inputs, ada.choose(many, grid)).codes["a.0.w"]
    assert (found == np.tile(once, (32, 1))).mean() > 0.99


def test_it_stops_when_nothing_moves():
    weight, grid, inputs, _ = problem()
    facts = learn(weight, grid, inputs, ada.choose(weight, grid), iterations=5000, pressure=1000.0).facts
    assert facts["iterations"] < 5000
    assert facts["open"] == 0


class Kept:
    """A checkpoint in memory that can interrupt the run."""

    due = True

    def __init__(self, stop_at=None):
        self.kept, self.stop_at = None, stop_at

    def load(self):
        return self.kept

    def save(self, arrays, facts):
        self.kept = {k: mx.array(np.array(v)) for k, v in arrays.items()}, dict(facts)
        if facts["iteration"] == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_at", [ada.EVERY, 100, 275])
def test_a_resumed_run_ends_with_the_same_codes(stop_at):
    weight, grid, inputs, _ = problem(rows=8, width=32)
    choice = ada.choose(weight, grid)
    whole = learn(weight, grid, inputs, choice)
    checkpoint = Kept(stop_at)
    with pytest.raises(KeyboardInterrupt):
        learn(weight, grid, inputs, choice, checkpoint)
    assert checkpoint.kept[0]["alpha/a.0.w"].dtype == mx.float32  # the raw alphas, not what they were rounded to
    resumed = learn(weight, grid, inputs, choice, checkpoint)
    np.testing.assert_array_equal(resumed.codes["a.0.w"], whole.codes["a.0.w"])
    assert resumed.facts == whole.facts


def test_bad_settings_and_losses_are_refused():
    for change in ({"iterations": 0}, {"rate": 0.0}, {"pressure": -1.0}, {"drop": 1.5}, {"batch": 0}):
        with pytest.raises(RecipeError, match="out of range"):
            ada.Settings(**change)
    weight, grid, inputs, _ = problem()
    with pytest.raises(NumericsError, match="the loss of iteration 24 is nan"):
        learn(weight, grid, inputs * np.nan, ada.choose(weight, grid))
