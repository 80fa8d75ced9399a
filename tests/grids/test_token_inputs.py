"""Inputs that are quantized token by token: each on a scale of its own, at no noise level."""

import mlxquant as mq  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import RecipeError
from mlxquant.grids.reading import TokenReader, represented
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear

X = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32) * np.array([1, 10, 100])[:, None, None].astype(
    np.float32
)


def layer(bits=4, group="channel", symmetric=True):
    weight = np.random.default_rng(1).normal(size=(32, 64))
    grid = fit_extremes(weight, WeightFormat(bits, group, symmetric))
    return QuantizedLinear(grid.quantize(weight), grid, mx.array(np.linspace(-1, 1, 32, dtype=np.float32)))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_token_spans_its_own_levels(bits):
    q = np.array(represented(mx.array(X), TokenReader(bits).read(mx.array(X))))
    step = (X.max(-1, keepdims=True) - X.min(-1, keepdims=True)) / (2**bits - 1)
    assert (np.abs(q - X) <= step * 0.5001).all()
    assert max(len(np.unique(token)) for token in q.reshape(-1, 64)) <= 2**bits
    np.testing.assert_allclose(q.min(-1), X.min(-1), rtol=1e-5)
    np.testing.assert_allclose(q.max(-1), X.max(-1), rtol=1e-5)


def test_a_token_of_equal_channels_stays_what_it_is():
    flat = mx.full((1, 2, 64), 3.25)
    np.testing.assert_array_equal(np.array(represented(flat, TokenReader(4).read(flat))), np.array(flat))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [("channel", True), ("channel", False), (32, False), ("tensor", True)])
def test_the_layer_multiplies_what_the_reader_represents(bits, group, symmetric):
    run = layer(bits, group, symmetric)
    run.quantize_tokens(bits)
    q = np.array(represented(mx.array(X), TokenReader(bits).read(mx.array(X)))).astype(np.float64)
    expected = q @ run.grid().dequantize(run.codes()).astype(np.float64).T + np.array(run.bias)
    np.testing.assert_allclose(np.array(run(mx.array(X))), expected, rtol=2e-5, atol=2e-4)


def test_tokens_need_no_clock_and_take_the_place_of_a_table():
    run = layer()
    run.quantize_tokens(8)
    assert run.table is None
    assert run.input_bits == 8.0
    assert run(mx.array(X)).dtype == mx.float32
    run.drop_activations()
    assert run.input_bits == 16.0


def test_structure_survives():
    run = layer()
    run.quantize_tokens(6)
    other = QuantizedLinear.blank(run.facts, Clock())
    other.load_weights(list(run.parameters().items()))
    other.refresh()
    np.testing.assert_array_equal(np.array(other(mx.array(X))), np.array(run(mx.array(X))))
    old = {
        key: value for key, value in run.facts.items() if key != "token"
    }  # as it was saved before there were such layers
    assert QuantizedLinear.blank(old, Clock()).input_bits == 16.0


def test_recipes_say_so_and_refuse_what_does_not_go_with_it():
    spec = dict(mq.parse_recipe("gptq-w4a4-token").rules)["*"]
    assert spec.activation.per_token
    assert spec.activation.bits == 4
    for wrong in ("gptq+logsnr-w4a4-token", "taqdit-w4a8-token"):
        with pytest.raises(RecipeError, match="-token"):
            mq.parse_recipe(wrong)


def test_a_picture_model_takes_it_too(tiny):
    calib = mq.calibrate(tiny, prompts=2, steps=2)
    quantized = mq.quantize(tiny, calib, "gptq+learned-w4a8-token")
    bits = {layer.input_bits for path, layer in quantized.layers.items() if ".attn." in path}
    assert bits == {8.0}
