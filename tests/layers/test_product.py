"""Convolutions and switch layers with quantized inputs: integers that are exact, levels that are the table's, zeros of
the padding that stay zeros.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import AdapterError
from mlxquant.grids.reading import represented
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock
from mlxquant.grids.weights import WeightFormat
from mlxquant.layers.convolutions import QuantizedConvolution
from mlxquant.layers.kinds import kind_of
from mlxquant.layers.switch import QuantizedSwitchLinear, SwitchLinear
from mlxquant.numerics.low_rank import LowRank

SIGMA = np.array([0.2, 0.8], np.float32)
LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1, groups=2), (2, 11, 6)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 6, 7, 4)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4, dilation=2), (2, 6, 7, 8)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), (2, 3, 4, 3, 2)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 7, 4)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 5, 5, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3, 2)),
    "experts": (lambda: SwitchLinear(16, 6, 3), (2, 5, 1, 1, 16)),
}
CHOSEN = mx.array(np.random.default_rng(9).integers(0, 3, (2, 5, 2)))


def built(name, format):
    make, shape = LAYERS[name]
    exact, rng = make(), np.random.default_rng(0)
    exact.update({k: mx.array(rng.normal(size=v.shape).astype(np.float32)) for k, v in exact.parameters().items()})
    layer = kind_of(exact).quantized(exact, WeightFormat.parse(format), "extremes")
    x = mx.array(rng.normal(1.5, 2, size=shape).astype(np.float32))
    return exact, layer, (x, CHOSEN) if name == "experts" else (x,)


def table(bits, shift=0.7, log=False):
    steps = np.array([0.05, 0.11], np.float32) * (1 if bits == 8 else 12)
    return ActivationTable(SIGMA, steps, np.array([[shift], [1.9 * shift]], np.float32), np.full(2, bits), log)


def with_weight(exact, weight):
    """The exact layer with another weight, and its answer in float64-like precision of one float32 product."""
    exact.weight = weight.reshape(exact.weight.shape)
    return exact


def integer_convolution(exact, q, codes):
    """Of integers, by a loop over outputs of int64 patches."""
    from mlxquant.numerics.patches import patches

    window = kind_of(exact).form.window_of(exact)
    rows = np.array(patches(q, window)).astype(np.int64)
    flat = codes.astype(np.int64).reshape(window.groups, -1, codes.shape[-1])
    y = np.einsum("...gk,gok->...go", rows, flat)
    return y.reshape(*y.shape[:-2], -1)


@pytest.mark.parametrize("format", ["w4", "w8", "w8-asym", "w3-asym"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_integers_are_multiplied_as_int32_does(name, bits, format):
    exact, layer, call = built(name, format)
    rng, edge = np.random.default_rng(1), 2 ** (bits - 1)
    q = mx.array(rng.integers(-edge, edge, call[0].shape).astype(np.float32))
    where = layer.arguments(*call[1:])
    centred = layer.codes().astype(np.int64) - layer.format.zero_code
    found = np.array(layer._multiply_codes(layer.unrolled(q), layer.centred_codes(), edge, *where))
    if name == "experts":
        weight, rows = centred.reshape(3, 6, 16)[np.array(CHOSEN)], np.array(q)[:, :, 0].astype(np.int64)
        expected = np.einsum("btk,btcok->btco", rows[:, :, 0], weight)[..., None, :]
    else:
        expected = integer_convolution(exact, q, centred)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_wide_sums_are_cut_where_float32_would_round():
    """4608 products of 8-bit codes: their sum passes 2^24."""
    exact = nn.Conv2d(512, 2, 3, bias=False)
    exact.weight = mx.ones(exact.weight.shape) + mx.random.normal(exact.weight.shape, key=mx.random.key(0)) * 1e-3
    layer = QuantizedConvolution.from_convolution(exact, WeightFormat(8))
    q = mx.array(np.random.default_rng(0).integers(100, 128, (1, 3, 4, 512)).astype(np.float32))
    centred = layer.codes().astype(np.int64) - 128
    found = np.array(layer._multiply_codes(layer.unrolled(q), layer.centred_codes(), 128))
    expected = integer_convolution(exact, q, centred)
    assert expected.max() > 2**24
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("format", ["w4", "w8-asym", "w4-tensor", "w5"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_table_gives_what_its_levels_give(name, format):
    """Two noise levels in a batch; the shift goes wherever the input is, and not where it is padded."""
    exact, layer, call = built(name, format)
    clock = Clock()
    layer.set_activations(table(8), clock)
    with clock.at(SIGMA[::-1].astype(np.float64)):
        found = np.array(layer(*call))
        levels = represented(call[0], layer.reader.read(call[0]))
    expected = np.array(with_weight(exact, layer.matrix())(levels, *call[1:]))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    with clock.at(0.2):
        mild = np.array(layer(*call))
    assert not np.allclose(mild, found)


@pytest.mark.parametrize("name", ["Conv2d", "grouped", "ConvTranspose2d", "experts"])
@pytest.mark.parametrize("made", ["token", "log", "groups", "float"])
def test_what_is_simulated_gives_what_its_levels_give(name, made):
    exact, layer, call = built(name, "w4")
    clock = Clock()
    if made == "token":
        layer.quantize_tokens(6)
    elif made == "float":
        some = table(8)
        layer.set_activations(ActivationTable(SIGMA, some.step, some.shift, np.array([16, 8])), clock)
    else:
        layer.set_activations(table(8, shift=-6.0, log=made == "log"), clock)
    with clock.at(SIGMA.astype(np.float64)):
        found = np.array(layer(*call))
        levels = represented(call[0], layer.reader.read(call[0]))
    expected = np.array(with_weight(exact, layer.matrix())(levels, *call[1:]))
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", LAYERS)
def test_a_branch_is_added_for_the_input_as_it_is(name):
    exact, layer, call = built(name, "w4")
    rng, rank, form = np.random.default_rng(2), 2, kind_of(exact).form
    up = rng.normal(size=(layer.rows, rank)).astype(np.float16)
    down = rng.normal(size=(layer.parts * rank, layer.width)).astype(np.float16)
    beside = form.of(exact, layer.codes(), layer.grid(), branch=LowRank(up, down))
    clock = Clock()
    beside.set_activations(table(8), clock)
    layer.set_activations(table(8), clock)
    parts = zip(
        np.split(up.astype(np.float32), layer.parts), np.split(down.astype(np.float32), layer.parts), strict=True
    )
    added = np.concatenate([u @ d for u, d in parts])
    np.testing.assert_allclose(beside.effective() - layer.effective(), added, atol=1e-4)
    exact.pop("bias")
    with clock.at(0.8):
        change = np.array(beside(*call)) - np.array(layer(*call))
    expected = np.array(with_weight(exact, mx.array(added))(*call))
    np.testing.assert_allclose(change, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["grouped", "experts"])
def test_a_branch_of_fewer_parts_is_refused(name):
    exact, layer, _ = built(name, "w4")
    branch = LowRank(np.zeros((layer.rows, 2), np.float16), np.zeros((2, layer.width), np.float16))
    with pytest.raises(AdapterError, match=rf"does not fit a weight of shape .* in {layer.parts} parts"):
        kind_of(exact).form.of(exact, layer.codes(), layer.grid(), branch=branch)


def test_shapes_of_pictures_may_change():
    """What a shift adds is kept for a picture's shape, and forgotten with the parameters."""
    _, layer, (x,) = built("Conv2d", "w4")
    clock = Clock()
    layer.set_activations(table(8), clock)
    with clock.at(0.2):
        before = np.array(layer(x))
        layer(x[:, :4])
        np.testing.assert_array_equal(np.array(layer(x)), before)
        layer.scales = layer.scales * 2
        layer.refresh()
        twice = np.array(layer(x)) - np.array(layer.bias)
    np.testing.assert_allclose(twice, 2 * (before - np.array(layer.bias)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Conv2d", "experts"])
def test_a_shift_a_channel_is_a_linears_alone(name):
    _, layer, call = built(name, "w4")
    wide = ActivationTable(SIGMA, np.ones(2), np.zeros((2, call[0].shape[-1])), np.full(2, 8))
    with pytest.raises(AdapterError, match=f"a {type(layer).__name__} has one shift for all channels"):
        layer.set_activations(wide, Clock())


def test_a_switch_layer_is_told_by_what_it_is():
    class Other(nn.Module):
        def __call__(self, x, indices, sorted_indices=False):
            return x

    Other.__name__ = "SwitchLinear"
    assert not isinstance(Other(), SwitchLinear)  # it has no weight of experts
    assert not isinstance(nn.Linear(3, 4), SwitchLinear)
    assert isinstance(SwitchLinear(3, 4, 2), SwitchLinear)
    assert not isinstance(QuantizedSwitchLinear.from_switch(SwitchLinear(3, 4, 2), WeightFormat(4)), SwitchLinear)


def test_sorted_experts_answer_alike():
    _, layer, (x, chosen) = built("experts", "w4-asym")
    layer.quantize_tokens(8)
    order = mx.argsort(chosen.flatten())
    flat = mx.repeat(x.reshape(-1, 1, 16), 2, axis=0)[order]
    y = np.array(layer(flat, chosen.flatten()[order], True))[np.argsort(np.array(order))]
    np.testing.assert_allclose(y.reshape(2, 5, 2, 1, 6), np.array(layer(x, chosen)), rtol=1e-5, atol=1e-5)
