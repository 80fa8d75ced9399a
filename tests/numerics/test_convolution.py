"""Strips change nothing."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.numerics import convolution


@pytest.mark.parametrize("limit", [1, 5000, 2**27])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), 1, (1, 1)), ((11, 11), 4, (2, 2)), ((1, 7), 1, (0, 3)), ((3, 3), 2, (0, 0))],
)
def test_strips_are_the_whole(monkeypatch, limit, kernel, stride, padding):
    rng = np.random.default_rng(0)
    x, weight = mx.array(rng.standard_normal((2, 23, 17, 4))), mx.array(rng.standard_normal((5, *kernel, 4)))
    x, weight, bias = (
        x.astype(mx.float32),
        weight.astype(mx.float32),
        mx.array(rng.standard_normal(5)).astype(mx.float32),
    )
    monkeypatch.setattr(convolution, "UNFOLDED_BYTES", limit)
    expected = mx.conv2d(x, weight, stride=stride, padding=padding) + bias
    for rectify in (False, True):
        found = convolution.convolved(x, weight, bias, stride, padding, rectify)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-5, atol=1e-5)
        expected = mx.maximum(expected, 0)
