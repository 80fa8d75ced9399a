"""Laws of all methods that choose a grid ("steps"), codes on it ("round") or better both ("refine"); registering covers
a new one.

The moments are of two streams. Methods that need both are judged by the error against the full-precision stream's
outputs, the others by the error on the inputs they see.
"""

import inspect

import numpy as np
import pytest

from mlxquant.errors import CalibrationError, NumericsError, RecipeError
from mlxquant.grids.weights import Grid, WeightFormat
from mlxquant.methods import registry
from mlxquant.methods.weights.rtn import rtn
from mlxquant.methods.weights.steps import extremes, search
from mlxquant.numerics.moments import Moments, excess, shortfall

FORMATS = [WeightFormat.parse(text) for text in ("w2", "w4", "w4-asym", "w3-g32", "w4-g64-sym", "w4-tensor", "w8")]
STEPS = [pytest.param(method.function, id=method.name) for method in registry.members("steps")]
ROUND = [pytest.param(method.function, id=method.name) for method in registry.members("round")]
REFINE = [pytest.param(method.function, id=method.name) for method in registry.members("refine")]
CROSS = {method.function for method in registry.members("round") if method.cross}
every_refine = pytest.mark.parametrize("refine", REFINE)
every_steps = pytest.mark.parametrize("find", STEPS)
every_round = pytest.mark.parametrize("find", ROUND)
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)


