"""Ranges that clip: what clipping costs is measured at the layer's output."""

import numpy as np

from mlxquant.methods.inputs.clipping import error
from mlxquant.numerics.input_ranges import InputRanges


def test_turning_the_outputs_changes_nothing():
    """A channel counts by the squares of its weights, which is what its error adds to the outputs' error."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(2, (1, 400, 8)) * np.linspace(0.2, 3, 8)).astype(np.float32)
    least, most = rows.min(1), rows.max(1)
    ranges = InputRanges(np.array([0.5], np.float32), least, most, least, most, rows)
    weight = np.zeros((64, 8), np.float32)
    weight[0] = rng.uniform(0.5, 1, 8)  # one output: the sum of squares is the square of the sum
    turned = weight.copy()
    turned[:, ::2] = weight[:1, ::2] / 8  # half of the channels spread over all outputs, with the same squares
    given, same = error(ranges, weight, 4), error(ranges, turned, 4)
    assert same.step[0] < (most.max() - least.min()) / 15  # something is clipped
    np.testing.assert_allclose(same.step, given.step, rtol=1e-5)
    np.testing.assert_allclose(same.shift, given.shift, rtol=1e-4, atol=1e-5)
