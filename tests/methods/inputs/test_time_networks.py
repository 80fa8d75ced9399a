"""Trained networks over time: what they minimise, against float64, and what training is worth."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.grids.tables import ActivationTable
from mlxquant.methods.inputs.clipping import error, extremes
from mlxquant.methods.inputs.time_networks import OUTPUTS_SEEN, LayerError, tdq, trained
from mlxquant.methods.inputs.time_ridge import fitted, initial
from mlxquant.numerics.input_ranges import InputRanges

SIGMA = np.linspace(0.05, 1, 7).astype(np.float32)
WEIGHT = np.random.default_rng(9).normal(size=(6, 10))


def ranges(seed=0, rows=24, width=10):
    """Heavy tails, whose size and middle change with the noise level, and extremes beyond the rows."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (len(SIGMA), rows, width)) * (0.5 + SIGMA)[:, None, None] + SIGMA[:, None, None]
    x = x.astype(np.float32)
    low, high = x.min(1), x.max(1)
    return InputRanges(SIGMA, low, high, low - 0.5, high + 0.5, x)


def output_error(table, seen, weight, bits):
    """By levels, in float64: the mean over rows of ``‖(Q(x) - x) Wᵀ‖²``, and each channel's extremes, one row each."""
    edge, found = 2 ** (bits - 1), []
    for t in range(len(SIGMA)):
        step, shift = float(table.step[t]), float(table.shift[t, 0])

        def wrong(x, step=step, shift=shift):
            x = x.astype(np.float64)
            return np.clip(np.rint((x - shift) / step), -edge, edge - 1) * step + shift - x

        rows = seen.rows[t]
        rare = sum((np.square(wrong(end)) * np.square(weight).sum(0)).sum() for end in (seen.least[t], seen.most[t]))
        found.append((np.square(wrong(rows) @ weight.T).sum() + rare) / len(rows))
    return np.array(found)


def loss_of(table, seen, weight, bits, rng=None):
    measure = LayerError(seen, weight, bits, 0.25, rng or np.random.default_rng(0))
    step, shift = mx.array(table.step / 0.25), mx.array(table.shift[:, 0] / 0.25)
    return np.array(measure(step, shift, measure.rows))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_loss_is_the_layers_output_error_in_units_of_the_extremes(bits):
    seen = ranges()
    wanted = output_error(error(seen, WEIGHT, bits), seen, WEIGHT, bits)
    wanted /= output_error(extremes(seen, WEIGHT, bits), seen, WEIGHT, bits)
    np.testing.assert_allclose(loss_of(error(seen, WEIGHT, bits), seen, WEIGHT, bits), wanted, rtol=0.01)


def test_many_outputs_are_looked_at_as_random_sums_of_them():
    weight, seen = np.random.default_rng(1).normal(size=(50 * OUTPUTS_SEEN, 10)), ranges()
    wanted = output_error(error(seen, weight, 4), seen, weight, 4)
    wanted /= output_error(extremes(seen, weight, 4), seen, weight, 4)
    found = [loss_of(error(seen, weight, 4), seen, weight, 4, np.random.default_rng(seed)) for seed in range(8)]
    np.testing.assert_allclose(np.mean(found, 0), wanted, rtol=0.1)


@pytest.mark.parametrize("time", ["timestep", "log-snr"])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_never_ends_above_its_start(time, bits):
    seen = ranges(rows=64)
    start = fitted(time, error(seen, WEIGHT, bits))
    end = trained(start, seen, WEIGHT, bits, iterations=100)
    before, after = (
        loss_of(ActivationTable.of_network(n, SIGMA, bits), seen, WEIGHT, bits).mean() for n in (start, end)
    )
    assert after <= before * (1 + 1e-6)


def test_from_one_step_for_all_times_it_learns_to_follow_time():
    seen = ranges()
    start = initial("timestep", extremes(seen, WEIGHT, 4))
    end = trained(start, seen, WEIGHT, 4)
    scale = output_error(extremes(seen, WEIGHT, 4), seen, WEIGHT, 4)
    before, after = (
        (output_error(ActivationTable.of_network(n, SIGMA, 4), seen, WEIGHT, 4) / scale).mean() for n in (start, end)
    )
    assert after < 0.8 * before
    assert end.entries(SIGMA)[0].std() > 0.05 * end.entries(SIGMA)[0].mean()


def test_what_cannot_be_bettered_is_kept():
    seen = ranges()
    start = fitted("timestep", error(seen, WEIGHT, 8))
    assert trained(start, seen, WEIGHT, 8, iterations=0) is start
    flat = InputRanges(SIGMA, *(np.full_like(getattr(seen, n), 3) for n in ("low", "high", "least", "most", "rows")))
    start = fitted("timestep", error(flat, WEIGHT, 8))
    assert trained(start, flat, WEIGHT, 8, iterations=50) is start


def test_the_seed_decides_all_of_it():
    seen = ranges(rows=3000)  # more than a minibatch takes
    start = fitted("timestep", error(seen, WEIGHT, 4))
    first, again, other = (trained(start, seen, WEIGHT, 4, iterations=50, seed=seed).numbers for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_random_numbers_of_others_are_left_alone():
    seen = ranges()
    mx.random.seed(3)
    expected = np.array(mx.random.uniform(shape=(4,)))
    mx.random.seed(3)
    trained(fitted("timestep", error(seen, WEIGHT, 4)), seen, WEIGHT, 4, iterations=2)
    np.testing.assert_array_equal(np.array(mx.random.uniform(shape=(4,))), expected)


def test_the_table_has_its_network_and_follows_it_between_the_levels():
    found = tdq(ranges(), WEIGHT, 6)
    sigma = np.linspace(0.05, 1, 10).astype(np.float32)
    np.testing.assert_allclose(found.at(sigma).step, found.network.entries(sigma)[0], rtol=1e-5)
    np.testing.assert_array_equal(found.step, found.network.entries(SIGMA)[0])
