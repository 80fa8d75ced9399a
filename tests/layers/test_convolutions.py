"""Quantized convolutions against NumPy loops in float64, and against MLX's own layers with the same kernel."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import AdapterError, NumericsError, RecipeError
from mlxquant.grids.weights import Grid, WeightFormat
from mlxquant.layers.convolutions import QuantizedConv1d, QuantizedConv2d, QuantizedConvolution

LAYERS = {
    "stem": (lambda: nn.Conv2d(3, 8, 7, stride=2, padding=3), (2, 16, 16, 3)),
    "no-bias": (lambda: nn.Conv2d(4, 6, (3, 5), bias=False), (1, 8, 9, 4)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), dilation=2), (1, 9, 9, 4)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 6, 6, 8)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (1, 6, 6, 8)),
    "one-dimension": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2), (2, 11, 6)),
    "three-dimensions": (lambda: nn.Conv3d(2, 4, 2), (1, 4, 5, 4, 2)),
    "transposed-1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (1, 7, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (1, 5, 5, 4)),
    "transposed-3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 3, 3, 3, 2)),
}


def built(name):
    """A layer with weights that are the same every time, and an input for it."""
    make, shape = LAYERS[name]
    layer, rng = make(), np.random.default_rng(0)
    layer.update(
        {key: mx.array(rng.normal(size=value.shape).astype(np.float32)) for key, value in layer.parameters().items()}
    )
    return layer, mx.array(rng.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("format", ["w8", "w4", "w3-asym", "w7", "w4-tensor"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_computes_what_mlx_does_with_the_rounded_kernel(name, format):
    layer, x = built(name)
    quantized = QuantizedConvolution.from_convolution(layer, WeightFormat.parse(format))
    assert quantized.shape == layer.weight.shape
    kernel = quantized.dequantized()
    error = np.array(kernel - layer.weight)
    assert 0 < np.square(error).mean() < 0.2
    layer.weight = kernel
    np.testing.assert_allclose(np.array(quantized(x)), np.array(layer(x)), atol=1e-5)


def reference(x, kernel, bias, stride, padding, dilation, groups):
    """A convolution by its definition: x [N,H,W,C], kernel [O,h,w,C/groups], float64."""
    x = np.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    count, height, width, _ = x.shape
    out, rows, columns, channels = kernel.shape
    down = (height - dilation * (rows - 1) - 1) // stride[0] + 1
    across = (width - dilation * (columns - 1) - 1) // stride[1] + 1
    y = np.zeros((count, down, across, out))
    for o, i, j in itertools.product(range(out), range(down), range(across)):
        start = o // (out // groups) * channels
        top, left = i * stride[0], j * stride[1]
        patch = x[
            :,
            top : top + dilation * rows : dilation,
            left : left + dilation * columns : dilation,
            start : start + channels,
        ]
        y[:, i, j, o] = (patch[:, :rows, :columns] * kernel[o]).sum((1, 2, 3)) + bias[o]
    return y


@pytest.mark.parametrize(("groups", "dilation", "stride"), [(1, 1, (2, 1)), (2, 1, (1, 1)), (4, 2, (1, 2))])
def test_a_convolution_is_the_formula_in_float64(groups, dilation, stride):
    rng = np.random.default_rng(1)
    layer = nn.Conv2d(4, 8, (3, 2), stride=stride, padding=(1, 2), dilation=dilation, groups=groups)
    weight, bias = rng.normal(size=layer.weight.shape), rng.normal(size=8)
    layer.weight, layer.bias = mx.array(weight.astype(np.float32)), mx.array(bias.astype(np.float32))
    x = rng.normal(size=(2, 7, 6, 4)).astype(np.float32)
    flat = np.array(layer.weight).astype(np.float64).reshape(8, -1)
    scales = (np.abs(flat).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
    kernel = (np.clip(np.rint(flat / scales), -128, 127) * scales).reshape(layer.weight.shape)
    expected = reference(x.astype(np.float64), kernel, np.array(layer.bias), stride, (1, 2), dilation, groups)
    quantized = QuantizedConv2d.from_convolution(layer, WeightFormat(8))
    np.testing.assert_allclose(np.array(quantized(mx.array(x))), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_output_has_the_dtype_of_the_input(dtype):
    layer, x = built("stem")
    layer.set_dtype(dtype)
    y = QuantizedConv2d.from_convolution(layer, WeightFormat(8))(x.astype(dtype))
    assert y.dtype == dtype
    exact = np.array(layer(x.astype(dtype)).astype(mx.float32))
    assert np.linalg.norm(np.array(y.astype(mx.float32)) - exact) < 0.02 * np.linalg.norm(exact)


def test_groups_run_along_the_flattened_kernel():
    layer = nn.Conv2d(32, 8, 3)
    quantized = QuantizedConv2d.from_convolution(layer, WeightFormat.parse("w4-g32"))
    assert quantized.scales.shape == quantized.biases.shape == (8, 9)
    rows = np.array(layer.weight).reshape(8, 9, 32)
    steps = (np.maximum(rows.max(-1), 0) - np.minimum(rows.min(-1), 0)) / 15
    np.testing.assert_allclose(np.array(quantized.scales), steps, rtol=1e-3)
    with pytest.raises(RecipeError, match="groups of 64 do not divide an input width of 27"):
        QuantizedConv2d.from_convolution(nn.Conv2d(3, 8, 3), WeightFormat.parse("w4-g64"))


@pytest.mark.parametrize("name", LAYERS)
def test_a_blank_has_the_structure(name):
    layer, x = built(name)
    quantized = QuantizedConvolution.from_convolution(layer, WeightFormat.parse("w5-asym"))
    again = type(quantized).blank(quantized.facts)
    again.load_weights(list(quantized.parameters().items()))
    assert mx.array_equal(again(x), quantized(x)).item()
    assert again.facts == quantized.facts


def test_zero_kernels_are_safe_and_broken_ones_refused():
    layer, x = built("stem")
    layer.weight[1] = 0
    y = QuantizedConv2d.from_convolution(layer, WeightFormat(8))(x)
    np.testing.assert_allclose(np.array(y[..., 1]), layer.bias[1].item(), atol=1e-6)
    layer.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match="1 NaN or infinite"):
        QuantizedConv2d.from_convolution(layer, WeightFormat(8))


def test_other_layers_and_windows_are_refused():
    with pytest.raises(AdapterError, match="QuantizedConv1d does not stand for Conv2d"):
        QuantizedConv1d.from_convolution(nn.Conv2d(3, 4, 3), WeightFormat(8))
    with pytest.raises(AdapterError, match="does not stand for Linear"):
        QuantizedConvolution.from_convolution(nn.Linear(3, 4), WeightFormat(8))
    grid = Grid.symmetric(WeightFormat(8), np.ones((2, 1)))
    with pytest.raises(AdapterError, match=r"do not fit kernels of shape \(3, 3\)"):
        QuantizedConv1d(np.zeros((2, 8), np.uint8), grid, (3, 3))


def test_bytes_are_those_that_are_stored():
    quantized = QuantizedConv2d.from_convolution(nn.Conv2d(3, 8, 3), WeightFormat(8))
    assert quantized.nbytes == 8 * 28 + 8 * 2  # 27 codes end in 7 words


def test_one_scale_for_the_tensor_is_stored_once():
    quantized = QuantizedConvolution.from_convolution(nn.Conv2d(3, 8, 3), WeightFormat.parse("w8-tensor"))
    assert quantized.scales.size == 1
