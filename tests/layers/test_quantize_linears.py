"""Any module quantized in place: what is chosen, what is shared, what is refused, and what the report says."""

import doctest
import json
import re
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxquant as mq
from mlxquant.errors import AdapterError, NumericsError, RecipeError
from mlxquant.layers.convolutions import QuantizedConv2d
from mlxquant.layers.embeddings import QuantizedEmbedding
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.quantize_linears import parse_format, quantize_linears
from mlxquant.layers.weight_only import W8A16Linear
from mlxquant.spin_quant import SpinQuant

TOKENS = mx.array([[1, 2, 3], [4, 5, 6]])


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width, bias=False),
        )

    def __call__(self, x):
        return x + self.down(nn.gelu(self.up(self.norm(x))))


class Language(nn.Module):
    """A language model of blocks alone; ``tied`` reads the embedding as its output layer."""

    def __init__(self, width=32, tied=False):
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, width), [Block(width) for _ in range(2)]
        if not tied:
            self.lm_head = nn.Linear(width, 16, bias=False)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x) if "lm_head" in self else self.embed.as_linear(x)


def language(dtype=mx.float32, **options):
    mx.random.seed(0)
    model = Language(**options)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def arrays(model):
    return dict(tree_flatten(model.parameters()))


def unchanged(model, before):
    after = arrays(model)
    return set(after) == set(before) and all(mx.array_equal(after[name], before[name]).item() for name in before)


def test_the_usage_of_the_documentation_runs():
    assert doctest.testmod(sys.modules["mlxquant.layers.quantize_linears"], raise_on_error=True).attempted > 5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("format", ["w8a16", "w4a16-g32"])
def test_a_model_stays_near_and_in_its_dtype(dtype, format):
    model = language(dtype)
    exact = model(TOKENS).astype(mx.float32)
    quantize_linears(model, format, embeddings=True)
    y = model(TOKENS)
    assert y.dtype == dtype
    error = mx.linalg.norm(y.astype(mx.float32) - exact) / mx.linalg.norm(exact)
    assert 0 < error.item() < (0.03 if format == "w8a16" else 0.25)


def test_the_classes_follow_from_the_format():
    model = language()
    quantize_linears(model, "w8a16", embeddings=True)
    assert type(model.lm_head) is W8A16Linear
    assert type(model.embed) is QuantizedEmbedding
    model = language()
    quantize_linears(model, "w4a16-g32")
    assert type(model.lm_head) is QuantizedLinear
    assert type(model.embed) is nn.Embedding


