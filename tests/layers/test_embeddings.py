"""Quantized tables: lookup and output layer read the same codes."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.embeddings import QuantizedEmbedding

FORMATS = ["w8", "w4", "w4-g32", "w3-g32-sym", "w8-tensor", "w7", "w5-asym"]


def embedding(number=20, dims=32, dtype=mx.float32):
    table = nn.Embedding(number, dims)
    table.weight = mx.array(np.random.default_rng(0).normal(size=(number, dims)).astype(np.float32)).astype(dtype)
    return table


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0)])
def test_rows_are_those_of_the_dequantized_table(format, shape):
    table = QuantizedEmbedding.from_embedding(embedding(), WeightFormat.parse(format))
    ids = mx.array(np.random.default_rng(1).integers(0, 20, shape))
    expected = table.grid().dequantize(table.codes())[np.array(ids)]
    rows = table(ids)
    assert rows.shape == (*shape, 32)
    np.testing.assert_allclose(np.array(rows), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [30, 32])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_come_in_the_dtype_of_the_embedding(dtype, dims):
    table = QuantizedEmbedding.from_embedding(embedding(dims=dims, dtype=dtype), WeightFormat(8))
    assert table(mx.array([1, 2])).dtype == dtype
    assert table.as_linear(mx.ones((3, dims), dtype)).dtype == dtype


@pytest.mark.parametrize("format", FORMATS)
def test_lookup_and_output_layer_agree(format):
    table = QuantizedEmbedding.from_embedding(embedding(), WeightFormat.parse(format))
    x = mx.array(np.random.default_rng(2).normal(size=(3, 32)).astype(np.float32))
    rows = np.array(table(mx.arange(20))).astype(np.float64)
    np.testing.assert_allclose(np.array(table.as_linear(x)), np.array(x).astype(np.float64) @ rows.T, atol=1e-4)


def test_a_blank_has_the_structure():
    table = QuantizedEmbedding.from_embedding(embedding(dtype=mx.bfloat16), WeightFormat.parse("w4-g32"))
    again = QuantizedEmbedding.blank(table.facts, None)
    again.load_weights(list(table.parameters().items()))
    ids = mx.array([3, 4])
    assert again(ids).dtype == mx.bfloat16
    assert mx.array_equal(again(ids), table(ids)).item()
