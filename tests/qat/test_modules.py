"""When quantization sets in, what is kept of it, and that a model's parameters are the same with and without."""

import mlxquant  # noqa: F401  (before mlx, so that MLX gets a fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.layers.tree import get_module, parameters
from mlxquant.qat.convert import kept_activations, quantizing_points, restore_activations
from mlxquant.qat.integer import quantizing_weights
from mlxquant.qat.options import POINTS
from mlxquant.qat.ramp import Ramp
from mlxquant.qat.training import build_optimizer, cast, loss, training_step

from support.small_gpt import CONFIG, prepared, random_gpt, tokens

LINEARS = {"linear_variant_attn": "quantized_linear", "linear_variant_mlp": "quantized_linear"}
ALL = {**LINEARS, "quantize_attn_act": True, "quantize_mlp_act": True, "quantize_wte": True, "quantize_wpe": True}


def test_the_parameters_keep_their_names_and_values():
    plain, (model, _) = random_gpt(), prepared({**ALL, "store_activations": True})
    model(tokens())
    before, after = parameters(plain), parameters(model)
    assert before.keys() == after.keys()
    assert all(mx.array_equal(value, after[name]) for name, value in before.items())
    plain.load_weights(list(after.items()), strict=True)
    model.load_weights(list(before.items()), strict=True)
    assert parameters(model.trainable_parameters()).keys() == before.keys()


def test_during_warm_up_nothing_is_quantized():
    model, ramp = prepared({**ALL, "quantization_warmup_iters": 5, "store_activations": True})
    expected = random_gpt()(tokens())
    for iteration in (0, 4):
        ramp.iteration = iteration
        assert mx.array_equal(model(tokens()), expected)
        assert kept_activations(model) == {}
    ramp.iteration = 5
    assert not mx.array_equal(model(tokens()), expected)
    assert kept_activations(model)


@pytest.mark.parametrize(
    ("ramp", "levels"),
    [
        (Ramp(), {None: 1, 0: 1, 9: 1}),
        (Ramp(warmup=3), {None: 1, 0: 0, 2: 0, 3: 1, 4: 1}),
        (Ramp(warmup=2, full=6), {None: 1, 0: 0, 2: 0, 3: 0.25, 5: 0.75, 6: 1, 7: 1}),
    ],
)
def test_the_level_over_the_iterations(ramp, levels):
    for iteration, level in levels.items():
        ramp.iteration = iteration
        assert ramp.level == level


def test_a_linear_schedule_blends_the_weights():
    given = {"linear_variant_mlp": "quantized_linear", "quantize_linear_bits": 2, "quantization_warmup_iters": 2,
             "quantization_level_schedule": "linear", "full_quant_iteration": 6}  # fmt: skip
    model, ramp = prepared(given)
    layer, weight = quantizing_weights(model)["model.h.0.mlp.c_fc"], np.array(random_gpt().model.h[0].mlp.c_fc.weight)
    ramp.iteration = 6
    rounded = np.array(layer.rounded(mx.float32))
    assert not np.array_equal(rounded, weight)
    for iteration, level in ((2, 0), (3, 0.25), (5, 0.75), (6, 1)):
        ramp.iteration = iteration
        np.testing.assert_allclose(
            np.array(layer.rounded(mx.float32)), (1 - level) * weight + level * rounded, atol=1e-6
        )


def test_stochastic_rounding_is_new_every_iteration_and_the_same_when_repeated():
    given = {
        "linear_variant_attn": "quantized_linear",
        "quantize_linear_method": "stochastic_quant",
        "quantize_linear_bits": 3,
    }
    model, ramp = prepared({**given, "quantization_warmup_iters": 0}, seed=4)
    layers = quantizing_weights(model)

    def weights(iteration, seed=4, path="model.h.0.attn.c_proj"):
        ramp.iteration, ramp.seed = iteration, seed
        return np.array(layers[path].rounded(mx.float32))

    assert np.array_equal(weights(3), weights(3))
    assert not np.array_equal(weights(3), weights(4))
    assert not np.array_equal(weights(3), weights(3, seed=5))
    assert not np.array_equal(
        *(np.array(ramp.key(place)) for place in ("model.h.0.attn.c_proj", "model.h.1.attn.c_proj"))
    )
    mean = np.mean([weights(iteration) for iteration in range(400)], axis=0)
    step = np.array(layers["model.h.0.attn.c_proj"].coded()[0].scale)
    assert np.abs(mean - np.array(layers["model.h.0.attn.c_proj"].weight)).max() < 5 * 0.5 / np.sqrt(400) * step.max()
    model.eval()
    assert np.array_equal(weights(3), weights(4))


