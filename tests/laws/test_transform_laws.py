"""Laws that every transform keeps, over the whole registry: what it proposes changes no output."""

import numpy as np
import pytest

from mlxquant.methods.registry import members
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.numerics.moments import Moments
from mlxquant.numerics.transform import Place, Transform

METHODS = members("transform")
PLACES = [Place(), Place("gelu", reorders=True), Place(mixes=16), Place(mixes=12)]
every_transform = pytest.mark.parametrize(
    "find", [method.function for method in METHODS], ids=[method.name for method in METHODS]
)
every_place = pytest.mark.parametrize("place", PLACES, ids=["plain", "reorders", "heads of 16", "heads of 12"])


def ranges_of(rows):
    low, high = rows.min(1), rows.max(1)
    return InputRanges(np.linspace(0.1, 1, len(rows), dtype=np.float32), low, high, low, high, rows)


def data(width=96, levels=3, seed=0):
    """Inputs [T,R,in] with outlier channels that grow over the timesteps and a dead one, two weights, one of them with
    a dead column.
    """
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((levels, 40, width)) * np.exp(rng.standard_normal(width)) + 0.3
    rows[:, :, 1] *= 30 * np.arange(1, levels + 1)[:, None]
    rows[:, :, 2] = 0
    weights = [rng.standard_normal((n, width)) for n in (24, 8)]
    weights[0][:, 3] = weights[1][:, 3] = 0
    return ranges_of(rows.astype(np.float32)), weights


def relative(found, wanted, x, weight):
    """The largest difference, in units of what rounding of the products can be."""
    return float((np.abs(found - wanted) / (np.abs(x) @ np.abs(weight).T).max()).max())


@every_transform
@every_place
@pytest.mark.parametrize("width", [96, 144, 64, 10, 7])
def test_the_output_is_unchanged(find, place, width):
    ranges, weights = data(width)
    for transform in find(ranges, weights, place):
        assert not transform.nothing
        for weight in weights:
            for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-6)):
                x, w = ranges.rows[0].astype(dtype), weight.astype(dtype)
                changed, matched = transform.inputs(x), transform.weight(w)
                assert changed.dtype == matched.dtype == dtype
                exact = x.astype(np.float64) @ w.astype(np.float64).T
                assert relative(changed @ matched.T, exact, x, w) < bound


@every_transform
@every_place
def test_candidates_are_well_formed(find, place):
    ranges, weights = data()
    for transform in find(ranges, weights, place):
        if transform.divisor is not None:
            assert transform.divisor.dtype == np.float32
            assert transform.divisor.shape == (96,)
            assert np.isfinite(transform.divisor).all()
            assert (transform.divisor > 0).all()
        if transform.order is not None:
            assert place.reorders
            np.testing.assert_array_equal(np.sort(transform.order), np.arange(96))
        assert 96 % transform.block == 0


@every_transform
@pytest.mark.parametrize("dead", ["inputs", "weights", "both", "a timestep"])
def test_what_is_dead_does_no_harm(find, dead):
    ranges, weights = data()
    if dead in ("inputs", "both"):
        ranges = ranges_of(ranges.rows * 0)
    if dead in ("weights", "both"):
        weights = [weight * 0 for weight in weights]
    if dead == "a timestep":
        ranges.rows[1] = 0
        ranges = ranges_of(ranges.rows)
    for transform in find(ranges, weights, Place(reorders=True)):
        for weight in weights:
            x = ranges.rows[0].astype(np.float64)
            np.testing.assert_allclose(
                transform.inputs(x) @ transform.weight(weight).T, x @ weight.T, rtol=1e-10, atol=1e-10
            )


@every_transform
@every_place
def test_the_same_comes_out_every_time_and_nothing_changes(find, place):
    ranges, weights = data()
    kept = [value.copy() for value in (ranges.rows, ranges.least, ranges.most, *weights)]
    first, second = find(ranges, weights, place), find(ranges, weights, place)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.block == other.block
        for name in ("divisor", "order"):
            np.testing.assert_equal(getattr(one, name), getattr(other, name))
    for now, before in zip((ranges.rows, ranges.least, ranges.most, *weights), kept, strict=True):
        np.testing.assert_array_equal(now, before)


@every_transform
@every_place
def test_statistics_are_those_of_transformed_inputs(find, place):
    ranges, weights = data()
    x = ranges.rows.reshape(-1, 96).astype(np.float64)
    moments = Moments.empty(96, np.float64)
    moments.add(x, 2 * x + 1)
    for transform in find(ranges, weights, place):
        direct = Moments.empty(96, np.float64)
        direct.add(transform.inputs(x), transform.inputs(2 * x + 1))
        scale = np.sqrt(np.outer(np.diagonal(direct.gram), np.diagonal(direct.gram))) + 1e-9
        assert (np.abs(transform.moments(moments).gram - direct.gram) / scale).max() < 1e-9
        assert np.abs(transform.moments(moments).cross - direct.cross).max() < 1e-9 * np.abs(direct.cross).max()
        changed, exact = (
            transform.ranges(ranges),
            ranges_of(transform.inputs(ranges.rows.astype(np.float64)).astype(np.float32)),
        )
        for name in ("low", "high", "least", "most", "rows"):
            assert getattr(changed, name).dtype == np.float32
            np.testing.assert_allclose(getattr(changed, name), getattr(exact, name), rtol=1e-5, atol=1e-4)


@every_transform
def test_what_was_done_before_is_kept(find):
    """Candidates for an input that is transformed already: the two as one."""
    ranges, weights = data()
    rng = np.random.default_rng(5)
    before = Transform(divisor=rng.uniform(0.5, 2, 96).astype(np.float32), order=rng.permutation(96))
    changed = before.ranges(ranges), [before.weight(weight) for weight in weights]
    x, weight = ranges.rows[0].astype(np.float64), weights[0]
    for candidate in find(*changed, Place(reorders=True)):
        both = before.then(candidate)
        np.testing.assert_allclose(both.inputs(x), candidate.inputs(before.inputs(x)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(both.inputs(x) @ both.weight(weight).T, x @ weight.T, rtol=1e-9, atol=1e-9)
