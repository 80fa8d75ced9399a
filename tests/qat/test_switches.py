"""Every switch does what it says: its tensor is on a grid of its bits, nothing else is touched, and gradients reach the
weights.
"""

import mlxquant  # noqa: F401  (before mlx, so that MLX gets a fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.layers.tree import get_module, parameters, set_module
from mlxquant.methods.registry import members
from mlxquant.models.gpt.network import Seam
from mlxquant.qat.convert import quantizing_points
from mlxquant.qat.integer import quantizing_weights
from mlxquant.qat.options import EMBEDDINGS, POINTS, PROJECTIONS
from mlxquant.qat.training import loss

from support.small_gpt import CONFIG, prepared, random_gpt, tokens

METHODS = [method.name for method in members("fake")]
PLACES = [(group, point) for group, points in POINTS.items() for point in points]
every_place = pytest.mark.parametrize(("group", "point"), PLACES)
every_projection = pytest.mark.parametrize("name", PROJECTIONS)
QUANTIZED = "quantized_linear"


class Watched(nn.Module):
    """Passes a call on and keeps what came out."""

    def __init__(self, module):
        super().__init__()
        self._module, self._seen = module, []

    def __call__(self, x):
        self._seen.append((x, self._module(x)))
        return self._seen[-1][1]


def seams(model):
    return {path for path, module in model.named_modules() if type(module) is Seam}


def through(model, path):
    """What came into a point and out of it, as a token passed the model."""
    watched = Watched(get_module(model, path))
    set_module(model, path, watched)
    mx.eval(model(tokens()))
    (before, after), *more = watched._seen
    assert not more
    return np.array(before), np.array(after)


def gradients(model):
    value, found = nn.value_and_grad(model, lambda: loss(model, tokens(seed=1), tokens(seed=2)))()
    mx.eval(value, found)
    return parameters(found)


@every_place
def test_a_point_is_rounded_to_its_bits_and_no_other_is(group, point):
    switch = f"quantize_{group}_act_{point}"
    for bits in (2, 4, 8):
        model, _ = prepared({switch: True, f"{switch}_bits": bits})
        own = {f"model.h.{block}.{group}.{point}" for block in range(CONFIG.n_layer)}
        assert set(quantizing_points(model)) == own
        assert seams(model) == seams(random_gpt()) - own
        assert not quantizing_weights(model)
        for path in own:
            before, after = through(model, path)
            assert 1 < len(np.unique(after)) <= 2**bits < len(np.unique(before)) or bits == 8
            assert len(np.unique(after)) <= 2**bits
            span = max(before.max(), 0) - min(before.min(), 0)
            assert np.abs(after - before).max() <= 0.501 * span / (2**bits - 1)


@every_place
def test_the_bits_of_all_points_reach_each(group, point):
    model, _ = prepared({f"quantize_{group}_act": True, f"quantize_{group}_act_bits": 2})
    assert set(quantizing_points(model)) == {
        f"model.h.{b}.{group}.{p}" for b in range(CONFIG.n_layer) for p in POINTS[group]
    }
    _, after = through(model, f"model.h.1.{group}.{point}")
    assert len(np.unique(after)) <= 4


@every_place
def test_gradients_reach_every_weight_through_a_point(group, point):
    model, _ = prepared({f"quantize_{group}_act_{point}": True, f"quantize_{group}_act_{point}_bits": 4})
    plain = gradients(random_gpt())
    for path, found in gradients(model).items():
        cosine = (found * plain[path]).sum() / (mx.linalg.norm(found) * mx.linalg.norm(plain[path]))
        assert path.endswith("c_attn.bias") or cosine.item() > 0.5, (
            path
        )  # a bias of keys has no effect, and so no gradient


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", POINTS)
def test_the_method_of_activations_is_the_one_that_was_chosen(group, method):
    model, _ = prepared({f"quantize_{group}_act": True, "activations_quant_method": method})
    for path, point in quantizing_points(model).items():
        assert point.quantizer.method == method
        before, after = through(model, path)
        if method != "stochastic_quant":
            np.testing.assert_allclose(after, np.array(point.quantizer.code(mx.array(before)).values), atol=1e-6)
        assert len(np.unique(after)) <= (3 if method == "ternary_quant" else 256)


