"""Rotations fold into language models without changing them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.layers.tree import get_module, parameters, swapped, tapped
from mlxquant.models.gpt.adapter import GPTAdapter
from mlxquant.models.gpt.tokenizers import CharTokenizer
from mlxquant.models.turned_norm import TurnedNorm
from mlxquant.numerics import cayley
from mlxquant.spin_quant.held_heads import key_rotation
from mlxquant.spin_quant.residual_stream import residual_stream, untie
from mlxquant.spin_quant.rotations import folded, hold_heads, rotate, start

from support.language_models import tiny_gpt, tiny_mlx_lm, tokens

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
mlxlm = pytest.mark.mlxlm
MODELS = [
    pytest.param(tiny_gpt, id="gpt"),
    pytest.param(lambda: tiny_mlx_lm("gpt2"), id="mlx-lm-gpt2", marks=mlxlm),
    pytest.param(lambda: tiny_mlx_lm("llama", tie_word_embeddings=True), id="llama-tied", marks=mlxlm),
    pytest.param(
        lambda: tiny_mlx_lm("llama", tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        id="llama",
        marks=mlxlm,
    ),
    pytest.param(lambda: tiny_mlx_lm("mistral", tie_word_embeddings=False), id="mistral", marks=mlxlm),
    pytest.param(lambda: tiny_mlx_lm("qwen2", tie_word_embeddings=True), id="qwen2", marks=mlxlm),
    pytest.param(lambda: tiny_mlx_lm("qwen3", tie_word_embeddings=False), id="qwen3", marks=mlxlm),
]


@pytest.fixture(params=MODELS)
def model(request):
    if request.node.get_closest_marker("mlxlm"):
        pytest.importorskip("mlx_lm")
    return request.param()


def arrays(rotations):
    return {
        "residual": mx.array(rotations["residual"], mx.float32),
        "values": [mx.array(v, mx.float32) for v in rotations["values"]],
    }


def logits(model, seed=0):
    return np.array(model(mx.array(tokens(seed=seed))))


def assert_same(found, expected):
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", cayley.STARTS)
def test_the_function_stays_the_same(model, kind):
    expected = logits(model)
    rotate(model, arrays(start(residual_stream(model), kind, 1)))
    assert_same(logits(model), expected)


def test_every_weight_of_the_blocks_is_turned(model):
    stream = residual_stream(model)
    before = {path: np.array(get_module(model, path).weight) for path in (*stream.linears, *stream.embeddings)}
    rotate(model, arrays(start(stream, "random", 1)))
    for path, weight in before.items():
        assert np.abs(np.array(get_module(model, path).weight) - weight).max() > 0.05, path


def test_norms_of_the_blocks_are_plain_afterwards(model):
    stream = residual_stream(model)
    rotate(model, arrays(start(stream, "hadamard", 1)))
    for path in stream.norms:
        norm = get_module(model, path)
        assert (np.array(norm.weight) == 1).all()
        assert "bias" not in norm or not np.array(norm.bias).any()


def test_the_stream_itself_is_rotated(model):
    """Between the first block and the last norm, x became x R, and behind a LayerNorm without its mean."""
    stream = residual_stream(model)
    rotations = start(stream, "random", 2)

    def seen(path):
        found = []
        with tapped(model, [path], lambda _, x: found.append(np.array(x))):
            model(mx.array(tokens()))
        return found[0]

    second = list(stream.norms)[2]
    before = seen(second)
    rotate(model, arrays(rotations))
    after = seen(second)
    if stream.centred:
        before, after = (x - x.mean(-1, keepdims=True) for x in (before, after))
    np.testing.assert_allclose(after, before @ rotations["residual"], atol=1e-4 * np.abs(before).max())


def test_writers_behind_layer_norms_write_no_mean():
    model = tiny_gpt()
    stream = residual_stream(model)
    rotate(model, arrays(start(stream, "hadamard", 0)))
    for path in stream.writers:
        layer = get_module(model, path)
        np.testing.assert_allclose(np.array(layer.weight).sum(0), 0, atol=1e-5)
        np.testing.assert_allclose(np.array(layer.bias).sum(), 0, atol=1e-5)
    np.testing.assert_allclose(np.array(model.model.wpe.weight).sum(1), 0, atol=1e-5)


def test_a_layer_norm_needs_a_rotation_that_keeps_ones():
    """The law is no empty one: another rotation changes the function."""
    model = tiny_gpt()
    expected, stream = logits(model), residual_stream(model)
    rotations = start(stream, "random", 0)
    rotations["residual"] = cayley.random_rotation(32, False, np.random.default_rng(0))
    rotate(model, arrays(rotations))
    assert np.abs(logits(model) - expected).max() > 0.01 * np.abs(expected).max()


def test_folding_looks_and_does_not_touch():
    model = tiny_gpt()
    expected = logits(model)
    linears = folded(model, residual_stream(model))
    np.testing.assert_array_equal(logits(model), expected)
    norm, reader = model.model.h[0].ln_1, model.model.h[0].attn.c_attn
    weight, gain, bias = (np.array(value, np.float64) for value in (reader.weight, norm.weight, norm.bias))
    np.testing.assert_allclose(linears["model.h.0.attn.c_attn"].weight, weight * gain, rtol=1e-6)
    np.testing.assert_allclose(linears["model.h.0.attn.c_attn"].bias, np.array(reader.bias) + weight @ bias, atol=1e-5)


def test_a_tied_gpt_keeps_its_gain_in_a_turned_norm():
    model = tiny_gpt()
    gain = np.array(model.model.ln_f.weight)
    assert not rotate(model, arrays(start(residual_stream(model), "hadamard", 0)))
    assert isinstance(model.model.ln_f, TurnedNorm)
    np.testing.assert_array_equal(np.array(model.model.ln_f.norm.weight), gain)
    with pytest.raises(AdapterError, match="rotated already"):
        residual_stream(model)


def test_a_rotated_gpt_is_quantized_like_any_other():
    """Its adapter cuts it into the same chain, and that is still the model."""
    model = tiny_gpt()
    rotate(model, arrays(start(residual_stream(model), "hadamard", 0)))
    adapter = GPTAdapter(model, CharTokenizer("abc"), {})
    adapter.check_chain(mx.array(tokens()))
    np.testing.assert_allclose(np.array(adapter.logits(mx.array(tokens()))), logits(model), atol=1e-5)
    linears = {path for path, layer in adapter.layers().items() if isinstance(layer, nn.Linear)}
    assert linears == {f"model.h.{i}.{name}" for i in (0, 1) for name in LINEARS}


@mlxlm
def test_a_tied_llama_is_untied_and_stays_stock():
    """What is saved loads in a fresh model of mlx-lm whose config says that it is not tied."""
    pytest.importorskip("mlx_lm")
    model = tiny_mlx_lm("llama", tie_word_embeddings=True)
    expected = logits(model)
    assert rotate(model, arrays(start(residual_stream(model), "hadamard", 0)))
    fresh = tiny_mlx_lm("llama", tie_word_embeddings=False)
    fresh.load_weights(list(parameters(model).items()), strict=True)
    assert_same(logits(fresh), expected)


@mlxlm
def test_untying_changes_nothing_and_happens_once():
    pytest.importorskip("mlx_lm")
    model = tiny_mlx_lm("qwen2", tie_word_embeddings=True)
    expected = logits(model)
    assert untie(model)
    np.testing.assert_array_equal(logits(model), expected)
    assert not untie(model)
    assert not untie(tiny_gpt())


@mlxlm
def test_half_precision_models_stay_so():
    pytest.importorskip("mlx_lm")
    model = tiny_mlx_lm("llama", tie_word_embeddings=False)
    model.set_dtype(mx.bfloat16)
    rotate(model, arrays(start(residual_stream(model), "hadamard", 0)))
    assert {value.dtype for value in parameters(model).values()} == {mx.bfloat16}


def test_another_family_is_refused_by_name():
    with pytest.raises(AdapterError, match="Sequential"):
        residual_stream(nn.Sequential(nn.Linear(2, 2)))


def test_a_quantized_layer_cannot_be_rotated():
    model = tiny_gpt()
    model.model.h[1].mlp.c_fc = nn.QuantizedLinear(32, 128, group_size=32)
    with pytest.raises(AdapterError, match=r"model.h.1.mlp.c_fc is a QuantizedLinear"):
        residual_stream(model)


def test_r3_rotates_queries_and_keys_and_rounds_what_is_held():
    model = tiny_gpt()
    expected, stream = logits(model), residual_stream(model)
    np.testing.assert_allclose(np.array(key_rotation(16)) @ np.array(key_rotation(16)).T, np.eye(16), atol=1e-6)
    errors = {}
    for bits in (4, 8):
        with swapped(model, hold_heads(model, stream, bits)):
            errors[bits] = np.abs(logits(model) - expected).max()
    assert 0 < errors[8] < errors[4] / 4
    np.testing.assert_array_equal(logits(model), expected)


@mlxlm
def test_r3_goes_behind_rope():
    pytest.importorskip("mlx_lm")
    model = tiny_mlx_lm("llama", tie_word_embeddings=False)
    expected, stream = logits(model), residual_stream(model)
    with swapped(model, hold_heads(model, stream, 8)):
        found = logits(model)
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
