"""Laws that every fake quantizer keeps, over the whole registry, and what each of them is, against float64."""

import mlxquant  # noqa: F401  (before mlx, so that MLX gets a fast BLAS)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import RecipeError
from mlxquant.grids.weights import WeightFormat, fit_extremes, snap
from mlxquant.methods.fake_quantizers import Quantizer, straight_through
from mlxquant.methods.registry import get, members
from mlxquant.methods.weights.rtn import rtn

HALF = WeightFormat()
METHODS = [method.name for method in members("fake")]
every_method = pytest.mark.parametrize("method", METHODS)
every_width = pytest.mark.parametrize("bits", range(2, 9))
KEY = mx.random.key(7)
SAMPLES = {
    "both signs": np.random.default_rng(0).standard_t(3, (24, 40)),
    "positive": np.random.default_rng(1).uniform(3, 5, (24, 40)),
    "negative": -np.random.default_rng(2).uniform(3, 5, (24, 40)),
    "tiny": np.random.default_rng(3).normal(0, 1e-12, (24, 40)),
    "huge": np.random.default_rng(4).normal(0, 1e4, (24, 40)),
    "one outlier": np.eye(24, 40) * 1e3 + 1e-3,
    "a row of zeros": np.random.default_rng(5).normal(size=(24, 40)) * (np.arange(24)[:, None] != 3),
    "zeros": np.zeros((24, 40)),
}
every_sample = pytest.mark.parametrize("name", SAMPLES)


def code(method, x, bits, axes=None, key=KEY, half=False):
    return Quantizer(method, bits).code(mx.array(x, mx.float32), axes, key, half)


def test_the_methods_go_by_these_names():
    assert METHODS == ["affine_quant", "stochastic_quant", "symmetric_quant", "ternary_quant"]


@every_sample
@every_width
@every_method
def test_codes_are_integers_in_range_and_never_wrap(method, bits, name):
    for axes, half in ((None, False), ((-1,), True)):
        coded = code(method, SAMPLES[name], bits, axes, half=half)
        codes = np.array(coded.codes)
        assert np.array_equal(codes, np.rint(codes))
        assert 0 <= codes.min() <= codes.max() <= 2**coded.bits - 1
        signed = np.array(coded.signed)
        assert signed.dtype == np.int8
        assert np.array_equal(signed.astype(int), codes.astype(int) - 2 ** (coded.bits - 1))
        assert len(np.unique(codes)) <= 2**bits
        values = np.array(coded.values)
        assert np.isfinite(values).all()
        again = np.array(coded.scale) * (signed - np.array(coded.zero_point, np.float64))
        np.testing.assert_allclose(again, values, rtol=1e-4, atol=1e-4 * np.abs(values).max() + 1e-30)


@every_method
def test_zeros_stay_zeros(method):
    for half in (False, True):
        for key in (None, KEY):
            coded = code(method, SAMPLES["zeros"], 4, key=key, half=half)
            assert np.array_equal(np.array(coded.values), SAMPLES["zeros"])
            assert np.array(coded.scale).item() == 1


@every_sample
@every_width
@pytest.mark.parametrize("method", ["symmetric_quant", "affine_quant", "stochastic_quant"])
def test_no_value_moves_further_than_it_must(method, bits, name):
    x = SAMPLES[name].astype(np.float32)
    for axes in (None, (-1,)):
        coded = code(method, x, bits, axes, key=None)
        steps = np.abs(np.array(coded.values, np.float64) - x) / np.array(coded.scale, np.float64)
        assert steps.max() <= 0.5 + 1e-3


@every_method
def test_gradients_pass_straight_through(method):
    x, weight = mx.array(SAMPLES["both signs"], mx.float32), mx.random.normal((24, 40), key=mx.random.key(1))
    for level in (0.0, 0.3, 1.0):

        def loss(x, level=level):
            return (straight_through(x, Quantizer(method, 4).code(x, (-1,), KEY).values, level) * weight).sum()

        assert mx.array_equal(mx.grad(loss)(x), weight)


@every_method
def test_the_level_blends(method):
    x = mx.array(SAMPLES["both signs"], mx.float32)
    values = Quantizer(method, 3).code(x, None, KEY).values
    assert mx.array_equal(straight_through(x, values, 1.0), values)
    assert mx.array_equal(straight_through(x, values, 0.0), x)
    np.testing.assert_allclose(
        np.array(straight_through(x, values, 0.25)), 0.75 * np.array(x) + 0.25 * np.array(values), atol=1e-6
    )


@every_method
def test_half_scales_have_the_digits_of_float16(method):
    for name in ("both signs", "tiny", "huge", "positive"):
        coded = code(method, SAMPLES[name], 8, (-1,), half=True)
        scale, bias = np.array(coded.scale), np.array(coded.bias)
        assert np.array_equal(snap(scale, HALF), scale)
        assert np.array_equal(snap(np.abs(bias), HALF), np.abs(bias)) or (bias == 0).any()


def test_scales_halfway_are_rounded_as_stored():
    """To even, as NumPy rounds those of calibrated layers; two bits, so that the scale is the largest value."""
    x = np.float32([[1 + 2.0**-11], [1 + 3 * 2.0**-11], [1 + 2.0**-11 + 2.0**-20], [1 + 2.0**-11 - 2.0**-20]])
    scale = np.array(code("symmetric_quant", x, 2, (-1,), half=True).scale)
    np.testing.assert_array_equal(scale, snap(x, HALF))
    np.testing.assert_array_equal(scale[:, 0], [1, 1 + 2.0**-9, 1 + 2.0**-10, 1])


