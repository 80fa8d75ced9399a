"""The integers behind a trained model: exactly what it was trained through, and no larger than they say."""

import mlxquant  # noqa: F401  (before mlx, so that MLX gets a fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.layers.embeddings import QuantizedEmbedding
from mlxquant.layers.linear import QuantizedLinear, find_quantized
from mlxquant.layers.tree import get_module
from mlxquant.qat.integer import RowParts, quantized_values, quantizing_weights, to_integer_layers

from support.small_gpt import CONFIG, prepared, tokens

METHODS = ["symmetric_quant", "affine_quant", "stochastic_quant", "ternary_quant"]
LINEARS = {"linear_variant_attn": "quantized_linear", "linear_variant_mlp": "quantized_linear"}
EMBEDDINGS = {"quantize_wte": True, "quantize_wpe": True}


def expected_weights(model):
    model.eval()
    return {path: np.array(layer.rounded(mx.float32)) for path, layer in quantizing_weights(model).items()}


@pytest.mark.parametrize("size", [1, 1e-6])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("method", METHODS)
def test_integer_layers_hold_the_weights_bit_for_bit(method, bits, size):
    given = {**LINEARS, **EMBEDDINGS, "quantize_linear_method": method, "quantize_linear_bits": bits}
    model, _ = prepared(given)
    for layer in quantizing_weights(model).values():
        layer.weight = layer.weight * size
    weights, logits = expected_weights(model), np.array(model(tokens()))
    integer = to_integer_layers(model)
    assert not quantizing_weights(integer)
    layers = find_quantized(integer)
    assert set(layers) == set(weights)
    for path, layer in layers.items():
        assert layer.scales.dtype == (mx.float16 if size == 1 else mx.float32)
        assert layer.format.bits == (2 if method == "ternary_quant" else bits)
        assert layer.format.symmetric == (method != "affine_quant")
        np.testing.assert_array_equal(np.array(layer.dequantized()), weights[path])
        assert isinstance(layer, QuantizedEmbedding) == path.startswith("model.w")
    np.testing.assert_allclose(np.array(integer(tokens())), logits, atol=2e-4)


def test_ternary_codes_are_three_of_two_bits_and_share_a_scale():
    model, _ = prepared({**LINEARS, "quantize_linear_method": "ternary_quant"})
    layers = find_quantized(to_integer_layers(model))
    for path, layer in layers.items():
        assert set(np.unique(layer.codes())) == {1, 2, 3}
        shared = 3 if path.endswith("c_attn") else 1
        assert len(np.unique(np.array(layer.scales))) == shared
        assert layer.format.group == ("channel" if shared > 1 else "tensor")
        weights = layer.shape[0] * layer.shape[1]
        assert layer.nbytes == weights * 2 / 8 + 2 * layer.scales.size


def test_rows_with_different_bits_become_layers_of_their_own():
    given = {"linear_variant_q": "quantized_linear", "linear_variant_v": "quantized_linear",
    "quantize_linear_q_bits": 4,
             "quantize_linear_v_method": "affine_quant"}  # fmt: skip
    model, _ = prepared(given)
    weights, logits = expected_weights(model), np.array(model(tokens()))
    integer = to_integer_layers(model)
    for path, weight in weights.items():
        layer = get_module(integer, path)
        assert isinstance(layer, RowParts)
        q, k, v = layer.parts
        assert (type(q), type(k), type(v)) == (QuantizedLinear, nn.Linear, QuantizedLinear)
        assert (q.format.bits, v.format.bits, v.format.symmetric) == (4, 8, False)
        found = [np.array(q.dequantized()), np.array(k.weight), np.array(v.dequantized())]
        np.testing.assert_array_equal(np.concatenate(found), weight)
    np.testing.assert_allclose(np.array(integer(tokens())), logits, atol=2e-4)


def test_rows_of_which_all_are_quantized_may_differ_in_bits():
    model, _ = prepared({**LINEARS, "quantize_linear_k_bits": 3})
    weights = expected_weights(model)
    integer = to_integer_layers(model)
    for path, weight in weights.items():
        layer = get_module(integer, path)
        layers = layer.parts if path.endswith("c_attn") else [layer]
        assert [own.format.bits for own in layers] == ([8, 3, 8] if path.endswith("c_attn") else [8])
        np.testing.assert_array_equal(np.concatenate([np.array(own.dequantized()) for own in layers]), weight)


def test_activations_stay_rounded():
    model, _ = prepared({**LINEARS, "quantize_attn_act": True, "quantize_attn_act_bits": 3})
    model.eval()
    logits = np.array(model(tokens()))
    plain = np.array(prepared(LINEARS)[0](tokens()))
    integer = np.array(to_integer_layers(model)(tokens()))
    assert np.abs(integer - logits).mean() < 0.05 * np.abs(logits - plain).mean()


@pytest.mark.parametrize("method", METHODS)
def test_quantized_values_are_the_weights(method):
    model, _ = prepared({**LINEARS, **EMBEDDINGS, "quantize_linear_method": method, "quantize_linear_bits": 4})
    weights, values = expected_weights(model), quantized_values(model)
    found = {}
    for name in (name.removesuffix(".codes") for name in values if name.endswith(".codes")):
        codes, scale, zero = (np.array(values[f"{name}.{kind}"]) for kind in ("codes", "scale", "zero_point"))
        assert codes.dtype == np.int8
        assert int(np.array(values[f"{name}.bits"])) == (2 if method == "ternary_quant" else 4)
        assert -(2 ** (4 - 1)) <= codes.min() <= codes.max() < 2 ** (4 - 1)
        found[name] = scale * (codes.astype(np.float64) - zero)
    for path, weight in weights.items():
        thirds = [found[f"{path}.{part}"] for part in "qkv"] if path.endswith("c_attn") else [found[path]]
        np.testing.assert_allclose(np.concatenate(thirds), weight, atol=1e-5)
    assert len(found) == 6 * CONFIG.n_layer + 2
