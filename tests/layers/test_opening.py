"""Attention in a function of anybody's: found, opened, quantized, and written with the module."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.core.fast import scaled_dot_product_attention

import mlxquant as mq
from mlxquant.errors import ArtifactError
from mlxquant.layers.attention import ShownAttention, find_attentions, find_quantized_attentions
from mlxquant.layers.opening import PLACE, open_attention
from mlxquant.layers.tree import set_module


class Attention(nn.Module):
    """Calls MLX's function among the globals of this file."""

    def __init__(self, width=32, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def __call__(self, x):
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3) for part in mx.split(self.qkv(x), 3, -1)
        )
        y = scaled_dot_product_attention(q, k, v, scale=1 / mx.sqrt(q.shape[-1]), mask=None)
        return self.out(y.transpose(0, 2, 1, 3).reshape(x.shape))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = [Attention() for _ in range(2)]

    def __call__(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def net():
    mx.random.seed(0)
    return Net()


X = mx.random.normal((1, 6, 32), key=mx.random.key(1))


def opened(net):
    for block in net.blocks:
        open_attention(block, globals())
    return net


def test_what_is_opened_computes_the_same(net):
    before, function = net(X), scaled_dot_product_attention
    opened(opened(net))  # twice is once
    np.testing.assert_allclose(np.array(net(X)), np.array(before), atol=1e-6)
    assert scaled_dot_product_attention is function
    assert type(net.blocks[0]).__name__ == "Attention"
    assert isinstance(net.blocks[0], Attention)
    assert sorted(find_attentions(net)) == [f"blocks.{index}.{PLACE}" for index in range(2)]


def test_the_attention_at_its_place_is_the_one_that_runs(net):
    seen = []
    opened(net)
    set_module(net, f"blocks.1.{PLACE}", ShownAttention(lambda p, mask: seen.append(p)))
    net(X)
    (p,) = seen
    assert p.shape == (1, 2, 6, 6)
    np.testing.assert_allclose(np.array(p.sum(-1)), 1, atol=1e-5)


def test_an_error_inside_leaves_the_function_as_it_was(net):
    function = scaled_dot_product_attention

    def fails(*given):
        raise ValueError("here")

    opened(net)
    set_module(net, f"blocks.0.{PLACE}", ShownAttention(fails))
    with pytest.raises(ValueError, match="here"):
        net(X)
    assert scaled_dot_product_attention is function


def test_probabilities_are_quantized_with_a_recorded_module_and_written(net, tmp_path):
    opened(net)
    with mq.recording(net) as seen:
        exact = net(X)
    mq.quantize_module(net, seen, "rtn+softmax8-w8a16")
    assert len(find_quantized_attentions(net)) == 2
    wrote = net(X)
    assert 0 < float(mx.abs(wrote - exact).max()) < 0.1
    file = mq.save_module(net, tmp_path / "net.safetensors")
    again = mq.load_module(opened(Net()), file)
    np.testing.assert_array_equal(np.array(again(X)), np.array(wrote))
    with pytest.raises(ArtifactError, match=r"its attention at blocks\.\d\.softmax_attention is quantized"):
        mq.load_module(Net(), file)


def test_several_rounds_call_the_pipeline_again(net):
    opened(net)
    rounds = []

    def record():
        with mq.recording(net) as seen:
            rounds.append(net(X))
        return seen

    seen = record()
    report = mq.quantize_module(net, seen, "gptq+progressive-w4a16", again=record)
    assert len(rounds) == 2
    assert not mx.array_equal(*rounds)  # the second time it was quantized
    assert {layer.format for layer in report.sizes.layers} == {"w4"}
    assert all(0 < layer.error < 0.2 for layer in report.sizes.layers)  # of the weights in full precision


def test_a_module_that_fails_between_rounds_is_as_it_was(net):
    opened(net)
    with mq.recording(net) as seen:
        exact = net(X)

    def fails():
        raise ValueError("no pipeline")

    with pytest.raises(ValueError, match="no pipeline"):
        mq.quantize_module(net, seen, "gptq+progressive-w4a16", again=fails)
    np.testing.assert_array_equal(np.array(net(X)), np.array(exact))
