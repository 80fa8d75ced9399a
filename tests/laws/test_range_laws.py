"""Laws that every range method keeps, over the whole registry."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.methods.registry import get, members
from mlxquant.sweep.collecting import InputStatistics

METHODS = members("range")


def collect(levels=(0.2, 0.9), width=16, samples=6, seed=0):
    rng = np.random.default_rng(seed)
    statistics = InputStatistics(nn.Linear(width, 1), rows=64)
    for i, sigma in enumerate(levels):
        x = rng.standard_t(4, (samples, 20, width)) * (i + 1) + 0.5
        statistics.add((mx.array(x.astype(np.float32)),), sigma)
    return statistics.ranges


WEIGHT = np.random.default_rng(9).normal(size=(8, 16))


def output_error(table, rows):
    edge = 2.0 ** (table.bits.astype(float) - 1)
    total = 0.0
    for t, x in enumerate(rows):
        codes = np.clip(np.rint((x - table.shift[t]) / table.step[t]), -edge[t], edge[t] - 1)
        total += float((((codes * table.step[t] + table.shift[t] - x) ** 2) * (WEIGHT**2).sum(0)).sum())
    return total


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_one_timestep_equals_the_static_case(method, bits):
    ranges = collect(levels=(0.4,))
    table, static = method.function(ranges, WEIGHT, bits), method.function(ranges.merged(), WEIGHT, bits)
    np.testing.assert_array_equal(table.step, static.step)
    np.testing.assert_array_equal(table.shift, static.shift)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_tables_are_complete_and_scale_with_their_input(method, bits):
    ranges = collect()
    table = method.function(ranges, WEIGHT, bits)
    np.testing.assert_array_equal(table.sigma, ranges.sigma)
    assert (table.step > 0).all()
    assert set(table.bits) == {bits}
    doubled = type(ranges)(ranges.sigma, *(2 * getattr(ranges, k) for k in ("low", "high", "least", "most", "rows")))
    np.testing.assert_allclose(method.function(doubled, WEIGHT, bits).step, 2 * table.step, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_constant_and_zero_inputs_are_survived(method):
    for value in (0.0, 3.0):
        statistics = InputStatistics(nn.Linear(4, 1))
        statistics.add((mx.full((2, 3, 4), value),), 0.5)
        table = method.function(statistics.ranges, WEIGHT[:, :4], 8)
        assert np.isfinite(table.step).all()
        code = np.clip(np.rint((value - table.shift[0, 0]) / table.step[0]), -128, 127)
        assert abs(code * table.step[0] + table.shift[0, 0] - value) < 1e-5


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_schedules_that_hit_the_same_noise_level_get_the_same_entry(method):
    table = method.function(collect(levels=(0.1, 0.3, 0.6, 0.95)), WEIGHT, 8)
    one, other = np.array([0.05, 0.3, 0.42, 0.95]), np.array([0.3, 0.35, 0.42, 0.8, 0.95, 1.0])
    shared = [np.isin(sigma, [0.3, 0.42, 0.95]) for sigma in (one, other)]
    for a, b in zip(table.at(one), table.at(other), strict=True):
        np.testing.assert_array_equal(a[shared[0]], b[shared[1]])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_tables_are_the_same_every_time_and_leave_their_input_alone(method):
    ranges = collect()
    before = {k: getattr(ranges, k).copy() for k in ("sigma", "low", "high", "least", "most", "rows")}
    first, second = (method.function(ranges, WEIGHT, 4) for _ in range(2))
    np.testing.assert_array_equal(first.step, second.step)
    np.testing.assert_array_equal(first.shift, second.shift)
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(ranges, name), value)


def test_error_search_knows_that_rows_miss_the_extremes():
    """64 rows of 4000 hold none of the few large values: by them alone, clipping them looks free."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 4000, 16)).astype(np.float32)
    x[0, 30:46] += 9 * np.eye(16, dtype=np.float32)  # between the first two rows that are kept, 0 and 63
    statistics = InputStatistics(nn.Linear(16, 1), rows=64)
    statistics.add((mx.array(x),), 0.5)
    assert np.abs(statistics.ranges.rows).max() < 5 < 8 < x.max()
    searched, plain = (get("range", name).function(statistics.ranges, WEIGHT, 8) for name in ("error", "extremes"))
    assert output_error(searched, x) < 1.05 * output_error(plain, x)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_error_search_is_never_worse_than_the_extremes(bits):
    ranges = collect()
    searched, plain = (get("range", name).function(ranges, WEIGHT, bits) for name in ("error", "extremes"))
    assert output_error(searched, ranges.rows) <= output_error(plain, ranges.rows) * (1 + 1e-6)
    if bits == 4:
        assert output_error(searched, ranges.rows) < 0.8 * output_error(plain, ranges.rows)


@pytest.mark.parametrize("name", ["extremes", "envelope"])
def test_extremes_and_their_envelope_clip_nothing_that_was_seen(name):
    ranges = collect(levels=np.linspace(0.02, 1, 12))
    table = get("range", name).function(ranges, WEIGHT, 8)
    for t, x in enumerate(np.stack([ranges.least, ranges.most], axis=1)):
        codes = (x - table.shift[t]) / table.step[t]
        assert codes.min() > -128.5
        assert codes.max() < 127.5


def test_moments_and_ranges_are_the_same_however_samples_are_batched():
    x = mx.array(np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32))
    whole, parts = (InputStatistics(nn.Linear(4, 1), range_batch=4) for _ in range(2))
    whole.add((x,), 0.5)
    for rows in (slice(0, 1), slice(1, 6)):
        parts.add((x[rows],), 0.5)
    np.testing.assert_array_equal(whole.ranges.low, parts.ranges.low)
    np.testing.assert_array_equal(whole.ranges.high, parts.ranges.high)
    np.testing.assert_allclose(whole.moments.parts[0].gram, parts.moments.parts[0].gram, rtol=1e-6)


def test_averages_clip_the_more_the_fewer_samples_a_batch_has():
    """All of them in one batch: what was seen, to the last bit."""
    x = mx.array(np.random.default_rng(0).standard_t(4, size=(16, 5, 16)).astype(np.float32))
    steps = []
    for batch in (1, 2, 4, 8, 16):
        statistics = InputStatistics(nn.Linear(16, 1), range_batch=batch)
        statistics.add((x,), 0.5)
        steps.append(get("range", "average").function(statistics.ranges, WEIGHT, 8).step[0])
    assert steps == sorted(steps)
    assert steps[0] < 0.8 * steps[-1]
    assert steps[-1] == get("range", "extremes").function(statistics.ranges, WEIGHT, 8).step[0]
