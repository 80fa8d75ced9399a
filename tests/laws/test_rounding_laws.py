"""Laws of all methods that choose a grid ("steps") or codes on it ("round"); a new method is covered by being registered."""

import inspect

import numpy as np
import pytest

from mlxquant.errors import NumericsError, RecipeError
from mlxquant.formats import Grid, WeightFormat
from mlxquant.methods import registry
from mlxquant.methods.moments import Moments, energy
from mlxquant.methods.rtn import rtn
from mlxquant.methods.steps import extremes, search

FORMATS = [WeightFormat.parse(text) for text in ("w2", "w4", "w4-asym", "w3-g32", "w4-g64-sym", "w4-tensor", "w8")]
STEPS = [pytest.param(method.function, id=method.name) for method in registry.members("steps")]
ROUND = [pytest.param(method.function, id=method.name) for method in registry.members("round")]
every_steps = pytest.mark.parametrize("find", STEPS)
every_round = pytest.mark.parametrize("find", ROUND)
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def layer(rows=10, width=64, seed=0):
    random = np.random.default_rng(seed)
    weight = (random.standard_t(4, (rows, width)) * 0.02).astype(np.float32)
    inputs = random.standard_normal((5 * width, width)) @ random.standard_normal((width, width))
    inputs[:, : max(1, width // 32)] *= 12
    return weight, Moments.of(inputs)


def losses(weight, grid, codes, gram):
    return energy(weight.astype(np.float64) - grid.dequantize(codes), gram)


@every_steps
@every_format
def test_steps_can_be_stored(find, format):
    weight, moments = layer()
    grid = find(weight, format, moments)
    assert grid.format == format
    assert grid.scales.shape == grid.biases.shape == extremes(weight, format).scales.shape
    assert (grid.scales > 0).all()
    for stored in (grid.scales, grid.biases / grid.format.zero_code if format.symmetric else grid.biases):
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored.astype(np.float16).astype(np.float32), stored)
    if format.symmetric:
        np.testing.assert_array_equal(grid.biases, -format.zero_code * grid.scales)


@every_steps
def test_steps_scale_with_the_weight(find):
    weight, moments = layer()
    for format in FORMATS:
        once, twice = find(weight, format, moments), find(2 * weight, format, moments)
        np.testing.assert_array_equal(twice.scales, 2 * once.scales)
        np.testing.assert_array_equal(twice.biases, 2 * once.biases)


@every_steps
@every_format
def test_zero_rows_stay_zero(find, format):
    weight, moments = layer()
    weight[[0, 4]] = 0
    grid = find(weight, format, moments)
    codes = rtn(weight, grid)
    if format.group != "tensor" and (format.symmetric or not isinstance(format.group, str)):
        assert (grid.scales[[0, 4]] == 1).all()
    assert (grid.dequantize(codes)[[0, 4]] == 0).all() or format.group == "tensor"


@every_steps
def test_steps_refuse_what_they_cannot_do(find):
    weight, moments = layer()
    with pytest.raises(RecipeError, match="groups of 128 do not divide an input width of 64"):
        find(weight, WeightFormat(4, 128, symmetric=False), moments)
    weight[2, 3] = np.nan
    with pytest.raises(NumericsError, match="NaN"):
        find(weight, WeightFormat(4), moments)


@every_steps
@every_format
def test_steps_of_a_row_do_not_depend_on_the_others(find, format):
    weight, moments = layer()
    if format.group == "tensor":
        weight[1:] *= 0.5  # one step for all rows is that of any order of the rows
        np.testing.assert_allclose(find(weight[::-1], format, moments).scales, find(weight, format, moments).scales, rtol=1e-3)
        return
    whole, alone = find(weight, format, moments), find(weight[3:4], format, moments)
    np.testing.assert_array_equal(alone.scales, whole.scales[3:4])
    np.testing.assert_array_equal(alone.biases, whole.biases[3:4])


@every_round
@every_format
def test_codes_are_in_range_and_never_worse_than_nearest(find, format):
    for seed in range(3):
        weight, moments = layer(seed=seed)
        grid = extremes(weight, format) if seed else search(weight, format, moments)
        codes = find(weight, grid, moments)
        assert codes.dtype == np.uint8
        assert codes.shape == weight.shape
        assert codes.max() < format.levels
        baseline = losses(weight, grid, rtn(weight, grid), moments.gram)
        assert (losses(weight, grid, codes, moments.gram) <= baseline * (1 + 1e-9)).all()


@every_round
@every_format
def test_an_identity_hessian_gives_nearest(find, format):
    weight, _ = layer()
    grid = extremes(weight, format)
    for strength in (1.0, 1e-6, 1e8):
        moments = Moments(strength * np.eye(64), 64)
        np.testing.assert_array_equal(find(weight, grid, moments), rtn(weight, grid))


@every_round
@every_format
def test_a_weight_on_the_grid_stays_there(find, format):
    weight, moments = layer()
    grid = extremes(weight, format)
    codes = rtn(weight, grid)
    np.testing.assert_array_equal(find(grid.dequantize(codes), grid, moments), codes)


def rows_of(grid, rows):
    return Grid(grid.format, grid.scales[rows], grid.biases[rows])


@every_round
@every_format
def test_codes_of_a_row_do_not_depend_on_the_others(find, format):
    weight, moments = layer()
    grid = search(weight, format, moments)
    whole = find(weight, grid, moments)
    for rows in (slice(3, 4), [7, 2, 2]):
        np.testing.assert_array_equal(find(weight[rows], rows_of(grid, rows), moments), whole[rows])


@every_round
@pytest.mark.parametrize("text", ["w2", "w4", "w4-asym", "w4-tensor"])
def test_channels_may_come_in_any_order(find, text):
    weight, moments = layer()
    grid = search(weight, WeightFormat.parse(text), moments)
    options = {"passes": 0} if "passes" in inspect.signature(find).parameters else {}  # descent visits channels in their order
    order = np.random.default_rng(5).permutation(64)
    shuffled = find(weight[:, order], grid, Moments(moments.gram[np.ix_(order, order)], moments.count), **options)
    np.testing.assert_array_equal(shuffled, find(weight, grid, moments, **options)[:, order])


@every_round
def test_groups_may_come_in_any_order(find):
    weight, moments = layer(width=128)
    grid = search(weight, WeightFormat.parse("w4-g32"), moments)
    options = {"passes": 0} if "passes" in inspect.signature(find).parameters else {}
    groups = np.array([2, 0, 3, 1])
    order = (groups[:, None] * 32 + np.arange(32)).ravel()
    moved = Grid(grid.format, grid.scales[:, groups], grid.biases[:, groups])
    shuffled = find(weight[:, order], moved, Moments(moments.gram[np.ix_(order, order)], moments.count), **options)
    np.testing.assert_array_equal(shuffled, find(weight, grid, moments, **options)[:, order])


BLOCKED = [p for p in ROUND if "block" in inspect.signature(p.values[0]).parameters]


@pytest.mark.parametrize("find", BLOCKED)
@every_format
def test_codes_do_not_depend_on_the_block_size(find, format):
    weight, moments = layer(rows=20, width=192)
    grid = search(weight, format, moments)
    codes = find(weight, grid, moments)
    for block in (1, 7, 32, 192, 1000):
        np.testing.assert_array_equal(find(weight, grid, moments, block=block), codes)


@every_round
@pytest.mark.parametrize("strength", [2.0**-40, 2.0**40])
def test_the_unit_of_the_inputs_does_not_matter(find, strength):
    weight, moments = layer()
    grid = search(weight, WeightFormat(4), moments)
    codes = find(weight, grid, moments)
    np.testing.assert_array_equal(find(weight, grid, Moments(moments.gram * strength, moments.count)), codes)


@every_round
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (1, 1), (5, 1), (3, 33)])
def test_small_and_odd_shapes(find, rows, width):
    weight, moments = layer(rows, width)
    grid = search(weight, WeightFormat(4), moments)
    assert find(weight, grid, moments).shape == (rows, width)


