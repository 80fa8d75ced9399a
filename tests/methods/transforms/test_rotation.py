"""Rotations: blocks that fit the place, channels dealt evenly, and smaller peaks."""

import numpy as np
import pytest

from mlxquant.methods.transforms.rotation import dealt, rotation
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.numerics.transform import Place


def ranges(width, outliers=4, seed=0):
    """Inputs [2,50,width] whose first channels are 30 times the others."""
    rows = np.random.default_rng(seed).standard_normal((2, 50, width)).astype(np.float32)
    rows[..., :outliers] *= 30
    return InputRanges(np.array([0.2, 0.8]), *(f(rows, 1) for f in (np.min, np.max, np.min, np.max)), rows)


@pytest.mark.parametrize(
    ("width", "place", "blocks"),
    [
        (1536, Place(), [256]),
        (1536, Place(mixes=64), [64, 256]),
        (192, Place(mixes=32), [16, 64]),
        (64, Place(mixes=64), [64]),
        (96, Place(mixes=64), [16]),  # the last run is shorter, and blocks fit into it, too
        (96, Place(mixes=6), [16]),  # nothing fits into heads of 6, so the layer rotates
        (96, Place("gelu", reorders=True), [16, 16]),
        (64, Place("gelu", reorders=True), [64]),  # one block: an order changes nothing
        (6, Place(), []),
    ],
)
def test_blocks_fit_the_place(width, place, blocks):
    found = rotation(ranges(width), [], place)
    assert [transform.block for transform in found] == blocks
    assert [transform.order is not None for transform in found] == [False, place.reorders][: len(found)]
    assert all(transform.divisor is None for transform in found)


def test_outliers_are_shared_out():
    seen = ranges(256)
    plain = np.abs(seen.rows).max()
    block, dealt_block = rotation(ranges(192), [], Place(reorders=True))
    narrow = ranges(192)
    rotated, evened = (np.abs(t.inputs(narrow.rows)).max() for t in (block, dealt_block))
    assert np.abs(rotation(seen, [], Place())[0].inputs(seen.rows)).max() < 0.25 * plain
    assert evened < 0.8 * rotated < 0.8 * plain


def test_dealing_is_even_and_complete():
    mass = np.random.default_rng(0).exponential(size=64) ** 2
    order = dealt(mass, 16)
    np.testing.assert_array_equal(np.sort(order), np.arange(64))
    totals, before = mass[order].reshape(4, 16).sum(1), mass.reshape(4, 16).sum(1)
    assert np.ptp(totals) < 0.3 * np.ptp(before)
    np.testing.assert_array_equal(np.diff(order.reshape(4, 16)) > 0, True)


def test_equal_channels_fill_every_block():
    order = dealt(np.ones(16), 4)
    np.testing.assert_array_equal(np.sort(order), np.arange(16))
    np.testing.assert_array_equal(dealt(np.zeros(8), 4), [0, 1, 2, 3, 4, 5, 6, 7])