def layer(rows=10, width=64, seed=0):
    random = np.random.default_rng(seed)
    weight = (random.standard_t(4, (rows, width)) * 0.02).astype(np.float32)
    inputs = random.standard_normal((5 * width, width)) @ random.standard_normal((width, width))
    inputs[:, : max(1, width // 32)] *= 12
    moments = Moments.empty(width, np.float64)
    moments.add(inputs, inputs * random.normal(1, 0.2, inputs.shape))
    return weight, moments


def alike(gram, count):
    """The moments of streams that do not differ."""
    return Moments(gram, count, gram.copy())


def of_channels(moments, order):
    """The moments of the same inputs with their channels in another order."""
    chosen = np.ix_(order, order)
    return Moments(moments.gram[chosen], moments.count, moments.cross[chosen])


def losses(find, weight, grid, codes, moments):
    missing = shortfall(weight.astype(np.float64), moments) if find in CROSS else None
    return excess(weight.astype(np.float64) - grid.dequantize(codes), moments.gram, missing)


def never_worse(find, weight, grid, codes, moments):
    """Row by row, but for the last digits of numbers as large as the output's energy."""
    nearest = losses(find, weight, grid, rtn(weight, grid), moments)
    signal = excess(weight, moments.gram)
    return (losses(find, weight, grid, codes, moments) <= nearest * (1 + 1e-9) + 1e-12 * signal).all()


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
        np.testing.assert_allclose(
            find(weight[::-1], format, moments).scales, find(weight, format, moments).scales, rtol=1e-3
        )
        return
    whole, alone = find(weight, format, moments), find(weight[3:4], format, moments)
    np.testing.assert_array_equal(alone.scales, whole.scales[3:4])
    np.testing.assert_array_equal(alone.biases, whole.biases[3:4])


def three_layers(format):
    """Weights, moments and grids, the first of them searched."""
    for seed in range(3):
        weight, moments = layer(seed=seed)
        yield weight, moments, extremes(weight, format) if seed else search(weight, format, moments)


@every_round
@every_format
def test_codes_are_in_range_and_never_worse_than_nearest(find, format):
    for weight, moments, grid in three_layers(format):
        codes = find(weight, grid, moments)
        assert codes.dtype == np.uint8
        assert codes.shape == weight.shape
        assert codes.max() < format.levels
        assert never_worse(find, weight, grid, codes, moments)


@every_round
@every_format
def test_an_identity_hessian_gives_nearest(find, format):
    weight, _ = layer()
    grid = extremes(weight, format)
    for strength in (1.0, 1e-6, 1e8):
        moments = alike(strength * np.eye(64), 64)
        np.testing.assert_array_equal(find(weight, grid, moments), rtn(weight, grid))


@every_round
@every_format
def test_a_weight_on_the_grid_stays_there(find, format):
    weight, moments = layer()
    grid = extremes(weight, format)
    codes = rtn(weight, grid)
    same = alike(moments.gram, moments.count)
    np.testing.assert_array_equal(find(grid.dequantize(codes), grid, same), codes)


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
    options = (
        {"passes": 0} if "passes" in inspect.signature(find).parameters else {}
    )  # descent visits channels in their order
    order = np.random.default_rng(5).permutation(64)
    shuffled = find(weight[:, order], grid, of_channels(moments, order), **options)
    np.testing.assert_array_equal(shuffled, find(weight, grid, moments, **options)[:, order])


@every_round
def test_groups_may_come_in_any_order(find):
    weight, moments = layer(width=128)
    grid = search(weight, WeightFormat.parse("w4-g32"), moments)
    options = {"passes": 0} if "passes" in inspect.signature(find).parameters else {}
    groups = np.array([2, 0, 3, 1])
    order = (groups[:, None] * 32 + np.arange(32)).ravel()
    moved = Grid(grid.format, grid.scales[:, groups], grid.biases[:, groups])
    shuffled = find(weight[:, order], moved, of_channels(moments, order), **options)
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
    np.testing.assert_array_equal(
        find(weight, grid, Moments(moments.gram * strength, moments.count, moments.cross * strength)), codes
    )


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
    gram, cross = moments.gram.copy(), moments.cross.copy()
    gram[[7, 50]], gram[:, [7, 50]], cross[[7, 50]] = 0, 0, 0  # dead where the model is quantized
    moments = Moments(gram, moments.count, cross)
    grid = search(weight, WeightFormat(4), moments)
    codes = find(weight, grid, moments)
    assert (grid.dequantize(codes)[[0, 4]] == 0).all()
    assert never_worse(find, weight, grid, codes, moments)


@every_round
def test_arguments_are_left_alone_and_results_repeat(find):
    weight, moments = layer()
    grid = search(weight, WeightFormat(4), moments)
    arguments = (weight, moments.gram, moments.cross, grid.scales, grid.biases)
    kept = [a.copy() for a in arguments]
    np.testing.assert_array_equal(find(weight, grid, moments), find(weight, grid, moments))
    for now, before in zip(arguments, kept, strict=True):
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
    damaged = alike(np.full((64, 64), np.nan), 64)
    if find is rtn:
        np.testing.assert_array_equal(find(weight, grid, damaged), find(weight, grid, None))
        return
    with pytest.raises(NumericsError, match="NaN or infinite"):
        find(weight, grid, damaged)


@every_round
def test_what_needs_both_streams_says_so(find):
    weight, moments = layer()
    grid, one = search(weight, WeightFormat(4), moments), Moments(moments.gram, moments.count)
    if find not in CROSS:
        np.testing.assert_array_equal(find(weight, grid, moments), find(weight, grid, one))
        return
    with pytest.raises(CalibrationError, match="cross"):
        find(weight, grid, one)
    with pytest.raises(CalibrationError, match="calibrate first"):
        find(weight, grid, None)
    moments.cross[5, 9] = np.inf
    with pytest.raises(NumericsError, match="NaN or infinite"):
        find(weight, grid, moments)


@every_refine
@every_format
def test_refined_steps_can_be_stored_and_are_no_worse(refine, format):
    for weight, moments, grid in three_layers(format):
        codes = rtn(weight, grid)
        given = [a.copy() for a in (grid.scales, grid.biases, codes)]
        refined, found = refine(weight, grid, codes, moments, damping=0.0)
        for now, before in zip((grid.scales, grid.biases, codes), given, strict=True):
            np.testing.assert_array_equal(now, before)
        assert refined.format == format
        assert refined.scales.shape == refined.biases.shape == grid.scales.shape
        assert (refined.scales > 0).all()
        for stored in (refined.scales, refined.biases / format.zero_code if format.symmetric else refined.biases):
            np.testing.assert_array_equal(stored.astype(np.float16).astype(np.float32), stored)
        assert found.dtype == np.uint8
        assert found.shape == weight.shape
        assert found.max() < format.levels
        before, after = (excess(weight - g.dequantize(c), moments.gram) for g, c in ((grid, codes), (refined, found)))
        if format.group == "tensor":
            before, after = before.sum(), after.sum()
        assert (after <= before * (1 + 1e-5)).all()  # what is added up in float32 may differ in the last digits


@every_refine
@every_format
def test_refining_leaves_what_is_exact(refine, format):
    weight, moments = layer()
    codes = rtn(weight, grid := extremes(weight, format))
    refined, found = refine(grid.dequantize(codes), grid, codes, moments)
    np.testing.assert_array_equal(refined.dequantize(found), grid.dequantize(codes))


@every_refine
def test_refining_a_row_does_not_depend_on_the_others(refine):
    weight, moments = layer()
    for format in FORMATS:
        if format.group == "tensor":
            continue
        grid = search(weight, format, moments)
        codes = rtn(weight, grid)
        whole_grid, whole = refine(weight, grid, codes, moments)
        alone_grid, alone = refine(weight[3:4], rows_of(grid, slice(3, 4)), codes[3:4], moments)
        np.testing.assert_array_equal(alone, whole[3:4])
        np.testing.assert_array_equal(alone_grid.scales, whole_grid.scales[3:4])


@every_refine
def test_refining_survives_zero_rows_and_dead_channels(refine):
    weight, moments = layer()
    weight[[0, 4]] = 0
    gram = moments.gram.copy()
    gram[[7, 50]], gram[:, [7, 50]] = 0, 0
    for format in FORMATS:
        grid = search(weight, format, moments)
        refined, codes = refine(weight, grid, rtn(weight, grid), Moments(gram, moments.count))
        assert np.isfinite(refined.scales).all()
        if format.group != "tensor" and format.symmetric:
            assert (refined.dequantize(codes)[[0, 4]] == 0).all()
    with pytest.raises(CalibrationError, match="calibrate first"):
        refine(weight, grid, codes, None)
