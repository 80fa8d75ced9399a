"""One layer's weight, on arrays alone: what is stored is judged by the tokens themselves, not by their moments."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.methods import registry
from mlxquant.methods.weights.damping import CANDIDATES
from mlxquant.numerics.moments import KEPT_MEAN, Moments
from mlxquant.numerics.part_moments import PartMoments
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.recipe import LayerSpec
from mlxquant.sweep.layer import quantize_layer

OUT, IN, RANK = 24, 32, 2
FORMAT = WeightFormat(4)


def tokens(count, seed=0):
    """Inputs [count,in] whose channels hang together and differ in size."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, IN)) * np.geomspace(4, 0.1, IN) @ np.linalg.qr(rng.normal(size=(IN, IN)))[0]


def linear(weight):
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight = mx.array(weight, mx.float32)
    return layer


@pytest.fixture(scope="module")
def weight():
    """A weight of two large directions and small other ones, float64 of float32 values."""
    rng = np.random.default_rng(1)
    large = 10 * rng.normal(size=(OUT, RANK)) @ rng.normal(size=(RANK, IN))
    return (large + rng.normal(size=(OUT, IN))).astype(np.float32).astype(np.float64)


def quantized(weight, x, **spec):
    return quantize_layer(
        linear(weight), LayerSpec(FORMAT, **spec), PartMoments.one(Moments.of(x)), "layer", Transform()
    )


def stored(rounded):
    """The weight that a layer stands for."""
    branch = rounded.layer.branch
    return np.array(rounded.layer.dequantized(), np.float64) + (0 if branch is None else branch.weight)


def error(weight, other, x):
    return np.linalg.norm(x @ (weight - other).T) / np.linalg.norm(x @ weight.T)


def test_codes_are_rounded_with_the_damping_that_unseen_tokens_like_best(weight):
    gptq, steps = registry.get("round", "gptq").function, registry.get("steps", "extremes").function
    seen, unseen = tokens(IN + 8), tokens(500)[-60:]
    moments, training = Moments.empty(IN, np.float64), Moments.of(seen)
    moments.add(seen)
    moments.add(unseen, held_out=True)
    grid = steps(weight, FORMAT, moments)

    def judged(damping):
        own = steps(weight, FORMAT, training)
        return error(weight, own.dequantize(gptq(weight, own, training, damping=damping)), unseen)

    best = min(CANDIDATES, key=judged)
    spec = LayerSpec(FORMAT, rounding="gptq", held_out=True)
    rounded = quantize_layer(linear(weight), spec, PartMoments.one(moments), "layer", Transform())
    assert rounded.dampings[0].rounding == best
    np.testing.assert_array_equal(rounded.codes, gptq(weight, grid, moments, damping=best))
    assert (rounded.codes != gptq(weight, grid, moments)).any()


def test_a_branch_takes_large_directions_out_of_what_the_integers_hold(weight):
    x = tokens(200)
    plain, beside = (
        error(weight, stored(quantized(weight, x, **branch)), x) for branch in ({}, {"branch": "svd", "rank": RANK})
    )
    assert 0 < beside < 0.2 * plain


def test_no_branch_of_its_rank_leaves_much_less_beside_the_final_codes(weight):
    """By Eckart and Young: what the outputs' error has beyond its leading singular values nobody can take."""
    x = tokens(200)
    rounded = quantized(weight, x, branch="svd", rank=RANK)
    left = x @ (weight - np.array(rounded.layer.dequantized(), np.float64)).T
    least = np.sqrt(np.square(np.linalg.svd(left, compute_uv=False)[RANK:]).sum()) / np.linalg.norm(x @ weight.T)
    assert least <= error(weight, stored(rounded), x) < 1.01 * least


@pytest.mark.parametrize("branch", [{}, {"branch": "svd", "rank": RANK}], ids=["plain", "branch"])
def test_the_error_is_that_of_what_the_layer_writes(weight, branch):
    x = tokens(200)
    rounded, exact = quantized(weight, x, **branch), x @ weight.T
    wrote = np.array(rounded.layer(mx.array(x, mx.float32)), np.float64)
    assert rounded.error == pytest.approx(np.linalg.norm(wrote - exact) / np.linalg.norm(exact), rel=0.02)


def test_a_centred_layer_writes_no_error_on_average_and_less_around_it(weight):
    """Inputs with a large mean, as a SiLU writes them: the bias makes up for the mean of the error, exactly, and codes
    are those that GPTQ finds for the covariance.
    """
    x = tokens(400) + 6
    layer = linear(weight)
    layer.bias = mx.arange(OUT, dtype=mx.float32)
    spec = LayerSpec(FORMAT, rounding="gptq", centred=True)
    rounded = quantize_layer(layer, spec, PartMoments.one(Moments.of(x)), "layer", Transform())
    wanted = x @ weight.T + np.arange(OUT)
    wrong = x @ stored(rounded).T + np.array(rounded.layer.bias, np.float64) - wanted
    assert np.abs(wrong.mean(0)).max() < 1e-5 * np.abs(wanted).max()
    around = x - (1 - np.sqrt(KEPT_MEAN)) * x.mean(0)
    gptq, steps = registry.get("round", "gptq").function, registry.get("steps", "extremes").function
    seen = Moments.of(around)
    np.testing.assert_array_equal(rounded.codes, gptq(weight, steps(weight, FORMAT, seen), seen))
    plain = quantize_layer(layer, replace(spec, centred=False), PartMoments.one(Moments.of(x)), "layer", Transform())
    assert np.square(wrong).mean() < np.square(x @ (stored(plain) - weight).T).mean()
    np.testing.assert_array_equal(np.array(layer.bias), np.arange(OUT))


def test_inputs_that_never_change_can_be_centred(weight):
    layer = linear(weight)
    layer.bias = mx.zeros(OUT)
    x = np.repeat(tokens(1), 5, 0)
    spec = LayerSpec(FORMAT, rounding="gptq", centred=True)
    rounded = quantize_layer(layer, spec, PartMoments.one(Moments.of(x)), "layer", Transform())
    np.testing.assert_allclose(x @ stored(rounded).T + np.array(rounded.layer.bias), x @ weight.T, rtol=1e-5)


def test_a_layer_without_a_bias_is_not_centred(weight):
    moments = PartMoments.one(Moments.of(tokens(400) + 6))
    spec = LayerSpec(FORMAT, rounding="gptq")
    one, other = (
        quantize_layer(linear(weight), replace(spec, centred=centred), moments, "layer", Transform())
        for centred in (False, True)
    )
    np.testing.assert_array_equal(one.codes, other.codes)
