"""Second moments: additive, checked, and enough to know a layer's output error."""

import numpy as np
import pytest

from mlxquant.errors import CalibrationError, NumericsError
from mlxquant.methods.moments import Moments, calibrated_gram, output_error


@pytest.fixture
def inputs():
    return np.random.default_rng(0).standard_normal((6, 10, 8)).astype(np.float32)


def test_batches_add_up(inputs):
    whole, parts = Moments.of(inputs), Moments.empty(8)
    for batch in inputs:
        parts.add(batch)
    assert parts.count == whole.count == 60
    np.testing.assert_allclose(parts.gram, whole.gram, rtol=1e-12)
    tokens = inputs.reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(whole.gram, sum(np.outer(x, x) for x in tokens), rtol=1e-12)


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
    assert output_error(weight, quantized, Moments.of(inputs)) == pytest.approx(expected, rel=1e-12)


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