@every_round
def test_zero_rows_and_dead_channels(find):
    weight, moments = layer()
    weight[[0, 4]] = 0
    gram = moments.gram.copy()
    gram[[7, 50]], gram[:, [7, 50]] = 0, 0
    moments = Moments(gram, moments.count)
    grid = search(weight, WeightFormat(4), moments)
    codes = find(weight, grid, moments)
    assert (grid.dequantize(codes)[[0, 4]] == 0).all()
    assert (losses(weight, grid, codes, gram) <= losses(weight, grid, rtn(weight, grid), gram) * (1 + 1e-9)).all()


@every_round
def test_arguments_are_left_alone_and_results_repeat(find):
    weight, moments = layer()
    grid = search(weight, WeightFormat(4), moments)
    kept = [a.copy() for a in (weight, moments.gram, grid.scales, grid.biases)]
    np.testing.assert_array_equal(find(weight, grid, moments), find(weight, grid, moments))
    for now, before in zip((weight, moments.gram, grid.scales, grid.biases), kept, strict=True):
        np.testing.assert_array_equal(now, before)


@every_round
def test_rounding_refuses_what_it_cannot_do(find):
    weight, moments = layer()
    wide = extremes(np.ones((10, 128)), WeightFormat(4, 128, symmetric=False))
    with pytest.raises(RecipeError, match="groups of 128 do not divide an input width of 64"):
        find(weight, wide, moments)
    grid = extremes(weight, WeightFormat(4))
    for bad in (np.nan, np.inf):
        damaged = weight.copy()
        damaged[2, 3] = bad
        with pytest.raises(NumericsError, match="NaN or infinite"):
            find(damaged, grid, moments)


@every_round
def test_damaged_moments_are_refused_or_not_used(find):
    weight, _ = layer()
    grid = extremes(weight, WeightFormat(4))
    damaged = Moments(np.full((64, 64), np.nan), 64)
    if find is rtn:
        np.testing.assert_array_equal(find(weight, grid, damaged), find(weight, grid, None))
        return
    with pytest.raises(NumericsError, match="NaN or infinite"):
        find(weight, grid, damaged)
