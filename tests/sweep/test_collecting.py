"""What is collected of a layer's inputs: once, without copies of it, and up to date."""

import tracemalloc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.layers.switch import SwitchLinear
from mlxquant.sweep.collecting import Collector, InputStatistics


def inputs(samples=3, tokens=20, width=8, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal((samples, tokens, width)).astype(np.float32))


def test_ranges_are_gathered_once_and_again_when_there_is_more():
    statistics = InputStatistics(nn.Linear(8, 1))
    statistics.add((inputs(),), 0.5)
    ranges = statistics.ranges
    assert statistics.ranges is ranges
    statistics.add((inputs(seed=1) * 10,), 0.25)
    assert statistics.ranges is not ranges
    np.testing.assert_array_equal(statistics.ranges.sigma, np.array([0.25, 0.5], np.float32))
    assert statistics.ranges.most.max() > ranges.most.max()


def test_no_ranges_are_an_error():
    for statistics in (InputStatistics(nn.Linear(8, 1)), InputStatistics(nn.Linear(8, 1), ranges=False)):
        with pytest.raises(NumericsError, match="no activation ranges"):
            _ = statistics.ranges
    statistics.add((inputs(),), 0.5)
    with pytest.raises(NumericsError, match="no activation ranges"):
        _ = statistics.ranges


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_is_collected_is_that_of_the_inputs(dtype):
    x, exact = inputs().astype(dtype), inputs(seed=1).astype(dtype)
    statistics = InputStatistics(nn.Linear(8, 1), rows=5)
    statistics.add((x,), 0.5, (exact,), weight=2.0)
    values, reference = (np.array(a.astype(mx.float32)).astype(np.float64).reshape(-1, 8) for a in (x, exact))
    np.testing.assert_allclose(statistics.moments.parts[0].gram, 2 * values.T @ values, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(statistics.moments.parts[0].cross, 2 * values.T @ reference, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(statistics.ranges.least[0], values.min(0))
    np.testing.assert_array_equal(statistics.ranges.rows[0], values[[0, 14, 29, 44, 59]])


def test_what_is_kept_outlives_the_inputs():
    x = inputs()
    statistics, expected = InputStatistics(nn.Linear(8, 1), range_batch=1), np.array(x)
    statistics.add((x,), 0.5)
    del x
    mx.eval([mx.zeros((3, 20, 8)) for _ in range(50)])  # whoever gets that memory next
    np.testing.assert_allclose(statistics.ranges.low[0], expected.min(1).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(statistics.ranges.rows[0], expected.reshape(-1, 8))


def test_inputs_are_not_copied():
    x = inputs(4, 512, 2048)
    statistics = InputStatistics(nn.Linear(2048, 1))
    tracemalloc.start()
    statistics.add((x,), 0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * x.nbytes


def test_every_fourth_sample_of_each_noise_level_is_held_out():
    batches = {
        0.9: (inputs(3), inputs(5, seed=1)),
        0.4: (inputs(3, seed=2), inputs(5, seed=3)),
        0.1: (inputs(3, seed=4),),
    }
    statistics = InputStatistics(nn.Linear(8, 1), hold_out=True)
    for index in range(2):
        for sigma, some in batches.items():
            if index < len(some):
                statistics.add((some[index],), sigma, (some[index] * 2,))
    everything = np.concatenate([np.array(x).reshape(-1, 8) for some in batches.values() for x in some]).astype(
        np.float64
    )
    held = np.concatenate([np.array(batches[sigma][1])[[0, 4]].reshape(-1, 8) for sigma in (0.9, 0.4)]).astype(
        np.float64
    )
    np.testing.assert_allclose(statistics.moments.parts[0].gram, everything.T @ everything, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(statistics.moments.parts[0].held_out.gram, held.T @ held, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(statistics.moments.parts[0].held_out.cross, 2 * held.T @ held, rtol=1e-5, atol=1e-4)
    assert statistics.moments.parts[0].training.count == len(everything) - len(held)
    plain = InputStatistics(nn.Linear(8, 1))
    plain.add((inputs(8),), 0.9)
    assert plain.moments.parts[0].held_out is None


def test_layers_share_an_array_only_where_they_read_it_alike():
    """Of convolutions, those that put their kernels in the same places."""
    layers = {
        "one": nn.Conv1d(8, 2, 3),
        "alike": nn.Conv1d(8, 5, 3),
        "wider": nn.Conv1d(8, 2, 5),
        "padded": nn.Conv1d(8, 2, 3, padding=1),
    }
    collector, x = Collector(layers), inputs()
    for path in layers:
        collector(path, x)
    assert collector["alike"] is collector["one"]
    assert len({id(collector[path]) for path in layers}) == 3
    assert [collector[path].moments.count for path in layers] == [3 * 18, 3 * 18, 3 * 16, 3 * 20]


def test_experts_of_two_streams_are_not_compared_for_routers_may_choose_others():
    layer, (x, exact) = SwitchLinear(8, 2, 3), (inputs(seed=seed)[:, :, None] for seed in (0, 1))
    chosen, other = (mx.array(np.random.default_rng(seed).integers(0, 3, (3, 20))) for seed in (2, 3))
    statistics = InputStatistics(layer)
    statistics.add((x, chosen), 0.5, (exact, other))
    for part in statistics.moments.parts:
        np.testing.assert_array_equal(part.cross, part.gram)