def test_after_training_rounding_is_to_nearest():
    given = {"linear_variant_attn": "quantized_linear", "quantize_linear_bits": 3}
    (nearest, _), (random, ramp) = (
        prepared({**given, "quantize_linear_method": f"{name}_quant"}) for name in ("symmetric", "stochastic")
    )
    ramp.iteration = None
    np.testing.assert_allclose(np.array(random(tokens())), np.array(nearest(tokens())), atol=1e-5)


def test_the_last_activations_are_kept():
    model, ramp = prepared(
        {**ALL, "store_activations": True, "quantize_mlp_act_bits": 4, "quantization_warmup_iters": 0}
    )
    ramp.iteration = 0
    model(tokens(seed=1))
    model(tokens(seed=2))
    kept = kept_activations(model)
    places = [
        f"model.h.{block}.{group}.{point}"
        for block in range(CONFIG.n_layer)
        for group in POINTS
        for point in POINTS[group]
    ]
    assert set(kept) == {f"{place}.{name}" for place in places for name in ("codes", "scale", "zero_point", "bits")}
    for place in places:
        assert kept[f"{place}.codes"].dtype == mx.int8
        assert len(np.unique(np.array(kept[f"{place}.codes"]))) <= (16 if ".mlp." in place else 256)
    path = "model.h.0.attn.input"
    x = model.model.h[0].ln_1(model.model.wte(tokens(seed=2)) + model.model.wpe(mx.arange(12)))
    expected = np.array(get_module(model, path).quantizer.code(x).values)
    codes, scale, zero = (np.array(kept[f"{path}.{name}"], np.float64) for name in ("codes", "scale", "zero_point"))
    np.testing.assert_allclose(scale * (codes - zero), expected, atol=1e-6)
    model.eval()
    model(tokens(seed=3))
    assert all(mx.array_equal(value, kept[name]) for name, value in kept_activations(model).items())
    other, _ = prepared({**ALL, "store_activations": True})
    restore_activations(other, kept)
    assert all(mx.array_equal(value, kept[name]) for name, value in kept_activations(other).items())


def test_nothing_is_kept_unasked():
    model, _ = prepared(ALL)
    model(tokens())
    assert kept_activations(model) == {}
    assert len(quantizing_points(model)) == 24


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_weights_are_rounded_before_they_are_cast(dtype):
    model, _ = prepared({"linear_variant_mlp": "quantized_linear"})
    before = parameters(random_gpt())
    codes = [np.array(layer.coded()[0].codes) for layer in quantizing_weights(model).values()]
    cast(model, dtype)
    for name, value in parameters(model).items():
        assert value.dtype == (mx.float32 if ".mlp." in name else dtype)
    again = [np.array(layer.coded()[0].codes) for layer in quantizing_weights(model).values()]
    assert all(np.array_equal(one, two) for one, two in zip(codes, again, strict=True))
    assert model(tokens()).dtype == dtype
    assert before.keys() == parameters(model).keys()


def test_an_update_in_half_precision_moves_the_precise_weights():
    model = random_gpt()
    optimizer = build_optimizer(1000, 1e-3)  # whose first rate is 1e-6
    optimizer.init(model.trainable_parameters())
    before = parameters(model)
    training_step(model, optimizer, mx.bfloat16)(tokens(seed=1), tokens(seed=2))
    moved = {name: mx.abs(value - before[name]).max().item() for name, value in parameters(model).items()}
    assert all(0 < distance < 3e-6 for distance in moved.values()), moved  # bfloat16 would round weights by up to 1e-3


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["symmetric_quant", "affine_quant", "stochastic_quant", "ternary_quant"])
def test_training_through_rounding_learns(method, dtype):
    given = {
        **LINEARS,
        "quantize_attn_act": True,
        "quantize_mlp_act": True,
        "quantize_linear_method": method,
        "quantize_linear_bits": 4,
    }
    model, ramp = prepared({**given, "quantization_warmup_iters": 0})
    optimizer = build_optimizer(20, 1e-2)
    optimizer.init(model.trainable_parameters())
    update = training_step(model, optimizer, dtype)
    inputs, targets = tokens(4, seed=5), tokens(4, seed=6)
    first = loss(model, inputs, targets).item()
    for ramp.iteration in range(20):
        update(inputs, targets)
    assert all(value.dtype == mx.float32 for value in parameters(model).values())
    ramp.iteration = None
    model.eval()
    assert loss(model, inputs, targets).item() < 0.8 * first
