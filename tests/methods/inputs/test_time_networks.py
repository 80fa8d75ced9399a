"""Steps as a function of time, against the paper's formulas in plain Python."""

import math

import numpy as np
import pytest

from mlxquant.grids.tables import ActivationTable
from mlxquant.methods.inputs.time_networks import (
    HIDDEN,
    OCTAVES,
    TimeNetwork,
    drawn_layer,
    inverse_softplus,
    signal_to_noise,
    timestep,
)

TIMES = [timestep, signal_to_noise]
SIGMA = np.linspace(0.02, 1, 28).astype(np.float32)


def table(step, shift, bits=8):
    return ActivationTable(
        SIGMA, np.asarray(step, np.float32), np.asarray(shift, np.float32)[:, None], np.full(28, bits, np.uint8)
    )


def smooth():
    return table(0.02 + 0.05 * SIGMA**2, 1 - 3 * SIGMA)


@pytest.mark.parametrize("time", TIMES)
def test_the_table_is_the_network(time):
    """One noise level after the other, in Python floats."""
    network = TimeNetwork.fitted(time, smooth())
    weight, bias = drawn_layer(OCTAVES, HIDDEN)
    found = network.table(SIGMA)
    for i, sigma in enumerate(SIGMA.astype(np.float64).tolist()):
        lam = 10.0 if sigma == 0 else -10.0 if sigma == 1 else max(-10.0, min(10.0, 2 * math.log((1 - sigma) / sigma)))
        u = 2 * sigma - 1 if time is timestep else lam / 10
        features = [math.sin(math.pi / 2 * 2**k * u) for k in range(OCTAVES)] + [
            math.cos(math.pi / 2 * 2**k * u) for k in range(OCTAVES)
        ]
        units = [max(0.0, bias[j] + sum(f * weight[k, j] for k, f in enumerate(features))) for j in range(HIDDEN)]
        outputs = [sum(h * network.last[j, o] for j, h in enumerate(units)) for o in range(2)]
        step = network.step * math.log(1 + math.exp(math.log(math.e - 1) + outputs[0]))
        np.testing.assert_allclose(found.step[i], step, rtol=1e-5)
        np.testing.assert_allclose(found.shift[i, 0], network.shift + network.step * outputs[1], atol=1e-5)


@pytest.mark.parametrize("time", TIMES)
def test_the_step_starts_at_delta_0_at_all_times(time):
    start = TimeNetwork.initial(time, smooth())
    delta = float(np.exp(np.log(smooth().step).mean()))
    np.testing.assert_allclose(start.table(np.linspace(0, 1, 50)).step, delta, rtol=1e-6)
    np.testing.assert_allclose(start.table(np.linspace(0, 1, 50)).shift, smooth().shift.mean(), rtol=1e-5)


@pytest.mark.parametrize("time", TIMES)
def test_steps_are_positive_at_all_times_however_wild_the_target(time):
    rng = np.random.default_rng(0)
    network = TimeNetwork.fitted(time, table(np.exp(rng.normal(size=28) * 4), rng.normal(size=28) * 100))
    assert (network.table(np.linspace(0, 1, 1001)).step > 0).all()


@pytest.mark.parametrize("time", TIMES)
def test_schedules_that_hit_the_same_noise_level_get_the_same_step(time):
    network = TimeNetwork.fitted(time, smooth())
    fine = network.table(np.linspace(0, 1, 101))
    coarse = network.table(np.linspace(0, 1, 21))
    np.testing.assert_allclose(fine.step[::5], coarse.step, rtol=1e-6)
    np.testing.assert_allclose(fine.shift[::5], coarse.shift, rtol=1e-6)


@pytest.mark.parametrize("time", TIMES)
def test_a_smooth_target_is_met_also_between_the_levels(time):
    wanted = smooth()
    every_second = ActivationTable(*(getattr(wanted, name)[::2] for name in ("sigma", "step", "shift", "bits")))
    found = TimeNetwork.fitted(time, every_second).table(SIGMA)
    np.testing.assert_allclose(found.step[::2], wanted.step[::2], rtol=0.02)
    np.testing.assert_allclose(found.step[1:-1:2], wanted.step[1:-1:2], rtol=0.05)
    assert set(found.bits) == {8}


def test_log_snr_is_odd_and_clamped():
    sigma = np.linspace(0, 1, 101)
    np.testing.assert_allclose(signal_to_noise(sigma), -signal_to_noise(1 - sigma), atol=1e-12)
    np.testing.assert_array_equal(signal_to_noise(np.array([0.0, 0.5, 1.0])), [1, 0, -1])
    np.testing.assert_allclose(signal_to_noise(np.array([0.2])), 2 * np.log(4) / 10)


def test_softplus_is_inverted():
    values = np.geomspace(1e-9, 1e3, 50)
    np.testing.assert_allclose(np.logaddexp(0, inverse_softplus(values)), values, rtol=1e-6)
    np.testing.assert_allclose(
        inverse_softplus(np.array([2.0])), np.log(np.exp(2) - 1)
    )  # the paper's last bias for a step of 2