def test_a_scale_for_each_token_depends_on_no_other_token():
    given = {
        "quantize_attn_act": True,
        "quantize_attn_act_softmax_input": False,
        "quantize_mlp_act": True,
        "quantize_attn_act_bits": 4,
    }
    whole, other = np.array(tokens()), np.array(tokens())
    other[:, 8:] = (other[:, 8:] + 1) % CONFIG.vocab_size
    for scale, same in (("token", True), ("tensor", False)):
        model, _ = prepared({**given, "activations_quant_scale": scale})
        model.eval()
        one, two = (np.array(model(mx.array(some)))[:, :8] for some in (whole, other))
        assert np.array_equal(one, two) == same


@pytest.mark.parametrize("method", METHODS)
@every_projection
def test_a_projection_is_rounded_and_no_other_rows_are(name, method):
    given = {
        f"linear_variant_{name}": QUANTIZED,
        f"quantize_linear_{name}_method": method,
        f"quantize_linear_{name}_bits": 3,
    }
    model, _ = prepared(given)
    plain, projection = random_gpt(), PROJECTIONS[name]
    own = {f"model.h.{block}.{projection.path}" for block in range(CONFIG.n_layer)}
    assert set(quantizing_weights(model)) == own
    assert seams(model) == seams(plain)
    for path in own:
        weight = np.array(get_module(plain, path).weight)
        model.eval()
        rounded = np.array(get_module(model, path).rounded(mx.float32))
        parts, before = np.split(rounded, projection.parts), np.split(weight, projection.parts)
        for number, (part, was) in enumerate(zip(parts, before, strict=True)):
            if number == projection.part:
                assert all(1 < len(np.unique(row)) <= 8 for row in part)
                assert not np.array_equal(part, was)
                assert len(np.unique(part)) <= 3 or method != "ternary_quant"
            else:
                assert np.array_equal(part, was)


@every_projection
def test_the_group_of_a_projection_switches_it_on(name):
    projection = PROJECTIONS[name]
    given = {f"linear_variant_{projection.group}": QUANTIZED, "quantize_linear_method": "ternary_quant"}
    layer = quantizing_weights(prepared(given)[0])[f"model.h.0.{projection.path}"]
    assert layer.quantizers[projection.part].method == "ternary_quant"
    layer = quantizing_weights(
        prepared({**given, "quantize_linear_method": "affine_quant", "quantize_linear_bits": 5})[0]
    )[f"model.h.1.{projection.path}"]
    assert (layer.quantizers[projection.part].method, layer.quantizers[projection.part].bits) == ("affine_quant", 5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_weight_through_quantized_linears(method):
    given = {"linear_variant_attn": QUANTIZED, "linear_variant_mlp": QUANTIZED, "quantize_linear_method": method}
    model, _ = prepared({**given, "quantize_wte": True, "quantize_wpe": True})
    plain = gradients(random_gpt())
    for path, found in gradients(model).items():
        assert found.shape == plain[path].shape
        assert mx.abs(found).max().item() > 0, path
        if method != "ternary_quant":
            cosine = (found * plain[path]).sum() / (mx.linalg.norm(found) * mx.linalg.norm(plain[path]))
            assert path.endswith("c_attn.bias") or cosine.item() > 0.5, path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_rounded_where_it_is_read(name, method):
    model, _ = prepared({f"quantize_{name}": True, f"quantize_{name}_bits": 2, f"quantize_{name}_method": method})
    path = f"model.{name}"
    assert set(quantizing_weights(model)) == {path}
    model.eval()
    embedding = get_module(model, path)
    table = np.array(embedding.rounded(mx.float32))
    assert all(1 < len(np.unique(row)) <= 4 for row in table)
    ids = mx.array([[3, 1, 3]])
    assert np.array_equal(np.array(embedding(ids))[0], table[[3, 1, 3]])
    x = mx.random.normal((2, CONFIG.n_embd), key=mx.random.key(0))
    np.testing.assert_allclose(np.array(embedding.as_linear(x)), np.array(x) @ table.T, atol=1e-4)
    assert not np.array_equal(np.array(model(tokens())), np.array(random_gpt()(tokens())))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_method_and_bits_of_weights_reach_an_embedding(name):
    model, _ = prepared({f"quantize_{name}": True, "quantize_linear_method": "affine_quant", "quantize_linear_bits": 6})
    (quantizer,) = quantizing_weights(model)[f"model.{name}"].quantizers
    assert (quantizer.method, quantizer.bits) == ("affine_quant", 6)


def test_nothing_is_replaced_where_nothing_is_switched_on():
    model, _ = prepared({})
    assert [type(m) for _, m in model.named_modules()] == [type(m) for _, m in random_gpt().named_modules()]
