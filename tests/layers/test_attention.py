"""The seam in attention: exact as it is, and with quantized probabilities."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.layers.attention import (
    QuantizedAttention,
    ShownAttention,
    SoftmaxAttention,
    find_attentions,
    find_quantized_attentions,
)
from mlxquant.layers.fast_cpu import attention
from mlxquant.layers.tree import set_module
from mlxquant.methods.inputs.tiers import quantized

from support.tiny_pictures import tiny_adapter

CLOCK = Clock()
SIGMA = np.float32([0.2, 0.6, 0.9])


def table(log=(True, False, True), width=1):
    step, shift = np.float32([1.0, 1 / 255, 0.8]), np.zeros((3, width), np.float32)
    shift[1] = 128 / 255
    return ActivationTable(SIGMA, step, shift, np.uint8([4, 8, 6]), np.array(log))


def inputs(dtype=mx.float32):
    return [2 * mx.random.normal((3, 4, 20, 16), key=mx.random.key(seed)).astype(dtype) for seed in range(3)]


def reference(q, k, v):
    q, k, v = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True), v


def test_the_seam_changes_nothing():
    q, k, v = inputs()
    np.testing.assert_array_equal(np.array(SoftmaxAttention()(q, k, v, scale=0.25)), np.array(attention(q, k, v)))
    p, values = reference(q, k, v)
    np.testing.assert_allclose(np.array(SoftmaxAttention()(q, k, v)), p @ values, atol=2e-5)


def test_it_shows_probabilities_and_writes_the_same():
    q, k, v = inputs()
    shown = []
    np.testing.assert_array_equal(
        np.array(ShownAttention(lambda p, opened: shown.append(p))(q, k, v)), np.array(SoftmaxAttention()(q, k, v))
    )
    np.testing.assert_allclose(np.array(shown[0]), reference(q, k, v)[0], atol=2e-6)


@pytest.mark.parametrize("t", [0, 1, 2])
def test_quantized_probabilities_are_those_of_the_table_at_the_clocks_time(t):
    q, k, v = inputs()
    made = QuantizedAttention(table(), CLOCK)
    p, values = reference(q, k, v)
    levels = quantized(made.table, t, p)
    with CLOCK.at(SIGMA[t]):
        found = np.array(made(q, k, v, scale=0.25))
    wrong = np.abs(found - levels @ values)
    assert np.quantile(wrong, 0.99) < 1e-4  # but where the last digit of a probability decides on its level
    assert np.abs(found - p @ values).max() > 1e-3


def test_a_batch_may_mix_noise_levels():
    q, k, v = inputs()
    made = QuantizedAttention(table(), CLOCK)
    with CLOCK.at(SIGMA):
        together = np.array(made(q, k, v))
    for t, sigma in enumerate(SIGMA):
        with CLOCK.at(sigma):
            np.testing.assert_allclose(together[t], np.array(made(*(x[t : t + 1] for x in (q, k, v))))[0], atol=1e-5)


def test_half_precision_comes_back_as_it_came():
    made = QuantizedAttention(table(), CLOCK)
    with CLOCK.at(0.2):
        assert made(*inputs(mx.float16)).dtype == mx.float16
    assert ShownAttention(lambda *shown: None)(*inputs(mx.float16)).dtype == mx.float16


@pytest.mark.parametrize("log", [(True, False, True), (False, False, False)])
def test_structure_and_parameters_bring_it_back(log):
    made = QuantizedAttention(table(log), CLOCK)
    again = QuantizedAttention.blank(json.loads(json.dumps(made.facts)), CLOCK)
    again.load_weights(list(made.parameters().items()))
    again.refresh()
    assert ("act_log" in again) == any(log)
    for sigma in (*SIGMA, 0.7):
        with CLOCK.at(sigma):
            np.testing.assert_array_equal(np.array(again(*inputs())), np.array(made(*inputs())))


def test_gradients_reach_queries_and_keys():
    q, k, v = inputs()
    made = QuantizedAttention(table(), CLOCK)
    with CLOCK.at(0.9):
        for index in (0, 1):
            slope = mx.grad(lambda *x: (made(*x) * v).sum(), argnums=index)(q, k, v)
            assert float(mx.abs(slope).max()) > 1e-3


def test_a_shift_a_channel_is_refused():
    with pytest.raises(AdapterError, match="one shift for all, found a table with shifts of width 4"):
        QuantizedAttention(table(width=4), CLOCK)


def test_without_a_timestep_it_says_so():
    with pytest.raises(AdapterError, match="no timestep"):
        QuantizedAttention(table(), CLOCK)(*inputs())


def test_they_are_found_where_they_are():
    adapter = tiny_adapter()
    paths = [f"multimodal_transformer_blocks.{i}.sdpa" for i in range(2)]
    assert sorted(adapter.attentions()) == paths
    set_module(adapter.module, paths[1], QuantizedAttention(table(), adapter.clock))
    assert list(adapter.attentions()) == list(find_attentions(adapter.module)) == paths[:1]
    assert list(find_quantized_attentions(adapter.module)) == paths[1:]
