"""Averaged min-max is over batches of samples, which are cut at the same places however many samples come at a time."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.layers.tree import tapped
from mlxquant.numerics.input_ranges import RANGE_BATCH, InputRanges, RunningRanges
from mlxquant.sweep.collecting import Collector, InputStatistics

from support.tiny_pictures import tiny_adapter

LAYER = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"


def averaged(low, high, batch):
    """[in] both, in float64: the mean over batches of each batch's smallest and largest, by how many samples each
    has.
    """
    cuts = range(0, len(low), batch)
    sizes = [len(low[cut : cut + batch]) for cut in cuts]
    smallest = [low[cut : cut + batch].astype(np.float64).min(0) for cut in cuts]
    largest = [high[cut : cut + batch].astype(np.float64).max(0) for cut in cuts]
    return np.average(smallest, axis=0, weights=sizes), np.average(largest, axis=0, weights=sizes)


def collected(low, high, batch, chunks):
    ranges = RunningRanges(low.shape[1], batch)
    for some in np.split(np.arange(len(low)), np.cumsum(chunks)[:-1]):
        ranges.add(low[some], high[some], low[some])
    return ranges


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 12, 13, RANGE_BATCH])
def test_it_agrees_with_a_reference_in_float64_in_whatever_chunks(batch):
    x = np.random.default_rng(batch).standard_t(3, (13, 2, 5)).astype(np.float32)
    low, high = x.min(1), x.max(1)
    wanted = averaged(low, high, batch)
    for chunks in ([13], [1] * 13, [4, 4, 4, 1], [5, 8], [12, 1]):
        ranges = collected(low, high, batch, chunks)
        for found, expected in zip((ranges.low, ranges.high), wanted, strict=True):
            np.testing.assert_array_equal(found, expected.astype(np.float32))
        np.testing.assert_array_equal(ranges.least, low.min(0))
        np.testing.assert_array_equal(ranges.most, high.max(0))


def test_fewer_samples_than_a_batch_give_their_plain_extremes():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    ranges = collected(x, x + 1, RANGE_BATCH, [2, 3])
    np.testing.assert_array_equal(ranges.low, x.min(0))
    np.testing.assert_array_equal(ranges.high, (x + 1).max(0))


def test_a_batch_that_is_not_full_counts_by_its_samples():
    """Counted like a full one, the last sample would halve the range."""
    low = -np.array([[1.0], [8.0], [4.0], [2.0], [0.0]], np.float32)
    ranges = collected(low, -low, 4, [5])
    np.testing.assert_allclose(ranges.low, [-(4 * 8 + 1 * 0) / 5])
    np.testing.assert_allclose(ranges.high, [(4 * 8 + 1 * 0) / 5])


def test_what_a_guided_model_reads_of_a_picture_is_one_sample():
    """Three pictures, first all with their prompt and then all without."""
    peaks = np.array([1.0, 2.0, 3.0, 30.0, 20.0, 10.0], np.float32)
    statistics = InputStatistics(nn.Linear(1, 1), sides=2, range_batch=1)
    statistics.add((mx.array(np.stack([-peaks, peaks], axis=1)[..., None]),), 0.5)
    np.testing.assert_allclose(statistics.ranges.high, [[(30 + 20 + 10) / 3]])
    np.testing.assert_allclose(statistics.ranges.low, [[-(30 + 20 + 10) / 3]])


@pytest.mark.parametrize("cfg", [2.0, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_memory_of_the_machine_does_not_decide_what_is_a_batch(cfg, batch):
    """However many pictures go through the model at once, and with both sides of the guidance of each."""
    adapter = tiny_adapter()
    calibration = mq.calibrate(mq.Model(adapter), prompts=5, steps=2, cfg=cfg)
    extremes = {}  # of each picture by itself, both sides
    for picture in range(5):
        one = calibration.part(pictures=slice(picture, picture + 1))
        for sigma, x in zip(*seen(adapter, one, 1), strict=True):
            extremes.setdefault(sigma, []).append((x.min((0, 1)), x.max((0, 1))))
    wanted = [averaged(*map(np.stack, zip(*extremes[sigma], strict=True)), batch) for sigma in sorted(extremes)]
    for size in (1, 2, 3, 16):
        ranges = watched(adapter, calibration, size, batch)
        np.testing.assert_allclose(ranges.low, [low for low, _ in wanted], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ranges.high, [high for _, high in wanted], rtol=1e-4, atol=1e-5)


def passes(adapter, calibration, size, observe):
    sigmas, states = calibration.batches(adapter, size)
    for sigma, state in zip(sigmas, states, strict=True):
        with tapped(adapter.module, [LAYER], observe(sigma)), adapter.clock.at(sigma):
            for stage in adapter.stages:
                state = stage.run(state)
            mx.eval(state)


def seen(adapter, calibration, size):
    """Noise levels, and the layer's input [rows,tokens,in] at each."""
    sigmas, inputs = [], []

    def observe(sigma):
        sigmas.append(sigma)
        return lambda path, x: inputs.append(np.array(x).reshape(len(x), -1, x.shape[-1]))

    passes(adapter, calibration, size, observe)
    return sigmas, inputs


def watched(adapter, calibration, size, batch):
    collector = Collector(adapter.layers(), sides=calibration.sides, range_batch=batch)

    def observe(sigma):
        collector.sigma = sigma
        return collector

    passes(adapter, calibration, size, observe)
    return collector[LAYER].ranges


def test_levels_that_are_merged_keep_their_extremes_and_average_what_is_average():
    random = np.random.default_rng(0)
    low, high, least, most = random.normal(size=(4, 3, 5)).astype(np.float32)
    rows = random.normal(size=(3, 4, 5)).astype(np.float32)
    found = InputRanges(np.float32([0.1, 0.5, 0.9]), low, high, least, most, rows).merged()
    assert found.sigma.tolist() == [np.float32(0.9)]
    np.testing.assert_allclose([found.low[0], found.high[0]], [low.mean(0), high.mean(0)], rtol=1e-6)
    np.testing.assert_array_equal([found.least[0], found.most[0]], [least.min(0), most.max(0)])
    np.testing.assert_array_equal(found.rows, rows.reshape(1, 12, 5))
