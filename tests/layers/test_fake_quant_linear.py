"""The layer that calibrates itself: its documentation runs; broken inputs, dtypes and timesteps are told apart."""

import doctest

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxquant.layers.fake_quant_linear as module
from mlxquant.errors import AdapterError, ArtifactError, CalibrationError, NumericsError, RecipeError
from mlxquant.layers.fake_quant_linear import FakeQuantLinear


def inputs(seed=0, scale=1.0, rows=32, width=24):
    return mx.array((np.random.default_rng(seed).normal(size=(rows, width)) * scale).astype(np.float32))


def uneven(seed=0):
    """Channels of unequal reach, one of them dead."""
    reach = np.geomspace(0.1, 8, 24)
    reach[5] = 0
    return inputs(seed) * mx.array(reach.astype(np.float32))


def calibrated(times=(0, 1, 4), **options):
    layer = FakeQuantLinear(24, 8, **options)
    for t in times:
        layer(uneven(t) * (t + 1), timestamp=t)
    return layer


def frozen(times=(0, 1, 4), **options):
    layer = calibrated(times, **options)
    layer.freeze()
    return layer


def test_the_usage_of_the_documentation_runs():
    assert doctest.testmod(module, raise_on_error=True).attempted > 5


def test_calibration_computes_the_exact_layer():
    linear = nn.Linear(24, 8)
    layer = FakeQuantLinear.from_linear(linear)
    for batch in range(3):
        np.testing.assert_allclose(layer(inputs(batch), timestamp=batch), linear(inputs(batch)), atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_frozen_layer_is_the_formula_in_float64(bits):
    layer = calibrated(activation_bits=bits, weight_bits=bits, R_trunc=3.0)
    weight, bias = (np.array(v).astype(np.float64) for v in (layer.weight, layer.bias))
    seen = [np.array(uneven(t) * (t + 1)).astype(np.float64) for t in (0, 1, 4)]
    peaks = np.stack([np.abs(x).max(0) for x in seen])
    live = peaks[0] > 0
    r = peaks / peaks[:, live].min(1, keepdims=True)  # r_tc, equation 3
    joint = (r * peaks).sum(0) / np.where(live, peaks.sum(0), 1)  # equation 4: a channel's own peaks are its weights
    ratio = np.where(live, np.clip(joint, 1, 3.0), 1)  # equation 5
    layer.freeze()
    np.testing.assert_allclose(layer.ratio, ratio, rtol=1e-5)
    moved = weight * ratio
    low, high = np.minimum(moved.min(1, keepdims=True), 0), np.maximum(moved.max(1, keepdims=True), 0)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    zero = low.astype(np.float16).astype(np.float64)
    rounded = np.clip(np.rint((moved - zero) / scale), 0, 2**bits - 1) * scale + zero
    np.testing.assert_allclose(layer.weight, rounded, atol=1e-6)
    x = np.array(uneven(7)).astype(np.float64)
    low, high = (np.minimum(seen[1].min(0), 0) / ratio), (np.maximum(seen[1].max(0), 0) / ratio)
    step = np.where(high > low, (high - low) / (2**bits - 1), 1)
    point = np.rint(-low / step)
    codes = np.clip(np.rint(x / ratio / step) + point, 0, 2**bits - 1)
    expected = (codes - point) * step @ rounded.T + bias
    np.testing.assert_allclose(
        layer(mx.array(x.astype(np.float32)), timestamp=1), expected, atol=0.02 if bits == 4 else 2e-3
    )


def test_quantization_is_as_good_as_its_bits():
    exact = calibrated()
    x = uneven(1) * 2
    y = np.array(exact(x, timestamp=1))
    errors = []
    for bits in (4, 6, 8):
        layer = FakeQuantLinear.from_linear(exact, weight_bits=bits, activation_bits=bits)
        layer(x, timestamp=1)
        layer.freeze()
        errors.append(np.linalg.norm(np.array(layer(x, timestamp=1)) - y) / np.linalg.norm(y))
    assert errors[0] < 0.2
    assert errors[2] < 0.01
    assert errors[0] > errors[1] > errors[2]


def test_ranges_contain_zero_and_zero_is_exact():
    layer = FakeQuantLinear(24, 8, bias=False)
    layer(mx.abs(inputs()) + 5, timestamp=0)  # all above 0
    layer(-mx.abs(inputs()) - 5, timestamp=1)
    layer.freeze()
    for t in (0, 0.5, 1):
        _, zero = layer.get_activation_qparams(timestamp=t)
        assert ((zero >= 0) & (zero <= 255)).all().item()
        assert mx.all(layer(mx.zeros((1, 24)), timestamp=t) == 0).item()
    x = mx.abs(inputs()) + 5
    assert (
        (
            mx.abs(layer._represented(x / layer.ratio, 0) * layer.ratio - x)
            <= layer.get_activation_qparams(0)[0] * layer.ratio
        )
        .all()
        .item()
    )


def test_dead_channels_inputs_and_weights_divide_by_nothing():
    layer = FakeQuantLinear(24, 8)
    layer.weight = mx.zeros((8, 24))
    layer(mx.zeros((4, 24)), timestamp=0)
    layer.freeze()
    scale, zero = layer.get_activation_qparams(timestamp=0)
    assert (scale == 1).all().item()
    assert (zero == 0).all().item()
    np.testing.assert_array_equal(layer(inputs(), timestamp=0), np.broadcast_to(np.array(layer.bias), (32, 8)))


def test_no_bias_means_none():
    layer = frozen(bias=False)
    assert "bias" not in layer
    assert {name for name, _ in tree_flatten(layer.trainable_parameters())} == {"weight"}
    assert "bias" in frozen()


def test_unseen_timesteps_are_interpolated_and_the_nearest_holds_outside():
    layer = frozen()
    (at1, _), (at4, _), (at2, _) = (layer.get_activation_qparams(timestamp=t) for t in (1, 4, 2))
    np.testing.assert_allclose(at2, at1 + (at4 - at1) / 3, rtol=1e-5)
    for outside, nearest in ((-3, 0), (99, 4)):
        for a, b in zip(layer.get_activation_qparams(outside), layer.get_activation_qparams(nearest), strict=True):
            np.testing.assert_array_equal(a, b)
    assert layer(uneven(), timestamp=2.5).shape == (32, 8)


def test_order_and_batches_of_the_calibration_do_not_matter():
    one, other = FakeQuantLinear(24, 8), FakeQuantLinear(24, 8)
    other.weight = one.weight
    x = {t: uneven(t) for t in (3, 0, 7)}
    for t in (3, 0, 7):
        one(x[t], timestamp=t)
    for t in (7, 3, 0):
        for rows in (slice(0, 5), slice(5, 32)):
            other(x[t][rows].reshape(1, -1, 24), timestamp=t)
    np.testing.assert_array_equal(one.timesteps, [0, 3, 7])
    for name in ("timesteps", "low", "high"):
        np.testing.assert_array_equal(one[name], other[name])
    np.testing.assert_array_equal(one.low[0], x[0].min(0))


def test_calibration_never_mixes_units():
    """Statistics are of x: using a frozen layer changes nothing, and freezing again is refused."""
    layer = frozen()
    before = {name: np.array(value) for name, value in tree_flatten(layer.parameters())}
    layer(uneven(9) * 100, timestamp=1)
    with pytest.raises(CalibrationError, match="frozen already"):
        layer.freeze()
    for name, value in tree_flatten(layer.parameters()):
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("make", [calibrated, frozen, lambda **options: FakeQuantLinear(24, 8, **options)])
@pytest.mark.parametrize(
    "options", [{"dtype": mx.float16, "R_trunc": 4.0}, {"bias": False, "weight_bits": 4, "activation_bits": 6}]
)
def test_save_and_load(tmp_path, make, options):
    layer = make(**options)
    layer.save(tmp_path / "layer.safetensors")
    again = FakeQuantLinear.load(tmp_path / "layer.safetensors")
    for (name, value), (other, found) in zip(
        tree_flatten(layer.parameters()), tree_flatten(again.parameters()), strict=True
    ):
        assert name == other
        assert value.dtype == found.dtype
        np.testing.assert_array_equal(value, found)
    for either in (layer, again):
        if not either.is_frozen:
            either(uneven(3), timestamp=3)
            either.freeze()
    np.testing.assert_array_equal(layer(uneven(8), timestamp=2), again(uneven(8), timestamp=2))


def test_the_state_survives_in_a_model_of_its_own(tmp_path):
    model, fresh = nn.Sequential(frozen(), nn.ReLU()), nn.Sequential(FakeQuantLinear(24, 8), nn.ReLU())
    model.save_weights(str(tmp_path / "model.safetensors"))
    fresh.load_weights(str(tmp_path / "model.safetensors"), strict=False)
    np.testing.assert_array_equal(model.layers[0](uneven(8), timestamp=2), fresh.layers[0](uneven(8), timestamp=2))
    assert fresh.layers[0].is_frozen


def test_foreign_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "layer.safetensors"
    frozen().save(path)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="checksum"):
        FakeQuantLinear.load(path)
    with pytest.raises(ArtifactError, match="No such file"):
        FakeQuantLinear.load(tmp_path / "none")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_outputs_have_the_layers_dtype(dtype):
    layer = frozen(dtype=dtype)
    assert layer(uneven(), timestamp=0).dtype == dtype
    assert layer.weight.dtype == dtype


