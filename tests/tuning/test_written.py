"""What is trained, where it is stored: at 0 the same bytes in every format, and else what the twin computed, up to the
rounding of scales.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.kinds import KINDS, kind_of
from mlxquant.layers.tree import parameters
from mlxquant.tuning.twin import Twin, start, tuned, widened

from support.exact_layers import MADE

FORMATS = [
    f"w{bits}{form}" for bits in (2, 3, 4, 7, 8) for form in ("", "-asym", "-g32", "-g64-sym", "-g32-bf16", "-bf16")
] + ["w4-tensor"]


def made(text, scale=1.0, bias=mx.float32, kind=None):
    """A quantized layer of a format, of weights of this size."""
    layer = MADE[kind or nn.Linear]()
    rng = np.random.default_rng(7)
    layer.weight = mx.array(rng.normal(size=layer.weight.shape).astype(np.float32) * scale)
    if "bias" in layer:
        layer.bias = mx.array(rng.normal(size=layer.bias.shape).astype(np.float32)).astype(bias)
    return kind_of(layer).quantized(layer, WeightFormat.parse(text), "extremes")


def numbers(layer, size=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"here/{what}": mx.array(rng.normal(size=v.shape).astype(np.float32) * size) for what, v in start(layer).items()
    }


def same(a, b):
    assert a.facts == b.facts
    for name, value in parameters(a).items():
        other = parameters(b)[name]
        assert value.dtype == other.dtype
        assert bytes(memoryview(np.array(value.view(mx.uint8)))) == bytes(memoryview(np.array(other.view(mx.uint8)))), (
            name
        )


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("text", FORMATS)
def test_nothing_trained_is_the_same_bytes(text, scale):
    layer = made(text, scale)
    same(layer, tuned(layer, "here", numbers(layer)))


@pytest.mark.parametrize("kind", MADE)
def test_nothing_trained_is_the_same_bytes_of_every_kind(kind):
    assert {kind.replaces for kind in KINDS} == set(MADE)
    layer = made("w4", kind=kind)
    layer_again = tuned(layer, "here", numbers(layer))
    assert type(layer_again) is type(layer)
    same(layer, layer_again)


@pytest.mark.parametrize("bias", [mx.float16, mx.bfloat16])
def test_the_bias_keeps_its_dtype(bias):
    layer = made("w4", bias=bias)
    same(layer, tuned(layer, "here", numbers(layer)))
    assert tuned(layer, "here", numbers(layer, 0.1)).bias.dtype == bias


@pytest.mark.parametrize("text", FORMATS)
def test_what_is_stored_is_what_the_twin_computed(text):
    layer = made(text)
    moved = numbers(layer, 0.05)
    stored = tuned(layer, "here", moved)
    np.testing.assert_array_equal(stored.codes(), layer.codes())
    assert stored.nbytes == layer.nbytes
    assert stored.facts == layer.facts
    twin = Twin(layer, "here", moved, lambda path: None)
    wanted = np.array(twin.matrix())
    digits = 2.0 ** -(7 if "bf16" in text else 10)  # of a scale, and of a bias that is as large as the weight
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(np.array(stored.matrix()), wanted, atol=2 * digits * largest)
    x = mx.array(np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32))
    np.testing.assert_allclose(np.array(stored(x)), np.array(twin(x)), atol=40 * digits * largest)


def test_scales_stay_in_the_range_of_their_dtype():
    layer = made("w4-g32", 2.0**-10)
    assert layer.scales.dtype == mx.float16
    moved = {name: value - 0.99 if name.endswith("scale") else value for name, value in numbers(layer).items()}
    stored = tuned(layer, "here", moved)
    assert float(np.array(stored.scales).min()) >= 2.0**-14
    assert np.isfinite(np.array(stored.biases)).all()


def test_steps_of_inputs_are_written():
    layer = made("w4")
    sigma, steps = np.array([0.1, 0.5, 0.9], np.float32), np.array([0.01, 0.02, 0.03], np.float32)
    layer.set_activations(ActivationTable(sigma, steps, np.zeros((3, 1), np.float32), np.full(3, 8, np.uint8)), Clock())
    same(layer, tuned(layer, "here", numbers(layer)))
    moved = numbers(layer) | {"here/step": mx.array([0.5, 0.0, -0.5])}
    np.testing.assert_allclose(tuned(layer, "here", moved).table.step, [0.015, 0.02, 0.015], rtol=1e-6)


@pytest.mark.parametrize("text", ["w2", "w4", "w4-asym", "w3-bf16"])
def test_wider_formats_are_the_same_function(text):
    layer = made(text)
    wide = widened(layer, 32)
    assert (wide.format.group, wide.format.symmetric, wide.format.digits) == (32, False, layer.format.digits)
    np.testing.assert_array_equal(wide.codes(), layer.codes())
    np.testing.assert_array_equal(np.array(wide.matrix()), np.array(layer.matrix()))
    assert wide.scales.shape[1] == 2


def test_what_cannot_be_wider_stays():
    for text in ("w8", "w4-g32", "w4-tensor"):
        layer = made(text)
        assert widened(layer, 64) is layer
    layer = made("w4")
    assert widened(layer, None) is layer
    assert widened(layer, 128) is layer  # 64 columns
    layer.quantize_tokens(8)
    assert widened(layer, 32) is layer  # integers have one scale a row
