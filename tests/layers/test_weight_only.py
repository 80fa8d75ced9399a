"""8-bit weights without data: the formula in float64, codes that never wrap, rows of zeros, broken weights."""

import doctest

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant.layers.weight_only as module
from mlxquant.errors import AdapterError, NumericsError, RecipeError
from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.weight_only import W8, W8A16Linear, quantized_linear, rounded

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def normal(shape, seed=0, scale=1.0):
    return mx.array((np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32))


def test_the_usage_of_the_documentation_runs():
    assert doctest.testmod(module, raise_on_error=True).attempted > 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layer_is_the_formula_in_float64(dtype):
    linear = nn.Linear(40, 12)
    linear.weight, linear.bias = normal((12, 40), 1).astype(dtype), normal((12,), 2).astype(dtype)
    layer = W8A16Linear.from_linear(linear)
    weight = np.array(linear.weight.astype(mx.float32)).astype(np.float64)
    scales = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    codes = np.clip(np.rint(weight / scales), -128, 127)
    assert (layer.codes().astype(int) - 128 == codes).all()
    assert (np.array(layer.scales).astype(np.float64) == scales).all()
    x = normal((7, 40), 3).astype(dtype)
    expected = np.array(x.astype(mx.float32)).astype(np.float64) @ (codes * scales).T + np.array(
        linear.bias.astype(mx.float32)
    )
    y = layer(x)
    assert y.dtype == dtype
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 0.15}[dtype]
    np.testing.assert_allclose(np.array(y.astype(mx.float32)), expected, atol=tolerance)


def test_codes_of_a_bfloat16_weight_never_wrap():
    """A quotient in the weight's own dtype will not do: there the largest weight of a row can come to 128, which is
    -128 in int8.
    """
    weight = normal((4096, 8), 4).astype(mx.bfloat16)
    scales = mx.abs(weight).max(-1) / mx.array(127, mx.bfloat16)
    naive = mx.round(weight / scales[:, None])
    assert mx.abs(naive).max().item() == 128
    wrapped = naive.astype(mx.int32).astype(mx.int8).astype(mx.float32) * scales.astype(mx.float32)[:, None]
    exact = np.array(weight.astype(mx.float32))
    steps = np.abs(exact).max(1, keepdims=True) / 127
    assert (np.abs(np.array(wrapped) - exact) / steps).max() > 200
    layer = W8A16Linear(8, 4096).quantize(weight)
    centred = layer.codes().astype(int) - 128
    assert np.abs(centred).max() == 127
    assert (np.sign(centred) == np.where(centred == 0, 0, np.sign(exact))).all()
    assert (
        np.abs(np.array(layer.dequantized()) - exact) / steps
    ).max() < 0.6  # half a step, and the scale's rounding to float16


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("steps", ["extremes", "mse"])
def test_codes_keep_the_sign_of_weights_in_every_format(bits, steps):
    weight = normal((64, 64), 5).astype(mx.bfloat16)
    codes, grid = rounded(weight, WeightFormat(bits), steps)
    values = grid.dequantize(codes)
    assert (values * np.array(weight.astype(mx.float32)) >= 0).all()


def test_rows_of_zeros_are_safe():
    weight = normal((6, 32), 6)
    weight[2] = 0
    layer = W8A16Linear(32, 6, bias=False).quantize(weight)
    y = np.array(layer(normal((3, 32), 7)))
    assert np.isfinite(y).all()
    assert (y[:, 2] == 0).all()
    assert np.abs(y[:, 0]).max() > 0


def test_a_weight_that_is_not_finite_is_refused():
    weight = normal((4, 8))
    weight[1, 1] = float("nan")
    with pytest.raises(NumericsError, match="1 NaN or infinite"):
        W8A16Linear(8, 4).quantize(weight)


def test_a_new_layer_answers_zero_and_takes_a_bias():
    layer = W8A16Linear(in_features=16, out_features=4, bias=True)
    assert (np.array(layer(normal((2, 16)))) == 0).all()
    layer.quantize(normal((4, 16)), bias=mx.ones((4,)))
    np.testing.assert_allclose(np.array(layer(mx.zeros((1, 16)))), 1)
    assert layer.format == W8


def test_other_shapes_are_refused():
    with pytest.raises(AdapterError, match=r"shape \(4, 16\), found \(16, 4\)"):
        W8A16Linear(16, 4).quantize(normal((16, 4)))
    with pytest.raises(AdapterError, match=r"a bias of shape \(4,\), found one of shape \(3,\)"):
        W8A16Linear(16, 4).quantize(normal((4, 16)), bias=mx.ones((3,)))
    with pytest.raises(AdapterError, match="bias=True"):
        W8A16Linear(16, 4, bias=False).quantize(normal((4, 16)), bias=mx.ones((4,)))


def test_quantizing_again_forgets_the_first_weight():
    once = W8A16Linear(16, 4).quantize(normal((4, 16), 1))
    twice = W8A16Linear(16, 4).quantize(normal((4, 16), 2)).quantize(normal((4, 16), 1))
    x = normal((2, 16))
    assert (np.array(once(x)) == np.array(twice(x))).all()


def test_a_bias_stays_until_another_is_given():
    weight, bias = mx.random.normal((6, 16), key=mx.random.key(0)), mx.arange(6, dtype=mx.float32)
    layer = W8A16Linear(16, 6).quantize(weight, bias)
    assert mx.array_equal(layer.quantize(-weight).bias, bias)
    assert "bias" not in W8A16Linear(16, 6, bias=False).quantize(weight)


def test_the_format_decides_the_class():
    linear = nn.Linear(64, 8)
    assert type(quantized_linear(linear, W8)) is W8A16Linear
    other = quantized_linear(linear, WeightFormat.parse("w4-g32"))
    assert type(other) is QuantizedLinear
    assert other.bias is linear.bias


def test_a_search_has_less_error_than_extremes():
    weight = normal((32, 128), 8)
    exact = np.array(weight)

    def error(steps):
        codes, grid = rounded(weight, WeightFormat(4), steps)
        return np.square(grid.dequantize(codes) - exact).sum()

    assert error("mse") < 0.9 * error("extremes")
    with pytest.raises(RecipeError, match="unknown steps method"):
        rounded(weight, WeightFormat(4), "guess")


def test_a_numpy_weight_is_as_good():
    weight = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    found, expected = W8A16Linear(64, 8).quantize(weight), W8A16Linear(64, 8).quantize(mx.array(weight))
    np.testing.assert_array_equal(found.codes(), expected.codes())


def test_a_layer_that_is_printed_says_what_it_is():
    assert str(W8A16Linear(64, 8)) == "W8A16Linear((8, 64), w8, bias=True)"