@pytest.mark.parametrize(
    ("exclude", "include", "taken"),
    [
        (["lm_head"], None, {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"}),
        ("lm_head", "*.up", {"layers.0.up", "layers.1.up"}),
        (["layers.0"], None, {"layers.1.up", "layers.1.down", "lm_head"}),
        ([re.compile(r"layers\.\d+\.down")], None, {"layers.0.up", "layers.1.up", "lm_head"}),
        (["*.down", "lm_head"], ["layers.1"], {"layers.1.up"}),
        (["embed"], None, {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head"}),
    ],
)
def test_patterns_decide_what_is_taken(exclude, include, taken):
    model = language()
    report = quantize_linears(model, exclude=exclude, include=include)
    assert {layer.path for layer in report.layers} == taken
    assert {path for path, m in model.named_modules() if isinstance(m, QuantizedLinear)} == taken


def test_a_pattern_that_matches_nothing_is_an_error_and_changes_nothing():
    model = language()
    before = arrays(model)
    with pytest.raises(
        RecipeError, match=r"exclude pattern 'lm_heads' matches none of the model's 6 layers; such as: lm_head"
    ):
        quantize_linears(model, exclude=["lm_heads"])
    with pytest.raises(RecipeError, match="include pattern"):
        quantize_linears(model, include=["layers.7"])
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("text", "format"),
    [("w8a16", "w8"), ("w4a16-g64", "w4-g64"), ("w2-g32", "w2-g32"), ("w4", "w4"), ("w3a16-g128-sym", "w3-g128-sym")],
)
def test_formats_are_those_of_recipes(text, format):
    assert str(parse_format(text)) == format


def test_formats_that_need_calibration_or_do_not_exist_are_refused():
    with pytest.raises(
        RecipeError, match=r"'w4a8' quantizes activations to 8 bits, which needs calibration data: use mq.calibrate"
    ):
        parse_format("w4a8")
    for text in ("w9", "w1a16", "int8", "w4a16-g48", "", "w4a5"):
        with pytest.raises(RecipeError):
            parse_format(text)


def test_groups_that_do_not_fit_name_the_layer_or_fall_back():
    model = language(width=48)
    before = arrays(model)
    with pytest.raises(
        RecipeError, match=r"groups of 32 do not divide the width of 3 layers: layers\.0\.up \(48\).*fallback='w8a16'"
    ):
        quantize_linears(model, "w4a16-g32")
    assert unchanged(model, before)
    report = quantize_linears(model, "w4a16-g32", fallback="w8a16")
    assert {layer.path: layer.format for layer in report.layers} == {
        "layers.0.up": "w8", "layers.0.down": "w4-g32", "layers.1.up": "w8", "layers.1.down": "w4-g32", "lm_head": "w8",
    }  # fmt: skip


def test_a_broken_weight_is_named_and_nothing_is_changed():
    model = language()
    model.layers[1].down.weight[0, 0] = float("nan")
    before = arrays(model)
    with pytest.raises(NumericsError, match=r"layer layers\.1\.down: weight of shape \(32, 64\) holds 1 NaN"):
        quantize_linears(model)
    assert all(after is before[name] for name, after in arrays(model).items())


def test_the_same_layer_at_two_places_stays_one():
    model = language()
    model.layers[1].up = model.layers[0].up
    model._spare = model.lm_head  # a private place is one, too
    report = quantize_linears(model)
    assert model.layers[1].up is model.layers[0].up
    assert model._spare is model.lm_head
    assert isinstance(model.lm_head, QuantizedLinear)
    assert len(report.layers) == 4
    assert report.after == sum({id(v): v.nbytes for v in arrays(model).values()}.values())
    model = language()
    model.layers[1].up = model.layers[0].up
    report = quantize_linears(model, exclude=["layers.1.up"])  # it cannot be excluded at one place alone
    assert type(model.layers[0].up) is nn.Linear


def test_hidden_layers_stay_unless_they_are_parameters_elsewhere():
    model = language()
    model._alone, model._first = nn.Linear(32, 8), model.lm_head
    report = quantize_linears(model)
    assert type(model._alone) is nn.Linear
    assert model._first is model.lm_head
    assert "lm_head" in {layer.path for layer in report.layers}
    assert {layer.path: layer.reason for layer in report.kept}[
        "_alone"
    ] == "hidden, it is none of the model's parameters"


def test_layers_that_share_a_weight_share_its_codes():
    model = language()
    model.layers[1].up.weight = model.layers[0].up.weight
    model.layers[1].up.bias = mx.ones((64,))
    report = quantize_linears(model, "w4a16-g32")
    first, second = model.layers[0].up, model.layers[1].up
    assert all(first[name] is second[name] for name in ("weight", "scales", "biases"))
    assert first.bias is not second.bias
    assert report.after == sum({id(v): v.nbytes for v in arrays(model).values()}.values())


def test_a_weight_that_something_else_keeps_is_left_alone():
    model = language()
    model.lm_head.weight = model.embed.weight
    report = quantize_linears(model)
    assert model.lm_head.weight is model.embed.weight
    assert "shares its weight with embed.weight" in {layer.path: layer.reason for layer in report.kept}["lm_head"]
    quantize_linears(model, embeddings=True, include=["embed", "lm_head"])
    assert model.lm_head.weight is model.embed.weight
    x = mx.ones((1, 32))
    np.testing.assert_allclose(np.array(model.lm_head(x)), np.array(model.embed.as_linear(x)), atol=1e-6)


def test_a_tied_embedding_stays_tied():
    model = language(tied=True)
    report = quantize_linears(model, "w4a16-g32", embeddings=True, include=["embed"])
    rows = np.array(model.embed(mx.arange(16)))
    x = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    np.testing.assert_allclose(np.array(model.embed.as_linear(mx.array(x))), x @ rows.T, atol=1e-4)
    assert model(TOKENS).shape == (2, 3, 16)
    assert [layer.path for layer in report.layers] == ["embed"]


class Opinionated(Language):
    """Knows, as mlx-lm's models do, what becomes of its layers."""

    @property
    def quant_predicate(self):
        return lambda path, module: {"bits": 8, "group_size": 64} if path.endswith("up") else path != "lm_head"


def test_a_model_that_says_how_it_wants_to_be_quantized_is_asked():
    model = Opinionated()
    report = quantize_linears(model, "w4a16-g32")
    assert {layer.format for layer in report.layers if layer.path.endswith("up")} == {"w8-g32"}
    assert {layer.format for layer in report.layers if layer.path.endswith("down")} == {"w4-g32"}
    assert {layer.path: layer.reason for layer in report.kept}[
        "lm_head"
    ] == "refused by the model's own quant_predicate"
    assert [layer.path for layer in quantize_linears(model, include=["lm_head"]).layers] == ["lm_head"]


def test_layers_that_share_a_weight_and_want_other_bits_do_not_share_codes():
    model = Opinionated(width=64)
    model.layers[0].norm = nn.Linear(64, 128)
    model.layers[0].norm.weight = model.layers[0].up.weight
    exact = np.array(model.layers[0].up.weight)
    quantize_linears(model, "w4a16-g32")
    for layer, limit in ((model.layers[0].up, 0.01), (model.layers[0].norm, 0.1)):
        assert np.linalg.norm(np.array(layer.dequantized()) - exact) < limit * np.linalg.norm(exact)


class Scaled(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Renamed(nn.Linear):
    """Another name, the same function."""


class Adapted(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.lora = mx.zeros((2, 2))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.scaled, self.renamed, self.adapted, self.plain = (
            Scaled(32, 8),
            Renamed(32, 8),
            Adapted(32, 8),
            nn.Linear(32, 8),
        )
        self.stock, self.recurrent, self.conv = (
            nn.QuantizedLinear(32, 32, group_size=32),
            nn.LSTM(8, 4),
            nn.Conv2d(3, 4, 3),
        )


def test_what_computes_something_else_is_left_with_the_reason():
    model = Odd()
    report = quantize_linears(model, exclude=["plain"], convolutions=False)
    assert [layer.path for layer in report.layers] == ["renamed"]
    reasons = {layer.path: layer.reason for layer in report.kept}
    assert reasons == {
        "scaled": "computes something else than nn.Linear",
        "adapted": "computes something else than nn.Linear",
        "plain": "excluded by 'plain'",
        "stock": "quantized already",
        "recurrent": "no quantized form of LSTM here",
        "conv": "convolutions=True takes convolutions",
    }
    again = quantize_linears(model, include=["plain", "conv", "renamed"])
    assert isinstance(model.conv, QuantizedConv2d)
    assert {layer.path: layer.reason for layer in again.kept}["renamed"] == "quantized already"


def test_nothing_to_quantize_is_an_error():
    model = language()
    quantize_linears(model)
    with pytest.raises(
        RecipeError, match=r"nothing to quantize in Language: embed: embeddings=True takes embeddings; layers.0"
    ):
        quantize_linears(model)
    with pytest.raises(RecipeError, match=r"nothing to quantize in LayerNorm: it has no nn.Linear"):
        quantize_linears(nn.LayerNorm(4))
    with pytest.raises(RecipeError, match=r"itself one layer.*W8A16Linear\.from_linear"):
        quantize_linears(nn.Linear(8, 4))


def test_the_report_counts_what_is_stored():
    model = language()
    before = sum(value.nbytes for value in arrays(model).values())
    weights = sum(value.size for value in arrays(model).values())
    report = quantize_linears(model, "w4a16-g32", exclude=["lm_head"])
    assert report.before == before
    assert report.after == sum(value.nbytes for value in arrays(model).values())
    assert report.weights == weights
    assert report.bits_per_weight == pytest.approx(8 * report.after / weights)
    up = next(layer for layer in report.layers if layer.path == "layers.0.up")
    assert (up.kind, up.shape, up.before, up.after) == ("Linear", (64, 32), 64 * 32 * 4, 64 * 32 // 2 + 64 * 2 * 2)
    assert 0.01 < up.error < 0.2
    again = quantize_linears(model, include=["lm_head"])
    assert again.weights == weights  # packed layers count what they stand for
    assert again.before == report.after
    text = str(report)
    assert re.search(r"layers\.\*\.up +2 +Linear +w4-g32 +0\.\d{4} +0\.016 +0\.003", text)
    assert "kept: embed x1, 0.002 MB: embeddings=True takes embeddings" in text
    assert f"{report.ratio:.2f} times smaller" in text
    assert json.loads(json.dumps(report.facts))["bits_per_weight"] == report.bits_per_weight


def test_packed_layers_of_mlx_count_what_they_stand_for():
    model = language(width=64)
    weights = sum(value.size for value in arrays(model).values())
    nn.quantize(model.layers[0], group_size=32, bits=4)
    assert quantize_linears(model).weights == weights


def test_the_names_are_exported():
    assert mq.quantize_linears is quantize_linears
    assert mq.W8A16Linear is W8A16Linear
    assert mq.QuantizedConv2d is QuantizedConv2d
    assert mq.SpinQuant is SpinQuant


def test_what_is_no_pattern_no_format_and_no_module_is_said_so():
    for wrong in (3, None, ["lm_head", 3]):
        with pytest.raises(RecipeError, match="a pattern is a glob"):
            mq.quantize_linears(Language(), exclude=wrong)
    with pytest.raises(RecipeError, match="a format is text"):
        mq.quantize_linears(Language(), 8)
    with pytest.raises(AdapterError, match="found dict"):
        mq.quantize_linears({"layer": 1})
