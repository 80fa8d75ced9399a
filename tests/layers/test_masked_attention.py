"""Attention with a mask: closed places have probability 0 whatever the mask looks like, exact, shown or quantized."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.layers.attention import QuantizedAttention, ShownAttention, SoftmaxAttention
from mlxquant.layers.fast_cpu import attention, opened, probabilities

B, HEADS, N, M, D = 3, 2, 5, 7, 8
LENGTHS = [7, 4, 1]  # keys that each sample has
KEYS = np.arange(M) < np.array(LENGTHS)[:, None]
CLOCK = Clock()


def inputs(dtype=mx.float32):
    shapes = ((B, HEADS, N, D), (B, HEADS, M, D), (B, HEADS, M, D))
    return [2 * mx.random.normal(shape, key=mx.random.key(i)).astype(dtype) for i, shape in enumerate(shapes)]


def reference(q, k, v, scale, bias, open_):
    q, k, v = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v))
    with np.errstate(invalid="ignore"):
        scores = np.where(open_, q @ k.swapaxes(-1, -2) * scale + bias, -np.inf)
        top = scores.max(-1, keepdims=True)
        p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return p, p @ v


def masks():
    """Every way to write that samples have so many keys, with what is added to open scores."""
    keys = KEYS[:, None, None, :]
    queries = keys & (np.arange(N) < 3)[:, None]  # [B,1,N,M]: the last two queries are padding, too
    heads = np.broadcast_to(queries, (B, HEADS, N, M)).copy()
    heads[:, 1, :, 0] = False
    bias = np.random.default_rng(0).normal(size=(1, HEADS, N, M)).astype(np.float32)
    for name, open_ in (("keys", keys), ("queries", queries), ("heads", heads)):
        yield name, mx.array(open_), open_, 0
        for low in (-10000.0, -np.inf, float(np.finfo(np.float32).min)):
            yield f"{name}{low:g}", mx.array(np.where(open_, 0, low).astype(np.float32)), open_, 0
    yield "bias", mx.array(np.where(heads, bias, -np.inf)), heads, bias


@pytest.mark.parametrize(("mask", "open_", "bias"), [m[1:] for m in masks()], ids=[m[0] for m in masks()])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_closed_places_have_no_probability_and_the_rest_is_the_softmax(mask, open_, bias, scale):
    q, k, v = inputs()
    p, written = reference(q, k, v, D**-0.5 if scale is None else scale, bias, open_)
    found = np.array(probabilities(q, k, scale, mask))
    np.testing.assert_allclose(found, p, atol=2e-6)
    assert (found[~np.broadcast_to(open_, p.shape)] == 0).all()
    np.testing.assert_array_equal(np.array(opened(mask)), open_)
    shown = []
    for made in (SoftmaxAttention(), ShownAttention(lambda *seen: shown.append(seen))):
        np.testing.assert_allclose(np.array(made(q, k, v, scale, mask)), written, atol=2e-5)
    np.testing.assert_array_equal(np.array(shown[0][0]), found)
    np.testing.assert_array_equal(np.array(shown[0][1]), open_)


@pytest.mark.parametrize(("mask", "open_", "bias"), [m[1:] for m in masks()], ids=[m[0] for m in masks()])
def test_half_precision_takes_the_same_masks(mask, open_, bias):
    """There MLX's own attention runs, in which a row without an open place is NaN."""
    q, k, v = inputs(mx.float16)
    written = reference(q, k, v, D**-0.5, bias, open_)[1]
    found = attention(q, k, v, mask=mask if mask.dtype == mx.bool_ else mask.astype(mx.float16))
    assert found.dtype == mx.float16
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), written, atol=2e-2)


def test_an_open_mask_is_none():
    q, k, v = inputs()
    for mask in (mx.ones((1, 1, 1, M), mx.bool_), mx.zeros((B, 1, N, M))):
        np.testing.assert_array_equal(np.array(attention(q, k, v, None, mask)), np.array(attention(q, k, v)))


def test_padded_keys_and_values_do_not_matter():
    q, k, v = inputs()
    mask = mx.array(KEYS[:, None, None, :])
    other = [mx.where(mask.swapaxes(-1, -2), x, 1e4) for x in (k, v)]
    np.testing.assert_array_equal(np.array(attention(q, *other, mask=mask)), np.array(attention(q, k, v, mask=mask)))


@pytest.mark.parametrize("log", [False, True])
def test_closed_places_stay_0_on_a_grid_that_has_no_0(log):
    q, k, _ = inputs()
    low = 0.05  # the least level of the uniform table
    shift = 0 if log else low + 8 * 0.0625
    table = ActivationTable(
        np.float32([0.5]), np.float32([1.0 if log else 0.0625]), np.float32([[shift]]), np.uint8([4]), np.array([log])
    )
    made, ones = QuantizedAttention(table, CLOCK), mx.ones((B, HEADS, M, 1))
    open_ = KEYS[:, None, None, :]
    with CLOCK.at(0.5):
        whole = np.array(made(q, k, mx.eye(M)[None, None] * ones, None, mx.array(open_)))
        exact = np.array(made(q, k, mx.eye(M)[None, None] * ones))
    assert (whole[~np.broadcast_to(open_, whole.shape)] == 0).all()
    if not log:
        assert exact.min() >= low - 1e-6
        assert whole[np.broadcast_to(open_, whole.shape)].min() >= low - 1e-6


def test_gradients_stop_at_closed_places():
    q, k, v = inputs()
    mask = mx.array(KEYS[:, None, None, :] & (np.arange(N) < 3)[:, None])

    def loss(function):
        return lambda q, k, v: mx.square(function(q, k, v)).sum()

    def plain(q, k, v):
        scores = (q * D**-0.5) @ k.swapaxes(-1, -2)
        return mx.where(mask, mx.softmax(mx.where(mask, scores, -1e9), axis=-1), 0) @ v

    for argument in range(3):
        ours, exact = (
            np.array(mx.grad(loss(f), argument)(q, k, v)) for f in (lambda *a: attention(*a, mask=mask), plain)
        )
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, exact, atol=1e-4 * np.abs(exact).max())
    assert not np.array(mx.grad(loss(lambda *a: attention(*a, mask=mask)))(q, k, v))[:, :, 3:].any()


def test_gradients_of_rows_without_an_open_place_are_no_nan():
    """Also where MLX's own attention runs, in half precision here and on Metal always."""
    q, k, v = inputs(mx.float16)
    closed = KEYS[:, None, None, :] & (np.arange(N) < 3)[:, None]
    for mask in (mx.array(closed), mx.array(np.where(closed, 0, -np.inf).astype(np.float16))):
        for argument in range(3):
            slope = mx.grad(lambda *a, mask=mask: mx.square(attention(*a, mask=mask)).sum(), argument)(q, k, v)
            assert np.isfinite(np.array(slope.astype(mx.float32))).all()
