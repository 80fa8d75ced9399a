"""The quantized layer equals integer arithmetic with one rescale, on every format, and survives saving."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.errors import AdapterError, RecipeError
from mlxquant.grids.integer_matmul import integer_matmul
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat, fit_extremes
from mlxquant.layers import product as layers_module
from mlxquant.layers.linear import QuantizedLinear
from mlxquant.layers.packed import QuantizedLayer
from mlxquant.numerics.low_rank import LowRank
from mlxquant.numerics.transform import Transform

CLOCK = Clock()


def table(bits=8, width=1, sigma=(0.1, 0.5, 1.0)):
    rng = np.random.default_rng(3)
    count = len(sigma)
    shift = rng.normal(0, 0.2, (count, width)).astype(np.float32)
    bits = np.broadcast_to(np.uint8(bits), count).copy()
    return ActivationTable(np.float32(sigma), rng.uniform(0.01, 0.03, count).astype(np.float32), shift, bits)


def layer(format="w4", out=12, width=128, activations=None, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 0.05, (out, width)).astype(np.float32)
    grid = fit_extremes(weight, WeightFormat.parse(format))
    made = QuantizedLinear(
        grid.quantize(weight), grid, mx.array(rng.normal(size=out).astype(np.float32)) if bias else None
    )
    if activations is not None:
        made.set_activations(activations, CLOCK)
    return made


def inputs(batch=3, tokens=5, width=128, seed=1):
    return mx.array(np.random.default_rng(seed).normal(0, 1, (batch, tokens, width)).astype(np.float32))


def activation_codes(x, step, shift, bits):
    edge = 2 ** (bits - 1)
    return np.clip(np.rint((np.array(x) - shift) / step), -edge, edge - 1).astype(np.int64)


@pytest.mark.parametrize("bits_a", [4, 6, 8])
@pytest.mark.parametrize("format", ["w2", "w3", "w4", "w5", "w6", "w7", "w8"])
@pytest.mark.parametrize("width", [128, 2048])
def test_integer_part_equals_int_arithmetic_exactly(format, bits_a, width):
    """At 8 x 8 bits and 2048 inputs the sum passes 2^24, so this also covers the chunked path."""
    rng = np.random.default_rng(0)
    limit_w, limit_a = 2 ** (int(format[1]) - 1), 2 ** (bits_a - 1)
    q = rng.integers(-limit_a, limit_a, (7, width))
    w = rng.integers(-limit_w, limit_w, (11, width))
    q[0], w[0] = -limit_a, -limit_w  # the largest sum there is
    result = integer_matmul(mx.array(q.astype(np.float32)), mx.array(w.astype(np.float32)), limit_a, limit_w)
    np.testing.assert_array_equal(np.array(result), (q @ w.T).astype(np.float32))


@pytest.mark.parametrize("shift_width", [1, 128])
@pytest.mark.parametrize("bits_a", [4, 6, 8])
@pytest.mark.parametrize("format", ["w4", "w8", "w3", "w4-tensor"])
def test_forward_is_the_int32_computation_and_one_scaling(format, bits_a, shift_width):
    activations = table(bits_a, shift_width)
    made, x = layer(format, activations=activations), inputs()
    with CLOCK.at(0.5):
        y = np.array(made(x))
    q = activation_codes(x, activations.step[1], activations.shift[1], bits_a)
    w = made.codes().astype(np.int64) - made.format.zero_code
    scale = np.array(made.scales).astype(np.float32)[:, 0]
    scaled = (q @ w.T).astype(np.int32).astype(np.float32) * (activations.step[1] * scale)
    shift = np.broadcast_to(activations.shift[1], 128).astype(np.float64)
    folded = (shift @ w.T * scale).astype(np.float32) + np.array(made.bias)
    np.testing.assert_allclose(y, scaled + folded, rtol=0, atol=2e-6)
    without = layer(
        format,
        activations=ActivationTable(activations.sigma, activations.step, activations.shift * 0, activations.bits),
        bias=False,
    )
    with CLOCK.at(0.5):
        bare = np.array(without(x))
    q = activation_codes(x, activations.step[1], 0, bits_a)
    exact = (q @ w.T).astype(np.int32).astype(np.float32) * (activations.step[1] * scale)
    np.testing.assert_array_equal(bare, exact)  # bit by bit


@pytest.mark.parametrize("format", ["w4-g32", "w4-g64", "w4-g128", "w4-g64-sym", "w4-asym", "w8-tensor-asym", "w7-g32"])
def test_grouped_and_asymmetric_formats_agree_with_float64(format):
    activations = table(8)
    made, x = layer(format, activations=activations), inputs()
    with CLOCK.at(1.0):
        y = np.array(made(x))
    x_hat = (
        activation_codes(x, activations.step[2], activations.shift[2], 8) * np.float64(activations.step[2])
        + activations.shift[2]
    )
    expected = x_hat @ made.grid().dequantize(made.codes()).astype(np.float64).T + np.array(made.bias)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("format", ["w4", "w4-g64", "w3", "w5-asym", "w7", "w8"])
def test_weight_only_is_the_dequantized_matmul(format):
    made, x = layer(format), inputs()
    expected = np.array(x) @ made.grid().dequantize(made.codes()).T + np.array(made.bias)
    np.testing.assert_allclose(np.array(made(x)), expected, atol=1e-5)


@pytest.mark.parametrize("format", ["w4", "w4-g64", "w3", "w8", "w4-asym"])
@pytest.mark.parametrize("activations", [None, 8])
def test_packed_kernels_give_the_same_result(format, activations, monkeypatch):
    """What Metal runs, executed by the CPU's slow version of the same kernel."""
    made, x = layer(format, activations=table(activations) if activations else None), inputs()
    with CLOCK.at(0.5):
        expected = np.array(made(x))
        monkeypatch.setattr(layers_module, "use_packed_kernels", lambda: True)
        np.testing.assert_allclose(np.array(made(x)), expected, atol=2e-5)


