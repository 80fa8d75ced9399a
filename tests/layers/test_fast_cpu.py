"""What replaces MLX's own on the CPU: the same function, to the last digits, and its gradient."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.layers import fast_cpu
from mlxquant.layers.fast_cpu import group_norm, silu
from mlxquant.models.parts.group_norm import GroupNorm

RNG = np.random.default_rng(0)


def test_silu_and_its_gradient():
    x = np.linspace(-50, 50, 20001)
    sigmoid = 1 / (1 + np.exp(-x))
    given = mx.array(x.astype(np.float32))
    np.testing.assert_allclose(silu(given), x * sigmoid, atol=1e-6, rtol=1e-6)
    slope = mx.grad(lambda a: silu(a).sum())(given)
    np.testing.assert_allclose(slope, sigmoid * (1 + x * (1 - sigmoid)), atol=3e-6)
    half = given.astype(mx.float16)
    assert silu(half).dtype == mx.float16
    np.testing.assert_array_equal(silu(half), nn.silu(half))


def normalised(x, groups, weight, bias, eps):
    """In float64."""
    grouped = x.astype(np.float64).reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + eps)).reshape(x.shape) * weight + bias


@pytest.mark.parametrize(("places", "groups"), [((9, 7), 4), ((5,), 2), ((3, 4, 5), 12), ((), 3), ((256, 256), 4)])
def test_group_norm(places, groups):
    x = (RNG.standard_normal((2, *places, 12)) + 3).astype(np.float32)
    weight, bias = (RNG.standard_normal(12).astype(np.float32) for _ in range(2))
    arrays = [mx.array(a) for a in (x, weight, bias)]
    expected = normalised(x, groups, weight, bias, 1e-6)
    np.testing.assert_allclose(group_norm(*arrays, groups, 1e-6), expected, atol=1e-5)
    layer = GroupNorm(groups, 12, 1e-6)
    layer.weight, layer.bias = arrays[1:]
    np.testing.assert_allclose(layer(arrays[0]), expected, atol=1e-5)
    half = [a.astype(mx.float16) for a in arrays]
    assert group_norm(*half, groups, 1e-6).dtype == mx.float16
    np.testing.assert_allclose(group_norm(*half, groups, 1e-6), expected, atol=0.05)


def test_gradient_of_group_norm():
    x, weight, bias = (mx.array(RNG.standard_normal(s).astype(np.float32)) for s in ((1, 4, 4, 6), (6,), (6,)))
    towards = mx.array(RNG.standard_normal(x.shape).astype(np.float32))
    own = nn.GroupNorm(3, 6, eps=1e-6, pytorch_compatible=True)
    own.weight, own.bias = weight, bias
    found = mx.grad(lambda a: (group_norm(a, weight, bias, 3, 1e-6) * towards).sum())(x)
    np.testing.assert_allclose(found, mx.grad(lambda a: (own(a) * towards).sum())(x), atol=1e-5)


def test_exponentials_of_attention_in_pieces():
    """Relative to each value, as far down as they go; what is lower is as good as nothing."""
    below = np.linspace(0, 1, 999, dtype=np.float32)
    top = np.float32(3)
    found = np.array(fast_cpu._root_exponentials(mx.array(top - below), mx.array(top)))
    np.testing.assert_allclose(found, np.exp(32 * ((top - below).astype(np.float64) - top)), rtol=2e-5)
    assert fast_cpu._root_exponentials(mx.array(-1e30), mx.array(top)) < 2e-14


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_in_pieces_is_the_same_and_so_is_its_gradient(monkeypatch, scale):
    """Some queries at a time, of one head: where there are many, less memory and half of the time."""
    q, k, v = (
        mx.array(RNG.standard_normal(s).astype(np.float32)) for s in ((2, 3, 37, 8), (2, 3, 11, 8), (2, 3, 11, 5))
    )
    towards = mx.array(RNG.standard_normal((2, 3, 37, 5)).astype(np.float32))

    def both():
        value = fast_cpu.attention(q, k, v, scale)
        slopes = mx.grad(lambda *a: (fast_cpu.attention(*a, scale) * towards).sum(), argnums=(0, 1, 2))(q, k, v)
        return [np.array(x) for x in (value, *slopes)]

    whole = both()
    monkeypatch.setattr(fast_cpu, "probabilities", None)  # none that are held at once
    monkeypatch.setattr(fast_cpu, "MANY", 2 * 3 * 37 * 11 - 1)
    monkeypatch.setattr(fast_cpu, "SOME", 11 * 8)
    for one, other in zip(both(), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)
