"""Ranges that clip: what clipping costs is measured at the layer's output."""

import numpy as np
import pytest

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


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_the_order_of_the_channels_does_not_matter_where_rows_are_sampled(channels):
    """A stride that skipped every other channel would clip as suits those that it sees."""
    rng = np.random.default_rng(0)
    rows = np.sign(rng.normal(size=(1, 4000, channels))) * rng.uniform(3, 4, (1, 4000, channels))
    rows[..., ::2] = rng.normal(size=(1, 4000, channels // 2)) / 8  # quiet: alone, they would clip the others
    rows = rows.astype(np.float32)
    found = []
    for x in (rows, rows[..., ::-1]):
        least, most = x.min(1), x.max(1)
        ranges = InputRanges(np.array([0.5], np.float32), least, most, least, most, x)
        found.append(error(ranges, np.ones((1, channels), np.float32), 4, values=rows.size // 4))
    one, other = found
    np.testing.assert_allclose(one.step, other.step, rtol=0.1)