DEVICES = pytest.mark.parametrize("packed", [False, True])


def as_float64(value):
    return np.array(value.astype(mx.float32)).astype(np.float64)


@DEVICES
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("format", ["w8", "w4", "w8-asym", "w4-g64", "w2"])
@pytest.mark.parametrize("transformed", [False, True])
def test_a_16_bit_input_costs_no_more_than_the_rounding_of_the_output(format, dtype, packed, transformed, monkeypatch):
    """Neither scales nor divisors are rounded to its dtype, and the output is once."""
    monkeypatch.setattr(layers_module, "use_packed_kernels", lambda: packed)
    rng = np.random.default_rng(5)
    divisor = rng.uniform(0.5, 2, 128).astype(np.float32) if transformed else None
    plain = layer(format, bias=False)
    bias = mx.array(rng.normal(size=12).astype(np.float32))
    made = QuantizedLinear(
        plain.codes(), plain.grid(), bias, None if divisor is None else mx.array(divisor), 16 if transformed else 1
    )
    x = inputs().astype(dtype)
    seen = as_float64(x)
    if transformed:
        seen = Transform(divisor, None, 16).inputs(seen)
    exact = seen @ made.grid().dequantize(made.codes()).astype(np.float64).T + np.array(bias)
    y = made(x)
    assert y.dtype == dtype
    half_a_digit = {mx.bfloat16: 2.0**-9, mx.float16: 2.0**-12}[dtype] * 2.0 ** np.ceil(np.log2(np.abs(exact)))
    assert (np.abs(as_float64(y) - exact) <= half_a_digit + 1e-5).all()


@pytest.mark.parametrize("width", [512, 544, 1024])
def test_packed_kernels_multiply_integers_where_that_is_exact(width, monkeypatch):
    """They sum codes from 0 to 255: with inputs of 8 bits more than 514 columns may pass 2^24 on the way."""
    monkeypatch.setattr(layers_module, "use_packed_kernels", lambda: True)
    made, used = layer("w8", width=width), []
    monkeypatch.setattr(
        QuantizedLinear, "_multiply_packed", lambda self, x, *scales: used.append(x) or x @ mx.zeros((width, 12))
    )
    made._multiply_codes(inputs(width=width), made.centred_codes(), 128)
    assert bool(used) == (width == 512)


def test_a_batch_may_mix_timesteps():
    made, x = layer(activations=table()), inputs()
    with CLOCK.at([0.1, 1.0, 0.3]):
        together = np.array(made(x))
    for i, sigma in enumerate([0.1, 1.0, 0.3]):
        with CLOCK.at(sigma):
            np.testing.assert_array_equal(np.array(made(x[i : i + 1])), together[i : i + 1])


def test_sixteen_bits_leaves_the_input_alone_also_in_a_mixed_batch():
    made, x = layer(activations=table([8, 16, 4])), inputs()
    plain = np.array(layer()(x))
    with CLOCK.at(0.5):
        np.testing.assert_array_equal(np.array(made(x)), plain)
    with CLOCK.at([0.1, 0.5, 1.0]):
        mixed = np.array(made(x))
    np.testing.assert_array_equal(mixed[1], plain[1])
    assert np.abs(mixed[0] - plain[0]).max() > 0


