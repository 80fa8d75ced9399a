"""Unpacking inside MLX equals unpacking in NumPy, for every number of bits and ragged widths."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.grids.packing import dequantized, pack, unpacked
from mlxquant.grids.weights import Grid, WeightFormat

WIDTHS = (1, 3, 9, 27, 32, 64, 75, 147, 576)


def codes(bits, width, rows=5):
    return np.random.default_rng(bits * 1000 + width).integers(0, 2**bits, (rows, width)).astype(np.uint8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", WIDTHS)
def test_unpacked_is_the_inverse_of_pack(bits, width):
    expected = codes(bits, width)
    assert (np.array(unpacked(mx.array(pack(expected, bits)), bits, width)) == expected).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("group", "width"),
    [("channel", 27), ("channel", 64), ("channel", 576), ("tensor", 75), ("tensor", 64), (32, 96), (64, 576)],
)
def test_dequantized_is_the_grid(bits, group, width):
    q, format = codes(bits, width), WeightFormat(bits, group, symmetric=False)
    units = 1 if group == "tensor" else width // format.columns(width)
    rng = np.random.default_rng(1)
    rows = (1 if group == "tensor" else 5, units)
    scales, biases = (rng.normal(size=rows).astype(np.float16).astype(np.float32) for _ in range(2))
    grid = Grid(format, np.broadcast_to(scales, (5, units)), np.broadcast_to(biases, (5, units)))
    found = dequantized(mx.array(pack(q, bits)), mx.array(scales), mx.array(biases), bits, width)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), grid.dequantize(q), rtol=1e-6, atol=1e-5)


def test_unpacking_is_a_part_of_a_compiled_graph():
    words = mx.array(pack(codes(3, 27), 3))
    compiled = mx.compile(lambda w: unpacked(w, 3, 27))
    assert (np.array(compiled(words)) == codes(3, 27)).all()
