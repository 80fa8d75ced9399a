"""Grids and packing: lossless, bounded, and bit for bit MLX's layout."""

from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import NumericsError, RecipeError
from mlxquant.files import schema
from mlxquant.grids.packing import pack, unpack
from mlxquant.grids.weights import FORMAT, SMALLEST_HALF, Grid, WeightFormat, fit_extremes, snap, snap_biases

FORMATS = [
    WeightFormat(bits, group, symmetric)
    for bits in range(2, 9)
    for group in ("tensor", "channel", 32, 64, 128)
    for symmetric in (True, False)
]
HALF, COARSE = WeightFormat(), WeightFormat().coarse


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_t(5, (24, 128)).astype(np.float32) * 0.02


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [32, 128, 40, 7])
def test_pack_is_undone_by_unpack(bits, width):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, width)).astype(np.uint8)
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (5, -(-width * bits // 32))
    np.testing.assert_array_equal(unpack(words, bits, width), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_is_mlx_layout(bits):
    weight = mx.random.normal((8, 128), key=mx.random.key(bits))
    words, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    codes = unpack(np.array(words), bits, 128)
    ours = codes.reshape(8, 2, 64) * np.array(scales)[..., None] + np.array(biases)[..., None]
    np.testing.assert_allclose(
        ours.reshape(8, 128), np.array(mx.dequantize(words, scales, biases, group_size=64, bits=bits)), atol=1e-6
    )
    np.testing.assert_array_equal(pack(codes, bits), np.array(words))


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(NumericsError, match="does not fit in 3 bits"):
        pack(np.full((1, 32), 8, np.uint8), 3)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantizing_twice_changes_nothing(format, weight):
    grid = fit_extremes(weight, format)
    codes = grid.quantize(weight)
    assert codes.max() < format.levels
    np.testing.assert_array_equal(grid.quantize(grid.dequantize(codes)), codes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rounding_error_is_at_most_half_a_step_inside_the_range(format, weight):
    grid = fit_extremes(weight, format)
    error = np.abs(grid.dequantize(grid.quantize(weight)) - weight)
    slack = 0.003 * np.abs(weight).max()  # scales and biases are float16
    assert (error <= grid.expand(grid.scales, weight.shape[1]) / 2 + slack).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_zero_weight_stays_zero(format):
    weight = np.zeros((4, 128), np.float32)
    grid = fit_extremes(weight, format)
    np.testing.assert_array_equal(grid.dequantize(grid.quantize(weight)), weight)


def test_scales_have_the_digits_of_float16_in_any_magnitude_and_never_vanish():
    values = np.random.default_rng(0).uniform(SMALLEST_HALF, 65504, 1000) ** np.linspace(-1, 1, 1000)
    values = np.clip(values, SMALLEST_HALF, 65504)
    np.testing.assert_array_equal(snap(values, HALF), values.astype(np.float16).astype(np.float32))
    for power, format in product((-100, -40, 0, 20, 90), (HALF, COARSE)):
        np.testing.assert_array_equal(snap(np.ldexp(values, power), format), np.ldexp(snap(values, format), power))
    assert (snap(np.array([1e-60, 0.0]), HALF) > 0).all()
    coarse = np.array(mx.array(values, mx.float32).astype(mx.bfloat16).astype(mx.float32))
    np.testing.assert_array_equal(snap(values.astype(np.float32), COARSE), coarse)


def test_biases_are_those_of_float16_beside_such_scales():
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 500) * np.geomspace(1e-9, 1e4, 500), [0.0, 65504]])
    halves = values.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(snap_biases(values, np.full(502, 0.01), HALF), halves)
    small = np.ldexp(values, -40)
    np.testing.assert_array_equal(
        snap_biases(small, np.full(502, 2.0**-50), HALF), np.ldexp(snap_biases(small * 2.0**60, 1e-9, HALF), -60)
    )


@pytest.mark.parametrize("scale", [0.01, 1e-9, 1e-37])
def test_coarse_biases_are_those_of_bfloat16_and_of_float16_beside_such_scales(scale):
    values = np.random.default_rng(0).normal(0, 1, 500) * np.geomspace(1e-3, 1e4, 500) * scale
    found = snap_biases(np.append(values, 0), np.full(501, scale), COARSE)
    np.testing.assert_array_equal(np.array(mx.array(found).astype(mx.bfloat16).astype(mx.float32)), found)
    assert found[-1] == 0
    if scale == 0.01:
        np.testing.assert_array_equal(found.astype(np.float16), found)
    np.testing.assert_allclose(found[:-1], values, rtol=2.0**-8, atol=2.0**-11 * scale)


def test_a_grid_is_float16_where_that_loses_nothing():
    form = WeightFormat(4)
    for value, dtype in ((SMALLEST_HALF, np.float16), (SMALLEST_HALF / 2, np.float32), (65504, np.float16),
                         (65536, np.float32), (1 + 2.0**-11, np.float32)):  # fmt: skip
        assert Grid(form, np.float32([[1], [value]]), np.ones((2, 1), np.float32)).dtype is dtype
    asymmetric, ones = WeightFormat(4, symmetric=False), np.ones((2, 1), np.float32)
    assert Grid(asymmetric, ones, -ones).dtype is np.float16
    assert Grid(asymmetric, ones, -65536 * ones).dtype is Grid(asymmetric, ones, ones + 2.0**-12).dtype is np.float32
    assert Grid(form, ones, -65536 * ones).dtype is np.float16  # which follow from the scales


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_in_every_range(sign):
    """Weights that are added later, and pruned ones, are zero; so is what pads a group."""
    weight = sign * np.random.default_rng(0).uniform(1, 2, (4, 64)).astype(np.float32)
    grid = fit_extremes(weight, WeightFormat(4, 32, symmetric=False))
    zeros = np.zeros_like(weight)
    assert (np.abs(grid.dequantize(grid.quantize(zeros))) <= grid.expand(grid.scales, 64) / 2).all()
    assert (sign * grid.dequantize(grid.quantize(weight))).min() > 0.9


def test_scales_beyond_float32_are_refused():
    with pytest.raises(NumericsError, match="does not fit in float32"):
        snap(np.array([1e39]), HALF)
    with pytest.raises(NumericsError, match=r"a bias of .* leave this layer out"):
        snap_biases(np.array([-1e39]), np.ones(1), HALF)


def test_symmetric_step_is_absmax_over_seven():
    grid = fit_extremes(np.array([[0.7, -0.35, 0.0, 0.1]]), WeightFormat(4))
    assert grid.scales[0, 0] == np.float32(np.float16(0.1))
    assert isinstance(grid, Grid)


@pytest.mark.parametrize("text", ["w4", "w2", "w8-tensor", "w4-g128", "w3-g64-sym", "w4-asym", "w8-tensor-asym"])
@pytest.mark.parametrize("digits", [11, 8])
def test_names_and_files_are_read_back(text, digits):
    format = replace(WeightFormat.parse(text), digits=digits)
    assert str(format) == text + ("" if digits == 11 else "-bf16")
    assert WeightFormat.parse(str(format)) == format
    saved = format.to_dict()
    FORMAT(saved, "it")
    assert WeightFormat(**saved) == format
    assert ("digits" in saved) == (digits == 8)  # files with the usual scales are those of older releases


def test_digits_are_those_of_a_float():
    with pytest.raises(RecipeError, match="11 significant bits, as a float16, or 8, as a bfloat16, found 10"):
        WeightFormat(digits=10)
    with pytest.raises(schema.MismatchError, match=r"digits.*one of 11, 8"):
        FORMAT({**HALF.to_dict(), "digits": 9}, "it")


@pytest.mark.parametrize("text", ["w9", "w1", "w4-g16", "4", "w4-g128-", "w44", "w4-bf16-g64", "w4-f16", ""])
def test_unknown_names_are_refused(text):
    with pytest.raises(RecipeError, match="no weight format"):
        WeightFormat.parse(text)


def test_ragged_groups_and_nan_are_refused():
    with pytest.raises(RecipeError, match="do not divide"):
        fit_extremes(np.zeros((2, 100)), WeightFormat(4, 64, False))
    with pytest.raises(NumericsError, match="1 NaN"):
        fit_extremes(np.array([[1.0, np.nan]]), WeightFormat(4))