def test_clock_that_does_not_fit_is_refused():
    made = layer(activations=table())
    with pytest.raises(AdapterError, match="no timestep was set"):
        made(inputs())
    with CLOCK.at([0.1, 0.2]), pytest.raises(AdapterError, match="2 timesteps for a batch of 3"):
        made(inputs())


def test_reading_many_timesteps_takes_bounded_memory():
    made, x = layer(activations=table()), inputs(batch=1, tokens=1)
    for sigma in np.linspace(0, 1, 600):
        with CLOCK.at(sigma):
            made(x)
    assert len(made._reader._entries) <= 256


STRUCTURES = ["w4", "w3-g64", "w8-tensor", "w7", "w5-asym"]


@pytest.mark.parametrize("format", STRUCTURES)
@pytest.mark.parametrize("activations", [None, table(6, 1), table(6, 128)])
def test_structure_and_tensors_rebuild_the_layer(format, activations):
    made, x = layer(format, activations=activations), inputs()
    again = QuantizedLinear.blank(made.facts, CLOCK)
    again.load_weights(tree_flatten(made.parameters()))
    again.refresh()
    with CLOCK.at(0.4):
        np.testing.assert_array_equal(np.array(again(x)), np.array(made(x)))
    assert again.facts == made.facts


@pytest.mark.parametrize("format", STRUCTURES)
@pytest.mark.parametrize("bias", [None, mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("activations", [None, table(6, 128)])
@pytest.mark.parametrize("divided", [False, True])
def test_a_blank_has_the_shapes_and_dtypes_of_the_layer(format, bias, activations, divided):
    plain = layer(format, width=128, bias=False)
    vector = None if bias is None else mx.ones((12,), bias)
    made = QuantizedLinear(plain.codes(), plain.grid(), vector, mx.ones(128) if divided else None)
    if activations is not None:
        made.set_activations(activations, CLOCK)
    blank = QuantizedLinear.blank(json.loads(json.dumps(made.facts)), CLOCK)
    assert structure(blank) == structure(made)
    assert blank.facts == made.facts


def structure(layer):
    return {name: (value.shape, value.dtype) for name, value in tree_flatten(layer.parameters())}


def test_a_layer_that_was_saved_before_biases_had_dtypes_is_float32():
    facts = layer().facts
    del facts["bias_dtype"]
    assert QuantizedLinear.blank(facts, CLOCK).bias.dtype == mx.float32


def test_a_blank_takes_no_memory():
    facts = {
        "format": WeightFormat(8).to_dict(),
        "shape": [4096, 4096],
        "bias": True,
        "bias_dtype": "float16",
        "table": [28, 4096],
    }
    before = mx.get_active_memory()
    blank = QuantizedLinear.blank(facts, CLOCK)
    assert blank.nbytes > 1 << 24
    assert mx.get_active_memory() - before < 1 << 12


def test_a_blank_that_was_not_filled_does_not_run():
    blank = QuantizedLinear.blank(layer(activations=table()).facts, CLOCK)
    with CLOCK.at(0.5), pytest.raises(RecipeError, match="every step must be positive"):
        blank(inputs())


@pytest.mark.parametrize("format", ["w4", "w4-tensor", "w4-asym", "w4-g64"])
@pytest.mark.parametrize("shift_width", [1, 128])
def test_new_weights_count_after_a_refresh(format, shift_width):
    activations = table(8, shift_width)
    made, other, x = layer(format, activations=activations), layer(format, activations=activations, seed=5), inputs()
    with CLOCK.at(0.5):
        before, wanted = np.array(made(x)), np.array(other(x))
        made.load_weights(tree_flatten(other.parameters()))
        made.refresh()
        np.testing.assert_array_equal(np.array(made(x)), wanted)
    assert np.abs(before - wanted).max() > 0.1


@pytest.mark.parametrize("shift_width", [1, 128])
@pytest.mark.parametrize("format", ["w4", "w8", "w4-tensor", "w4-asym"])
def test_a_shift_costs_no_dequantized_weight(format, shift_width, monkeypatch):
    """Beyond the row sums, which are computed once and are no parameter."""
    made, x = layer(format, activations=table(8, shift_width)), inputs()
    before = structure(made)
    with CLOCK.at(0.5):
        expected = np.array(made(x))
        monkeypatch.delattr(QuantizedLayer, "matrix")
        np.testing.assert_array_equal(np.array(made(x)), expected)
    assert structure(made) == before


@pytest.mark.parametrize(
    "format", ["w2", "w4", "w7", "w8", "w4-tensor", "w8-tensor-asym", "w4-asym", "w3-g64", "w4-g32-sym", "w7-g32"]
)
def test_the_dequantized_weight_is_the_grids(format):
    made = layer(format)
    np.testing.assert_array_equal(np.array(made.dequantized()), made.grid().dequantize(made.codes()))


def test_nothing_but_the_format_is_stored():
    made = layer("w4-g128", out=64, width=256)
    assert made.nbytes * 8 == 4.25 * 64 * 256
    assert sum(v.nbytes for k, v in tree_flatten(made.parameters()) if k != "bias") == made.nbytes


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("activations", [None, table()])
def test_half_precision_inputs_keep_their_dtype_and_lose_nothing_but_the_last_rounding(dtype, activations):
    made, x = layer(activations=activations, bias=False), inputs().astype(dtype)
    with CLOCK.at(0.5):
        y, exact = made(x), made(x.astype(mx.float32))
    assert y.dtype == dtype
    assert mx.array_equal(y, exact.astype(dtype))


# What is done to the input first, and the low-rank branch beside the integer weight


BRANCH = LowRank(*(np.random.default_rng(7).normal(0, 0.3, shape).astype(np.float16) for shape in ((12, 3), (3, 128))))
DIVISOR = np.random.default_rng(8).uniform(0.5, 2, 128).astype(np.float32)
PARTS = [
    (None, 1, None),
    (DIVISOR, 1, None),
    (None, 64, None),
    (None, 1, BRANCH),
    (DIVISOR, 16, None),
    (DIVISOR, 64, BRANCH),
]
every_part = pytest.mark.parametrize(
    ("divisor", "rotation", "branch"), PARTS, ids=["plain", "divisor", "rotation", "branch", "both", "everything"]
)


def transformed_layer(divisor, rotation, branch, format="w4", activations=None):
    """A layer whose integer weight and branch together stand, up to rounding, for the returned weight float64
    [12,128].
    """
    weight = np.random.default_rng(0).normal(0, 0.05, (12, 128))
    low = 0 if branch is None else branch.weight.astype(np.float64)
    transform = Transform(divisor=divisor, block=rotation)
    grid = fit_extremes(transform.weight(weight) - low, WeightFormat.parse(format))
    codes = grid.quantize(transform.weight(weight) - low)
    bias = mx.array(np.random.default_rng(1).normal(size=12).astype(np.float32))
    made = QuantizedLinear(codes, grid, bias, None if divisor is None else mx.array(divisor), rotation, branch)
    if activations is not None:
        made.set_activations(activations, CLOCK)
    return made, weight


@every_part
@pytest.mark.parametrize("format", ["w4", "w8", "w4-g64"])
def test_a_transformed_layer_is_the_plain_function(divisor, rotation, branch, format):
    """Against float64: x R D^-1 meets what the integers and the branch stand for, and that is the weight up to half a
    step.
    """
    made, weight = transformed_layer(divisor, rotation, branch, format)
    x = inputs()
    integers = made.grid().dequantize(made.codes()).astype(np.float64)
    low = 0 if branch is None else branch.up.astype(np.float64) @ branch.down.astype(np.float64)
    seen = Transform(divisor=divisor, block=rotation).inputs(np.array(x).astype(np.float64))
    np.testing.assert_allclose(np.array(made.transformed(x)), seen, atol=1e-5)
    np.testing.assert_allclose(np.array(made(x)), seen @ (integers + low).T + np.array(made.bias), atol=2e-5)
    if format == "w8":
        np.testing.assert_allclose(np.array(made(x)), np.array(x) @ weight.T + np.array(made.bias), atol=0.2)


@every_part
@pytest.mark.parametrize("bits_a", [4, 8])
def test_the_integer_part_stays_exact_and_the_branch_reads_unquantized_inputs(divisor, rotation, branch, bits_a):
    activations = table(bits_a)
    made, _ = transformed_layer(divisor, rotation, branch, activations=activations)
    bare = QuantizedLinear(made.codes(), made.grid(), made.bias)
    bare.set_activations(activations, CLOCK)
    x = made.transformed(inputs())
    with CLOCK.at(0.5):
        y, integers = np.array(made(inputs())), np.array(bare(x))
    if branch is None:
        np.testing.assert_array_equal(y, integers)
    else:
        low = np.array(x).astype(np.float64) @ branch.down.astype(np.float64).T @ branch.up.astype(np.float64).T
        np.testing.assert_allclose(y, integers + low, atol=2e-5)
        assert np.abs(low).max() > 1


@every_part
@pytest.mark.parametrize("activations", [None, table(6, 128)])
def test_transforms_and_branches_survive_saving_and_new_codes(divisor, rotation, branch, activations):
    made, _ = transformed_layer(divisor, rotation, branch, activations=activations)
    facts, x = json.loads(json.dumps(made.facts)), inputs()
    again = QuantizedLinear.blank(facts, CLOCK)
    assert structure(again) == structure(made)
    again.load_weights(tree_flatten(made.parameters()))
    again.refresh()
    flipped = made.with_codes(15 - made.codes())
    with CLOCK.at(0.4):
        y = np.array(made(x))
        np.testing.assert_array_equal(np.array(again(x)), y)
        np.testing.assert_array_equal(np.array(flipped.with_codes(made.codes())(x)), y)
        assert np.abs(np.array(flipped(x)) - y).max() > 0
    assert again.facts == flipped.facts == made.facts
    assert again.rotation == rotation
    assert (again.branch is None) == (branch is None)
    if branch is not None:
        np.testing.assert_array_equal(again.branch.up, branch.up)
        np.testing.assert_array_equal(again.branch.down, branch.down)


def test_layers_that_were_saved_before_transforms_load():
    facts = layer(activations=table()).facts
    for name in ("rotation", "rank", "divisor", "log"):
        facts.pop(name)
    blank = QuantizedLinear.blank(facts, CLOCK)
    assert blank.rotation == 1
    assert blank.branch is None


def test_everything_that_stands_for_the_weight_is_counted():
    made, _ = transformed_layer(DIVISOR, 64, BRANCH)
    assert made.nbytes == 12 * 128 // 2 + 2 * 12 + 4 * 128 + 2 * 3 * (12 + 128)


@pytest.mark.parametrize("rotation", [2, 3, 8, 256])
def test_blocks_that_do_not_fit_are_refused(rotation):
    plain = layer()
    with pytest.raises(AdapterError, match=f"blocks of {rotation} cannot rotate an input of width 128"):
        QuantizedLinear(plain.codes(), plain.grid(), rotation=rotation)


def test_parts_of_another_width_are_refused():
    plain = layer()
    with pytest.raises(AdapterError, match="a divisor of shape"):
        QuantizedLinear(plain.codes(), plain.grid(), divisor=mx.ones(64))
    with pytest.raises(AdapterError, match="a branch of"):
        QuantizedLinear(plain.codes(), plain.grid(), branch=LowRank(BRANCH.up, BRANCH.down[:, :64]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_goes_through_transforms_and_branches(dtype):
    made, _ = transformed_layer(DIVISOR, 64, BRANCH)
    x = inputs().astype(dtype)
    y, exact = made(x), made(x.astype(mx.float32))
    assert y.dtype == dtype
    np.testing.assert_allclose(
        np.array(y.astype(mx.float32)), np.array(exact), atol=0.1 if dtype == mx.bfloat16 else 0.02
    )


@pytest.mark.parametrize("format", ["w8", "w8-asym"])
@pytest.mark.parametrize("width", [512, 4096])
def test_packed_kernels_are_left_where_their_sums_would_not_be_exact(format, width, monkeypatch):
    """All codes and inputs near their largest: 512 products of them fit in what float32 counts, 4096 do not."""
    monkeypatch.setattr(layers_module, "use_packed_kernels", lambda: True)
    packed, multiply = [], QuantizedLinear._multiply_packed
    monkeypatch.setattr(
        QuantizedLinear, "_multiply_packed", lambda self, x, *rest: packed.append(x) or multiply(self, x, *rest)
    )
    random = np.random.default_rng(0)
    weight = random.uniform(0.8, 1, (6, width)).astype(np.float32)
    weight[:, 0] = -1 if format == "w8" else 0
    grid = fit_extremes(weight, WeightFormat.parse(format))
    made = QuantizedLinear(grid.quantize(weight), grid)
    q, codes = random.integers(100, 128, (5, width)), made.codes().astype(np.int64) - 128
    found = made._multiply_codes(mx.array(q.astype(np.float32)), made.centred_codes(), 128)
    np.testing.assert_array_equal(np.array(found), (q @ codes.T).astype(np.float32))
    assert bool(packed) == (width == 512)
