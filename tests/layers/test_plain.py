"""A quantized layer in MLX's own layout: the same codes, the same numbers, and back to the same bytes; what has no
place is named.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.grids.packing import unpack
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.plain import plain_layer, restored
from mlxquant.layers.tree import parameters
from mlxquant.numerics.low_rank import LowRank

FORMATS = [
    "w2",
    "w3-g32",
    "w4",
    "w4-asym",
    "w4-g64",
    "w4-g128-sym",
    "w5-g32",
    "w6",
    "w7",
    "w7-g64",
    "w8",
    "w8-tensor",
    "w8-g32",
]


def layer(format="w4", shape=(24, 128), bias=True, scale=1.0, **options):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * scale
    grid = fit_extremes(weight, WeightFormat.parse(format))
    return QuantizedLinear(grid.quantize(weight), grid, mx.arange(shape[0]) / 8 if bias else None, **options)


@pytest.mark.parametrize("format", FORMATS)
def test_a_plain_layer_computes_the_same_numbers(format):
    ours = layer(format)
    plain = plain_layer(ours)
    assert plain.bits == (8 if "w7" in format else ours.format.bits)
    codes = unpack(np.array(plain.arrays["weight"]), plain.bits, 128)
    np.testing.assert_array_equal(codes, ours.codes())
    scales, biases = (
        np.repeat(np.array(plain.arrays[name], np.float64), plain.group_size, axis=1) for name in ("scales", "biases")
    )
    exact = scales * codes + biases
    np.testing.assert_allclose(np.array(ours.dequantized()), exact, rtol=1e-6, atol=1e-7)

    theirs = nn.Linear(128, 24).to_quantized(**plain.setting)
    theirs.load_weights(list(plain.arrays.items()))
    assert {name: value.dtype for name, value in parameters(theirs).items()} == {
        k: v.dtype for k, v in plain.arrays.items()
    }
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    wanted = x.astype(np.float64) @ exact.T + np.arange(24) / 8
    np.testing.assert_allclose(np.array(theirs(mx.array(x))), wanted, atol=3e-5)
    np.testing.assert_allclose(np.array(ours(mx.array(x))), wanted, atol=3e-5)


@pytest.mark.parametrize("format", [format for format in FORMATS if "w7" not in format])
def test_the_way_back_leads_to_the_same_bytes(format):
    ours = layer(format)
    arrays = {f"a.b.{name}": value for name, value in plain_layer(ours).arrays.items()}
    own = restored({**arrays, "other": mx.ones(3)}, {"a.b": ours.facts}, ["a.b"])
    assert own.pop("other").size == 3
    expected = parameters(ours)
    assert own.keys() == {f"a.b.{name}" for name in expected}
    for name, value in expected.items():
        assert own[f"a.b.{name}"].dtype == value.dtype
        np.testing.assert_array_equal(np.array(own[f"a.b.{name}"]), np.array(value))


def test_scales_are_float32_where_float16_has_no_room_for_their_bias():
    ours = layer("w8", scale=2e4)
    plain = plain_layer(ours)
    assert plain.arrays["scales"].dtype == plain.arrays["biases"].dtype == mx.float32
    assert np.abs(np.array(plain.arrays["biases"])).max() > np.finfo(np.float16).max
    assert plain_layer(layer("w8")).arrays["biases"].dtype == mx.float16
    arrays = {f"a.{name}": value for name, value in plain.arrays.items()}
    np.testing.assert_array_equal(
        np.array(restored(arrays, {"a": ours.facts}, ["a"])["a.scales"]), np.array(ours.scales)
    )


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**-12, 2.0**20])
@pytest.mark.parametrize("format", [format for format in FORMATS if "w7" not in format])
def test_scales_beyond_float16_are_float32_there_and_back(format, scale):
    ours, usual = layer(format, bias=False, scale=scale), layer(format, bias=False)
    plain = plain_layer(ours)
    theirs = nn.Linear(128, 24, bias=False).to_quantized(**plain.setting)
    theirs.load_weights(list(plain.arrays.items()))
    x = mx.array(np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32))
    np.testing.assert_allclose(
        np.array(theirs(x)) / scale, np.array(usual(x)), atol=2e-3 if ours.format.bits == 2 else 4e-4
    )
    own = restored({f"a.{name}": value for name, value in plain.arrays.items()}, {"a": ours.facts}, ["a"])
    assert own.keys() == {f"a.{name}" for name in parameters(ours)}
    for name, value in parameters(ours).items():
        assert own[f"a.{name}"].dtype == value.dtype
        assert mx.array_equal(own[f"a.{name}"], value).item()


def with_table(made):
    made.set_activations(ActivationTable(np.ones(1), np.ones(1), np.zeros((1, 1)), np.array([8])), Clock())
    return made


def with_tokens(made):
    made.quantize_tokens(8)
    return made


def test_a_plain_layer_has_no_obstacles():
    assert layer().obstacles() == []
    assert layer(bias=False).obstacles() == []


@pytest.mark.parametrize(
    ("make", "what", "activations"),
    [
        (lambda: with_table(layer()), "static activation scales", True),
        (lambda: with_tokens(layer()), "activations quantized a token", True),
        (lambda: layer(divisor=mx.ones(128)), "a division of its input's channels", False),
        (lambda: layer(rotation=64), "a rotation of its input in blocks of 64", False),
        (lambda: layer(branch=LowRank(np.ones((24, 2)), np.ones((2, 128)))), "a low-rank branch of rank 2", False),
        (lambda: layer(shape=(8, 40)), "40 input channels, no multiple of 32", False),
    ],
)
def test_what_a_plain_layer_has_no_place_for_is_named(make, what, activations):
    (found,) = make().obstacles()
    assert found.what == what
    assert found.activations == activations
    assert found.remedy


def test_a_fact_that_nobody_knows_yet_is_an_obstacle():
    class Newer(QuantizedLinear):
        @property
        def facts(self):
            return {**super().facts, "sparsity": "2:4"}

    weight = np.ones((4, 32), np.float32)
    grid = fit_extremes(weight, WeightFormat(4))
    assert [o.what for o in Newer(grid.quantize(weight), grid).obstacles()] == ["sparsity 2:4"]