@every_method
@pytest.mark.parametrize("power", [-40, -20, 20])
def test_codes_follow_the_weight(method, power):
    """A weight times a power of two has the same codes, on scales that are as many times larger."""
    for name in ("both signs", "positive"):
        x = SAMPLES[name].astype(np.float32)
        expected, found = (code(method, values, 8, (-1,), half=True) for values in (x, np.ldexp(x, power)))
        assert mx.array_equal(found.codes, expected.codes)
        assert mx.array_equal(found.scale, expected.scale * 2.0**power)
        assert mx.array_equal(found.bias, expected.bias * 2.0**power)


@every_method
def test_bfloat16_is_rounded_as_what_it_holds(method):
    x = mx.array(SAMPLES["both signs"], mx.bfloat16)
    half, full = (Quantizer(method, 8).code(value, (-1,), KEY) for value in (x, x.astype(mx.float32)))
    assert mx.array_equal(half.codes, full.codes)
    assert straight_through(x, half.values).dtype == mx.bfloat16


def test_symmetric_is_absmax_over_the_last_code():
    x = SAMPLES["both signs"].astype(np.float32).astype(np.float64)
    scale = np.abs(x).max(1, keepdims=True) / 7
    coded = code("symmetric_quant", x, 4, (-1,))
    np.testing.assert_allclose(np.array(coded.scale), scale, rtol=1e-6)
    near_tie = np.abs(np.abs(x / scale % 1) - 0.5) < 1e-5
    assert np.array_equal(np.array(coded.signed)[~near_tie], np.rint(x / scale)[~near_tie])


def test_a_symmetric_weight_is_the_one_that_rounding_to_nearest_stores():
    x = SAMPLES["both signs"].astype(np.float32)
    for bits in (3, 4, 8):
        grid = fit_extremes(x, WeightFormat(bits))
        coded = code("symmetric_quant", x, bits, (-1,), half=True)
        np.testing.assert_array_equal(np.array(coded.scale), grid.scales)
        np.testing.assert_array_equal(np.array(coded.codes), rtn(x, grid))


def test_affine_spans_the_range_and_zero():
    for name, low, high in (("both signs", None, None), ("positive", 0.0, None), ("negative", None, 0.0)):
        x = SAMPLES[name].astype(np.float32).astype(np.float64)
        low, high = x.min() if low is None else low, x.max() if high is None else high
        coded = code("affine_quant", x, 6)
        scale = (high - low) / 63
        np.testing.assert_allclose(np.array(coded.scale).item(), scale, rtol=1e-6)
        zero = np.array(coded.zero_point).item()
        assert zero == pytest.approx(np.rint(-low / scale) - 32, abs=1e-4)
        assert np.array(Quantizer("affine_quant", 6).code(mx.array([low, 0.0, high])).values)[1] == pytest.approx(
            0, abs=1e-6 * scale
        )


def test_ternary_is_the_mean_magnitude_times_a_sign():
    x = SAMPLES["both signs"].astype(np.float32).astype(np.float64)
    for bits in (2, 8):
        coded = code("ternary_quant", x, bits, (-1,))
        scale = np.abs(x).mean()
        assert set(np.unique(np.array(coded.codes))) == {1, 2, 3}
        np.testing.assert_allclose(np.array(coded.scale), scale, rtol=1e-6)
        assert set(np.unique(np.array(coded.signed))) == {-1, 0, 1}
        np.testing.assert_array_equal(np.array(coded.signed), np.clip(np.rint(x / scale), -1, 1))


def test_stochastic_rounding_is_unbiased_with_the_variance_of_a_coin():
    fractions = np.array([0.0, 0.1, 0.25, 0.5, 0.9])
    x = np.concatenate([[7.0], 2 + fractions, -3 + fractions])  # with the first, the step at 4 bits is 1
    draws = 20000
    many = np.stack([x] * draws)
    signed = np.array(Quantizer("stochastic_quant", 4).code(mx.array(many, mx.float32), (-1,), KEY).signed).astype(
        float
    )
    f = x - np.floor(x)
    error = np.sqrt(np.maximum(f * (1 - f), 1e-9) / draws)
    assert (np.abs(signed.mean(0) - x) < 5 * error + 1e-6).all()
    np.testing.assert_allclose(signed.var(0), f * (1 - f), atol=5 / np.sqrt(draws))
    assert np.array_equal(signed[:, 0], np.full(draws, 7))


def test_random_numbers_come_from_the_key_alone():
    x = SAMPLES["both signs"]
    first, again, other = (
        np.array(code("stochastic_quant", x, 3, key=mx.random.key(seed)).codes) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    mx.random.seed(3)
    expected = np.array(mx.random.uniform(shape=(4,)))
    mx.random.seed(3)
    mx.eval(code("stochastic_quant", x, 3).codes)
    assert np.array_equal(np.array(mx.random.uniform(shape=(4,))), expected)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(RecipeError, match=f"2 to 8, found {bits}"):
        Quantizer("symmetric_quant", bits)
    with pytest.raises(RecipeError, match="unknown fake method 'log'"):
        Quantizer("log", 8)
    with pytest.raises(RecipeError):
        get("fake", "affine_quant").function(mx.zeros((2,)), bits)
