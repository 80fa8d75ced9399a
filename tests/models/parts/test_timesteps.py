"""Features of time by their definition; ``test_parity.py`` compares with diffusers."""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxquant.models.parts.timesteps import time_features


@pytest.mark.parametrize(("flip", "shift", "scale"), [(True, 0, 1), (False, 1, 1), (True, 0.5, 3)])
def test_cosines_and_sines_of_falling_frequencies(flip, shift, scale):
    t = np.array([0, 0.25, 7.5, 30])
    frequencies = 100.0 ** (-np.arange(5) / (5 - shift))
    angles = scale * t[:, None] * frequencies
    halves = [np.cos(angles), np.sin(angles)]
    expected = np.concatenate(halves if flip else halves[::-1], axis=1)
    found = time_features(mx.array(t.astype(np.float32)), 10, flip, shift, scale, max_period=100)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    odd = time_features(mx.array(t.astype(np.float32)), 11, flip, shift, scale, max_period=100)
    np.testing.assert_array_equal(odd, np.pad(np.array(found), [(0, 0), (0, 1)]))
    assert found.dtype == mx.float32
