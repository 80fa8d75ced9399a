"""A weight is quantized as well as that weight times any power of two: float16's range is nobody's business.

Codes are compared, not only errors: all that is computed is linear in the weight, and scales keep their digits.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.files.parameters import load_parameters
from mlxquant.grids.weights import GROUPS, WeightFormat, fit_extremes
from mlxquant.layers.kinds import KINDS, rebuilt
from mlxquant.layers.tree import parameters
from mlxquant.methods import registry
from mlxquant.methods.weights.rtn import rtn
from mlxquant.numerics.moments import Moments
from mlxquant.numerics.part_moments import PartMoments
from mlxquant.numerics.transform import Transform
from mlxquant.recipes.recipe import LayerSpec
from mlxquant.sweep.layer import quantize_layer

from support.exact_layers import MADE

POWERS = (-40, -23, -14, -9, -4, 3, 20)
FORMATS = [WeightFormat(*some) for some in product(range(2, 9), ("tensor", "channel", *GROUPS), (True, False), (11, 8))]
SOME = [WeightFormat.parse(text) for text in ("w2", "w8", "w4-asym", "w8-asym", "w4-g32", "w3-g64-sym", "w4-tensor")]
SOME += [format.coarse for format in SOME]
STEPS = [pytest.param(method.function, id=method.name) for method in registry.members("steps")]
ROUND = [pytest.param(method.function, id=method.name) for method in registry.members("round")]
REFINE = [pytest.param(method.function, id=method.name) for method in registry.members("refine")]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
some_formats = pytest.mark.parametrize("format", SOME, ids=str)


@pytest.fixture(scope="module")
def weight():
    """Of rows that differ by three orders of magnitude, one of zeros."""
    random = np.random.default_rng(0)
    weight = random.standard_t(5, (12, 128)) * np.geomspace(1e-3, 1, 12)[:, None]
    weight[7] = 0
    return weight.astype(np.float32)


@pytest.fixture(scope="module")
def moments():
    random = np.random.default_rng(1)
    inputs = random.standard_normal((400, 128)) @ random.standard_normal((128, 128)) / 8
    seen = Moments.empty(128)
    seen.add(inputs, inputs * random.normal(1, 0.1, inputs.shape))
    return seen


def error(grid, codes, weight):
    """Of each row, relative to it; where all share a step, to all of them."""
    norm = np.linalg.norm(weight, axis=1)
    norm = np.linalg.norm(norm) if grid.format.group == "tensor" else np.where(norm > 0, norm, 1)
    return np.linalg.norm(grid.dequantize(codes) - weight, axis=1) / norm


def same(found, expected, power):
    """Grids and codes of a weight and of that times ``2^power``. Biases of groups that hardly leave zero are float16's
    multiples of 2^-24 or not, at most 2^-11 of a step: nearly all codes are the same then, and so are errors.
    """
    (grid, codes), (other, others) = found, expected
    if grid.format.symmetric:
        live = (codes != grid.format.zero_code).any(1)
        if grid.format.group != "tensor":
            assert (~live).sum() == 1
        np.testing.assert_array_equal(codes, others)
        np.testing.assert_array_equal(grid.dequantize(codes), np.ldexp(other.dequantize(others), power))
    assert (codes == others).mean() > 0.995


@every_format
def test_every_format_serves_small_and_large_weights_alike(format, weight):
    expected = fit_extremes(weight, format)
    codes = expected.quantize(weight)
    for power in POWERS:
        scaled = np.ldexp(weight, power)
        grid = fit_extremes(scaled, format)
        same((grid, grid.quantize(scaled)), (expected, codes), power)
        ours, theirs = error(grid, grid.quantize(scaled), scaled), error(expected, codes, weight)
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-7)
        assert (grid.dequantize(grid.quantize(scaled))[7] == 0).all() or format.group == "tensor"
        largest = grid.scales.max() if format.symmetric else max(grid.scales.max(), np.abs(grid.biases).max())
        assert grid.dtype is (np.float16 if grid.scales.min() >= 2.0**-14 and largest <= 65504 else np.float32)
    assert fit_extremes(np.ldexp(weight, -40), format).dtype is np.float32
    assert fit_extremes(np.ldexp(weight, 5), format).dtype is np.float16


@pytest.mark.parametrize("find", STEPS)
@some_formats
def test_steps_follow_the_weight(find, format, weight, moments):
    expected = find(weight, format, moments)
    for power in POWERS:
        scaled = np.ldexp(weight, power)
        grid = find(scaled, format, moments)
        same((grid, rtn(scaled, grid)), (expected, rtn(weight, expected)), power)


@pytest.mark.parametrize("find", ROUND)
@some_formats
def test_rounding_follows_the_weight(find, format, weight, moments):
    expected = fit_extremes(weight, format)
    codes = find(weight, expected, moments)
    for power in POWERS:
        scaled = np.ldexp(weight, power)
        grid = fit_extremes(scaled, format)
        found = find(scaled, grid, moments)
        if format.symmetric:
            np.testing.assert_array_equal(found, codes)
        np.testing.assert_allclose(error(grid, found, scaled), error(expected, codes, weight), rtol=0.05, atol=1e-7)


@pytest.mark.parametrize("refine", REFINE)
@some_formats
def test_refining_follows_the_weight(refine, format, weight, moments):
    grid = fit_extremes(weight, format)
    expected = refine(weight, grid, rtn(weight, grid), moments)
    for power in POWERS:
        scaled = np.ldexp(weight, power)
        grid = fit_extremes(scaled, format)
        found = refine(scaled, grid, rtn(scaled, grid), moments)
        ours, theirs = error(*found, scaled), error(*expected, weight)
        np.testing.assert_allclose(ours, theirs, rtol=0.05 if not format.symmetric else 1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(SOME[1], rounding="gptq", steps="search"),
        LayerSpec(SOME[4], rounding="gptq", steps="mse", refine="refit"),
        LayerSpec(SOME[4], rounding="gptq", steps="search", refine="regrid"),
        LayerSpec(SOME[0], rounding="gptq", corrected=True, held_out=True),
        LayerSpec(SOME[1], branch="svd", rank=4),
        LayerSpec(SOME[2], rounding="gptq-descent", branch="whitened", rank=4),
    ],
    ids=lambda spec: f"{spec.rounding}-{spec.branch}-{spec.weight}",
)
def test_a_calibrated_layer_follows_its_weight(spec, weight, moments):
    """By its outputs: of a layer as recipes make it, whatever they do to it, a file of which holds all."""
    inputs = mx.array(np.random.default_rng(2).standard_normal((16, 128)).astype(np.float32))
    seen = Moments(moments.gram, moments.count, moments.cross, Moments(moments.gram / 4, 100, moments.cross / 4))
    outputs = {}
    for power in (0, -40, -14, 20):
        linear = nn.Linear(128, 12, bias=False)
        linear.weight = mx.array(np.ldexp(weight, power))
        made = quantize_layer(
            linear, spec, PartMoments.one(seen), "it", Transform(np.linspace(0.5, 2, 128), None, 16)
        ).layer
        again = rebuilt(made.facts, None)
        load_parameters(again, parameters(made), "it")
        assert mx.array_equal(again(inputs), made(inputs)).item()
        outputs[power] = np.ldexp(np.array(made(inputs)), -power)
    for found in outputs.values():
        assert np.linalg.norm(found - outputs[0]) <= 0.02 * np.linalg.norm(outputs[0])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["w2", "w8", "w4-asym", "w5-tensor", "w7"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replaces.__name__)
def test_every_kind_of_layer_serves_small_and_large_weights_alike(kind, text, dtype):
    """And is stored as it is: what a file has of its structure makes the same layer again."""
    exact, format = MADE[kind.replaces](), WeightFormat.parse(text)
    weight = exact.weight.astype(dtype)
    exact.weight = weight
    expected = np.array(kind.quantized(exact, format, "extremes").dequantized())
    for power in POWERS:
        exact.weight = (weight.astype(mx.float32) * 2.0**power).astype(dtype)
        made = kind.quantized(exact, format, "extremes")
        found = np.ldexp(np.array(made.dequantized()), -power)
        assert np.linalg.norm(found - expected) <= (0 if format.symmetric else 2e-3) * np.linalg.norm(expected)
        again = rebuilt({"class": type(made).__name__, **made.facts}, None)
        held, blank = parameters(made), parameters(again)
        assert {name: value.dtype for name, value in held.items()} == {n: v.dtype for n, v in blank.items()}
        again.load_weights(list(held.items()))
        assert mx.array_equal(again.dequantized(), made.dequantized()).item()
        assert made.scales.dtype == {-40: mx.float32, 3: mx.float16}.get(power, made.scales.dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_small_rows_beside_large_ones_are_no_worse_than_those_of_mlx(dtype):
    """Rows at which float16 scales of 8 bits end: ``mx.quantize`` has half a percent of error in each."""
    sizes = np.array([1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-7, 1e-9, 1e3])
    rows = np.random.default_rng(3).standard_normal((8, 128)) * sizes[:, None]
    weight = mx.array(rows, mx.float32).astype(dtype)
    exact = np.array(weight.astype(mx.float32))
    linear = nn.Linear(128, 8, bias=False)
    linear.weight = weight
    packed = mx.quantize(weight.astype(mx.float32), group_size=128, bits=8)
    theirs = np.linalg.norm(np.array(mx.dequantize(*packed, group_size=128, bits=8)) - exact, axis=1)
    for text in ("w8", "w8-asym", "w8-g128", "w8-g32-sym"):
        made = KINDS[0].quantized(linear, WeightFormat.parse(text), "extremes")
        ours = np.linalg.norm(np.array(made.dequantized()) - exact, axis=1)
        assert (ours < 1.6 * theirs).all()
        assert (ours < 0.01 * np.linalg.norm(exact, axis=1)).all()
