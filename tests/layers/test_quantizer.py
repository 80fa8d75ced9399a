"""``Quantizer(model, layer_class, exclude)``: a class of layers in the places of linears."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant import Quantizer, W8A16Linear, W8A16LinearLayer
from mlxquant.errors import AdapterError, NumericsError, RecipeError
from mlxquant.layers.tree import parameters


class MyCustomModel(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = [nn.Linear(64, 64, bias=bias) for _ in range(2)]
        self.conv = nn.Conv1d(64, 64, 1)
        self.lm_head = nn.Linear(64, 50, bias=False)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = nn.relu(block(x))
        return self.lm_head(self.conv(x))


class HalfLinear(nn.Module):
    """Anybody's class: weights as float16 numbers."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.half = mx.zeros((out_features, in_features), mx.float16)
        if bias:
            self.bias = mx.zeros((out_features,))

    def quantize(self, weights):
        self.half = weights.astype(mx.float16)

    def __call__(self, x):
        y = x @ self.half.astype(mx.float32).T
        return y + self.bias if "bias" in self else y


def built():
    mx.random.seed(0)
    model = MyCustomModel()
    mx.eval(model.parameters())
    return model


def test_the_documented_lines():
    model, input_data = built(), mx.array([[1, 2, 3]])
    exact = model(input_data)
    Quantizer(model, W8A16LinearLayer, ["lm_head"])
    output = model(input_data)
    found = {
        name: module.scales.shape for name, module in model.named_modules() if isinstance(module, W8A16LinearLayer)
    }
    assert found == {"blocks.0": (64, 1), "blocks.1": (64, 1)}
    assert type(model.lm_head) is nn.Linear
    assert type(model.conv) is nn.Conv1d  # linears alone
    error = np.array(mx.abs(output - exact).max() / mx.abs(exact).max())
    assert 0 < error < 0.02


def test_it_does_to_linears_what_quantize_linears_does():
    ours, theirs = built(), built()
    found = Quantizer(ours, W8A16LinearLayer, ["lm_head"]).report
    expected = mq.quantize_linears(theirs, "w8a16", exclude=["lm_head"], convolutions=False)
    assert found == expected
    for name, value in parameters(theirs).items():
        np.testing.assert_array_equal(np.array(parameters(ours)[name]), np.array(value))


def test_the_layer_has_one_class_and_two_names():
    assert W8A16LinearLayer is W8A16Linear is mq.W8A16LinearLayer
    layer = W8A16LinearLayer(in_features=512, out_features=256, bias=True)
    original_weights = mx.random.normal((256, 512), key=mx.random.key(0))
    assert layer.quantize(original_weights) is layer
    assert layer(mx.ones((2, 512))).shape == (2, 256)


def test_a_class_of_ones_own():
    model = built()
    bias = np.array(model.blocks[0].bias)
    report = Quantizer(model, HalfLinear, ["lm_head"]).report
    assert [type(block) for block in model.blocks] == [HalfLinear, HalfLinear]
    np.testing.assert_array_equal(np.array(model.blocks[0].bias), bias)
    one = report.layers[0]
    assert (one.format, one.before, one.after) == ("HalfLinear", 4 * 64 * 64, 2 * 64 * 64)
    assert 1e-5 < one.error < 1e-3


def test_a_layer_at_two_places_stays_one():
    model = built()
    model.blocks[1] = model.blocks[0]
    Quantizer(model, W8A16LinearLayer, [])
    assert model.blocks[1] is model.blocks[0]


def test_a_name_that_the_model_does_not_have_is_told_and_excludes_nothing():
    model = built()
    del model.lm_head
    with pytest.warns(UserWarning, match="'lm_head' matches none of the model's .*; nothing is excluded by it"):
        Quantizer(model, W8A16LinearLayer, ["lm_head", "blocks.1"])
    assert type(model.blocks[1]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Quantizer(built(), W8A16LinearLayer, "lm_head")


def test_the_model_of_load_and_a_bare_linear():
    model = mq.load("gpt-python")
    before = model.predict("import os\n" * 40, limit=1).bits_per_character
    with pytest.warns(UserWarning, match="lm_head"):
        Quantizer(model, W8A16LinearLayer, ["lm_head"])
    assert model.predict("import os\n" * 40, limit=1).bits_per_character == pytest.approx(before, abs=0.01)
    with pytest.raises(RecipeError, match="itself one layer"):
        Quantizer(nn.Linear(4, 4), W8A16LinearLayer)


@pytest.mark.parametrize("wrong", ["w4a16", nn.Linear, W8A16Linear(4, 4), None, dict])
def test_what_is_no_class_of_such_layers_is_refused(wrong):
    with pytest.raises(AdapterError, match="takes a class of MLX modules with quantize"):
        Quantizer(built(), wrong, ["lm_head"])


def test_an_error_names_the_layer_and_changes_nothing():
    model = built()
    model.blocks[1].weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"^layer blocks\.1: "):
        Quantizer(model, W8A16LinearLayer, [])
    assert type(model.blocks[0]) is nn.Linear
    with pytest.raises(RecipeError, match="nothing to quantize"):
        Quantizer(built(), W8A16LinearLayer, ["*"])
    with pytest.raises(AdapterError, match="found list; pass the module"):
        Quantizer([1, 2], W8A16LinearLayer, [])