def test_what_cannot_be_is_refused():
    layer = FakeQuantLinear(24, 8)
    with pytest.raises(CalibrationError, match="needs calibration"):
        layer.freeze()
    with pytest.raises(CalibrationError, match="call freeze first"):
        layer.get_activation_qparams(timestamp=0)
    with pytest.raises(AdapterError, match="width 24, found 23"):
        layer(mx.zeros((2, 23)), timestamp=0)
    for value in (np.zeros((2, 24), np.float32), [0.0] * 24, mx.array(1.0)):
        with pytest.raises(AdapterError, match=r"takes mx\.array of"):
            layer(value, timestamp=0)
    for time in (float("nan"), [1, 2], "a", None):
        with pytest.raises(CalibrationError, match="one finite number"):
            layer(inputs(), timestamp=time)
    with pytest.raises(NumericsError, match="timestep 3 holds NaN"):
        layer(inputs() * float("nan"), timestamp=3)
    assert layer.timesteps.size == 0
    for options in ({"R_trunc": 0.5}, {"activation_bits": 1}, {"weight_bits": 9}):
        with pytest.raises(RecipeError):
            FakeQuantLinear(24, 8, **options)
    for sizes in ((0, 8), (24, -1), (2.5, 8), ("24", 8)):
        with pytest.raises(RecipeError, match="whole numbers of at least 1"):
            FakeQuantLinear(*sizes)
    for dtype in (mx.int8, "float16", np.float32):
        with pytest.raises(RecipeError, match=r"dtype must be one of mx\.float32"):
            FakeQuantLinear(24, 8, dtype=dtype)


def test_ratios_are_truncated_and_at_least_one():
    for truncation in (1.0, 2.0, 10.0):
        ratio = np.array(frozen(R_trunc=truncation).ratio)
        assert ratio.min() >= 1
        assert ratio.max() <= truncation
    assert (np.array(frozen(R_trunc=10.0).ratio) > 1).any()
