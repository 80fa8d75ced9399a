"""Networks over time in closed form: where they start, and what they are fitted to."""

import numpy as np
import pytest

from mlxquant.grids.tables import ActivationTable
from mlxquant.methods.inputs.time_ridge import fitted, initial, inverse_softplus

SIGMA = np.linspace(0.02, 1, 28).astype(np.float32)
times = pytest.mark.parametrize("time", ["timestep", "log-snr"])


def table(step, shift, bits=8):
    return ActivationTable(
        SIGMA, np.asarray(step, np.float32), np.asarray(shift, np.float32)[:, None], np.full(28, bits, np.uint8)
    )


def smooth():
    return table(0.02 + 0.05 * SIGMA**2, 1 - 3 * SIGMA)


@times
def test_the_step_starts_at_delta_0_at_all_times(time):
    step, shift = initial(time, smooth()).entries(np.linspace(0, 1, 50))
    np.testing.assert_allclose(step, np.exp(np.log(smooth().step).mean()), rtol=1e-6)
    np.testing.assert_allclose(shift, smooth().shift.mean(), rtol=1e-5)


@times
def test_steps_are_positive_at_all_times_however_wild_the_target(time):
    rng = np.random.default_rng(0)
    network = fitted(time, table(np.exp(rng.normal(size=28) * 4), rng.normal(size=28) * 100))
    assert (network.entries(np.linspace(0, 1, 1001))[0] > 0).all()


@times
def test_a_smooth_target_is_met_also_between_the_levels(time):
    wanted = smooth()
    every_second = ActivationTable(*(getattr(wanted, name)[::2] for name in ("sigma", "step", "shift", "bits")))
    step, shift = fitted(time, every_second).entries(SIGMA)
    np.testing.assert_allclose(step[::2], wanted.step[::2], rtol=0.02)
    np.testing.assert_allclose(step[1:-1:2], wanted.step[1:-1:2], rtol=0.05)
    np.testing.assert_allclose(shift[1:-1], wanted.shift[1:-1], atol=0.1)


@times
def test_the_last_layer_is_ridge_regression(time):
    """No other last layer has a smaller penalised squared error: its gradient, taken by differences, is zero."""
    wanted, network = smooth(), fitted(time, smooth())
    (weight, bias), (last, _) = network.layers
    units = hidden(time, weight, bias)
    decay = 0.001 * np.square(units).mean() * len(units)
    target = np.stack(
        [
            np.log(np.expm1(wanted.step.astype(np.float64) / network.step)) - np.log(np.e - 1),
            (wanted.shift[:, 0] - network.shift) / network.step,
        ],
        1,
    )

    def cost(values):
        return np.square(units @ values - target).sum() + decay * np.square(values).sum()

    rng, best = np.random.default_rng(0), cost(last.astype(np.float64))
    for _ in range(20):
        assert cost(last + 1e-2 * rng.normal(size=last.shape)) > best


def hidden(time, weight, bias):
    """Units [T, hidden] of the first layer, from the times on."""
    sigma = SIGMA.astype(np.float64)
    with np.errstate(divide="ignore"):
        u = 2 * sigma - 1 if time == "timestep" else np.clip(2 * np.log((1 - sigma) / sigma), -10, 10) / 10
    angle = np.outer(u, np.pi / 2 * 2.0 ** np.arange(6))
    return np.maximum(np.hstack([np.sin(angle), np.cos(angle)]) @ weight.astype(np.float64) + bias, 0)


def test_softplus_is_inverted():
    values = np.geomspace(1e-9, 1e3, 50)
    np.testing.assert_allclose(np.logaddexp(0, inverse_softplus(values)), values, rtol=1e-6)
    np.testing.assert_allclose(
        inverse_softplus(np.array([2.0])), np.log(np.exp(2) - 1)
    )  # the paper's last bias for a step of 2
