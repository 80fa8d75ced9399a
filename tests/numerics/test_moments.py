"""Second moments: additive, checked, and enough to know a layer's output error."""

import tracemalloc

import numpy as np
import pytest

from mlxquant.errors import CalibrationError, NumericsError
from mlxquant.numerics.moments import Moments, calibrated_gram, energy, output_error


@pytest.fixture
def inputs():
    return np.random.default_rng(0).standard_normal((6, 10, 8)).astype(np.float32)


def of_tokens(inputs):
    tokens = inputs.reshape(-1, inputs.shape[-1]).astype(np.float64)
    return sum(np.outer(x, x) for x in tokens)


@pytest.mark.parametrize(("dtype", "roundings"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_batches_add_up(inputs, dtype, roundings):
    inputs = inputs.astype(dtype)
    whole, parts = Moments.of(inputs), Moments.empty(8, dtype)
    for batch in inputs:
        parts.add(batch)
    assert parts.count == whole.count == 60
    exact = of_tokens(inputs)
    bound = roundings * np.sqrt(np.outer(np.diagonal(exact), np.diagonal(exact)))
    for moments in (whole, parts):
        assert moments.gram.dtype == dtype
        assert (np.abs(moments.gram - exact) <= bound).all()


def test_inputs_may_count_more_or_less(inputs):
    inputs = inputs.astype(np.float64)
    other, moments, exact = inputs[::-1], Moments.empty(8, np.float64), Moments.empty(8, np.float64)
    moments.add(inputs, other, weight=0.25)
    exact.add(inputs, other)
    np.testing.assert_allclose(moments.gram, exact.gram / 4, rtol=1e-12)
    np.testing.assert_allclose(moments.cross, exact.cross / 4, rtol=1e-12)
    assert moments.count == exact.count
    moments.add(inputs, weight=0.1)
    np.testing.assert_array_equal(moments.gram, moments.gram.T)


@pytest.mark.parametrize("width", [3, 8, 9])
def test_panels_do_not_show(width, monkeypatch):
    random = np.random.default_rng(2)
    inputs, exact = random.standard_normal((2, 4, 10, width))
    rows = random.standard_normal((5, width))
    whole = Moments.of(inputs[0])
    whole.add(inputs[1], exact[1])
    monkeypatch.setattr("mlxquant.numerics.moments.PANEL", 4)
    parts = Moments.of(inputs[0])
    np.testing.assert_array_equal(parts.gram, parts.gram.T)  # asked for in between
    parts.add(inputs[1], exact[1])
    np.testing.assert_allclose(parts.gram, of_tokens(inputs[:2]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(parts.cross, whole.cross, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(parts.gram, parts.gram.T)
    np.testing.assert_allclose(energy(rows, parts.gram), [row @ whole.gram @ row for row in rows], rtol=1e-12)


def test_adding_needs_little_more_than_the_gram_matrix(monkeypatch):
    monkeypatch.setattr("mlxquant.numerics.moments.PANEL", 128)
    moments, inputs = Moments.empty(1024), np.ones((64, 1024), np.float32)
    tracemalloc.start()
    moments.add(inputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3 * moments.gram.nbytes


def test_the_moments_of_divided_inputs(inputs):
    divisor = np.linspace(0.5, 2, 8)
    inputs = inputs.astype(np.float64)
    moments, divided = Moments.empty(8, np.float64), Moments.empty(8, np.float64)
    moments.add(inputs, inputs + 1)
    divided.add(inputs / divisor, (inputs + 1) / divisor)
    np.testing.assert_allclose(moments.divided(divisor).gram, divided.gram, rtol=1e-12)
    np.testing.assert_allclose(moments.divided(divisor).cross, divided.cross, rtol=1e-12)


def test_the_moments_of_inputs_after_a_linear_map(inputs):
    inputs, matrix = inputs.astype(np.float64), np.random.default_rng(3).standard_normal((8, 8))
    moments, mapped = Moments.empty(8, np.float64), Moments.empty(8, np.float64)
    exact = inputs[::-1] + 1
    for part, held_out in ((slice(0, 2), True), (slice(2, 6), False)):
        moments.add(inputs[part], exact[part], held_out=held_out)
        mapped.add(inputs[part] @ matrix, exact[part] @ matrix, held_out=held_out)
    found = moments.mapped(lambda rows: rows @ matrix)
    for one, other in ((found, mapped), (found.held_out, mapped.held_out)):
        np.testing.assert_allclose(one.gram, other.gram, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(one.cross, other.cross, rtol=1e-12, atol=1e-12)
        assert one.count == other.count
    assert moments.mapped(lambda rows: rows[:, ::-1]).gram[0, 1] == moments.gram[7, 6]
    assert Moments.of(inputs.astype(np.float32)).mapped(lambda rows: rows @ matrix).gram.dtype == np.float32


def test_some_tokens_may_be_held_out(inputs):
    inputs, exact = inputs.astype(np.float64), inputs[::-1].astype(np.float64)
    moments, whole = Moments.empty(8, np.float64), Moments.empty(8, np.float64)
    assert moments.training is moments
    for part, held_out in ((slice(0, 3), False), (slice(3, 4), True), (slice(4, 6), False)):
        moments.add(inputs[part], exact[part], 0.5, held_out=held_out)
    whole.add(inputs, exact, 0.5)
    rest = [0, 1, 2, 4, 5]
    for found, some in ((moments, slice(None)), (moments.held_out, [3]), (moments.training, rest)):
        expected = Moments.empty(8, np.float64)
        expected.add(inputs[some], exact[some], 0.5)
        np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found.cross, expected.cross, rtol=1e-12, atol=1e-12)
        assert found.count == expected.count
    divisor = np.linspace(0.5, 2, 8)
    np.testing.assert_allclose(
        moments.divided(divisor).held_out.gram, moments.held_out.gram / np.outer(divisor, divisor)
    )


def test_float16_inputs_do_not_overflow():
    assert Moments.of(np.full((2, 3), 60000, np.float16)).gram[0, 0] == 2 * 60000.0**2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_must_be_finite(inputs, bad):
    inputs[3, 2, 5] = bad
    moments = Moments.empty(8)
    with pytest.raises(NumericsError, match="channel 5"):
        moments.add(inputs)
    assert moments.count == 0
    assert not moments.gram.any()


def test_inputs_of_another_layer_are_refused(inputs):
    with pytest.raises(CalibrationError, match="input width 7"):
        Moments.empty(7).add(inputs)


def test_output_error_is_that_of_the_outputs(inputs):
    random = np.random.default_rng(1)
    weight, quantized = random.standard_normal((2, 5, 8))
    tokens = inputs.reshape(-1, 8).astype(np.float64)
    expected = np.linalg.norm(tokens @ (weight - quantized).T) / np.linalg.norm(tokens @ weight.T)
    assert output_error(weight, quantized, Moments.of(tokens)) == pytest.approx(expected, rel=1e-12)
    assert output_error(weight, quantized, Moments.of(inputs)) == pytest.approx(expected, rel=1e-6)


def test_float32_is_enough_far_from_zero():
    random = np.random.default_rng(4)
    inputs = (random.standard_normal((500, 64)) + 100 * random.standard_normal(64)).astype(np.float32)
    weight = random.standard_normal((5, 64))
    change = 0.01 * random.standard_normal((5, 64))
    change -= (
        np.outer(change @ inputs.mean(0), inputs.mean(0)) / np.square(inputs.mean(0)).sum()
    )  # as feedback leaves it
    exact = output_error(weight, weight - change, Moments.of(inputs.astype(np.float64)))
    assert output_error(weight, weight - change, Moments.of(inputs)) == pytest.approx(exact, rel=0.01)


def test_output_error_edges():
    moments = Moments.identity(4)
    assert output_error(np.zeros((2, 4)), np.zeros((2, 4)), moments) == 0
    assert output_error(np.zeros((2, 4)), np.ones((2, 4)), moments) == np.inf
    assert output_error(np.ones((2, 4)), np.zeros((2, 4)), moments) == 1


def test_a_gram_matrix_is_demanded():
    with pytest.raises(CalibrationError, match="calibrate first"):
        calibrated_gram(None, 4)
    with pytest.raises(CalibrationError, match="calibrate first"):
        calibrated_gram(Moments.empty(4), 4)
    with pytest.raises(CalibrationError, match="3 inputs do not belong to a weight with 4"):
        calibrated_gram(Moments.identity(3), 4)
    damaged = Moments.identity(4)
    damaged.gram[1, 2] = np.nan
    with pytest.raises(NumericsError, match="NaN"):
        calibrated_gram(damaged, 4)


def test_an_energy_is_never_negative():
    """A gram matrix that was rounded may have lost its last eigenvalues' sign."""
    rounded = np.diag([1.0, -1e-9])
    np.testing.assert_array_equal(energy(np.array([[0.0, 1.0], [1.0, 0.0]]), rounded), [0, 1])
