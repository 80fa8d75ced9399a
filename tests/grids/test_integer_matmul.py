"""Integer products in float32: sums past 2^24 are exact, which those of one product are not."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.grids import integer_matmul as module
from mlxquant.grids.integer_matmul import EXACT, integer_matmul


def as_floats(integers):
    return mx.array(integers.astype(np.float32))


@pytest.mark.parametrize("width", [8192, 8193, 20001])
def test_odd_sums_past_what_float32_counts_are_rounded_once(width):
    """All but the last product are odd and near 127 * 127, the last is 1: as float32 each sum but the first few is
    rounded.
    """
    random = np.random.default_rng(0)
    q, w = (random.integers(50, 64, (count, width)) * 2 + 1 for count in (5, 7))
    q[0], w[0], q[0, -1], w[0, -1] = 127, 127, 1, 1
    exact = q @ w.T
    assert (exact > EXACT).all()
    whole = np.array(as_floats(q) @ as_floats(w).T)
    assert (whole != exact.astype(np.float32)).any()  # what this is about
    np.testing.assert_array_equal(
        np.array(integer_matmul(as_floats(q), as_floats(w), 128, 128)), exact.astype(np.float32)
    )


def test_parts_are_as_long_as_exactness_allows(monkeypatch):
    """One part where the largest sum there can be is exact, and two from one input more."""
    parts = []

    class Seen(np.ndarray):
        def __matmul__(self, other):
            parts.append(self.shape[-1])
            return mx.array(np.asarray(self) @ np.asarray(other))

    for width, expected in ((1024, [1024]), (1025, [1024, 1])):
        parts.clear()
        x, w = (np.full((2, width), value, np.float32) for value in (128, -128))
        integer_matmul(x.view(Seen), w, 128, 128)
        assert parts == expected
    monkeypatch.setattr(module, "EXACT", 100)  # less than a single product
    found = integer_matmul(as_floats(np.full((1, 3), 12)), as_floats(np.full((1, 3), 9)), 12, 9)
    assert np.array(found).tolist() == [[324]]
