"""Networks over time: the paper's formula in plain Python, files, and tables that follow them between noise levels."""

import math

import numpy as np
import pytest

from mlxquant.errors import RecipeError
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time_network import FEATURES, NetworkShape, TimeNetwork, fourier_features, signal_to_noise, timestep

SIGMA = np.linspace(0.02, 1, 28).astype(np.float32)
times = pytest.mark.parametrize("time", ["timestep", "log-snr"])


def drawn(time="timestep", widths=(8, 5, 2), seed=0, step=0.03, shift=-1.25):
    rng = np.random.default_rng(seed)
    layers, inputs = [], FEATURES
    for outputs in widths:
        layers.append((rng.normal(size=(inputs, outputs)) / 4, rng.normal(size=outputs)))
        inputs = outputs
    layers = tuple((weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers)
    return TimeNetwork(time, layers, float(np.float32(step)), float(np.float32(shift)))


def by_hand(network, sigma):
    """Step and shift at one noise level, in Python's floats."""
    lam = -10.0 if sigma == 1 else 10.0 if sigma == 0 else max(-10.0, min(10.0, 2 * math.log((1 - sigma) / sigma)))
    u = 2 * sigma - 1 if network.time == "timestep" else lam / 10
    values = [math.sin(math.pi / 2 * 2**k * u) for k in range(6)] + [math.cos(math.pi / 2 * 2**k * u) for k in range(6)]
    for index, (weight, bias) in enumerate(network.layers):
        values = [max(0.0, v) for v in values] if index else values
        columns = zip(*weight.tolist(), strict=True)
        values = [
            sum(map(math.prod, zip(values, column, strict=True))) + b
            for column, b in zip(columns, bias.tolist(), strict=True)
        ]
    return network.step * math.log(1 + (math.e - 1) * math.exp(values[0])), network.shift + network.step * values[1]


@times
def test_entries_are_the_papers_formula(time):
    network = drawn(time)
    step, shift = network.entries(SIGMA)
    wanted = [by_hand(network, sigma) for sigma in SIGMA.tolist()]
    np.testing.assert_allclose(step, [s for s, _ in wanted], rtol=1e-6)
    np.testing.assert_allclose(shift[:, 0], [s for _, s in wanted], rtol=1e-5)
    assert step.dtype == shift.dtype == np.float32


def test_features_are_no_noise_between_neighbouring_float32s():
    """Ten octaves at most make sense: more of them turn the last digit of a noise level into another step."""
    time = np.linspace(-1, 1, 999)
    moved = np.abs(fourier_features(time + 1e-6) - fourier_features(time)).max()
    assert moved < 1e-6 * math.pi / 2 * 2**9 * 1.01


@times
def test_steps_are_positive_at_all_times_however_large_the_weights(time):
    wild = drawn(time)
    wild = TimeNetwork(time, tuple((1000 * weight, bias) for weight, bias in wild.layers), wild.step, wild.shift)
    assert (wild.entries(np.linspace(0, 1, 1001))[0] > 0).all()


def test_log_snr_is_odd_and_clamped():
    sigma = np.linspace(0, 1, 101)
    np.testing.assert_allclose(signal_to_noise(sigma), -signal_to_noise(1 - sigma), atol=1e-12)
    np.testing.assert_array_equal(signal_to_noise(np.array([0.0, 0.5, 1.0])), [1, 0, -1])
    np.testing.assert_allclose(signal_to_noise(np.array([0.2])), 2 * np.log(4) / 10)
    np.testing.assert_array_equal(timestep(np.array([0.0, 0.5, 1.0])), [-1, 0, 1])


@times
@pytest.mark.parametrize("widths", [(64, 2), (8, 5, 2), (2,)])
def test_a_network_comes_back_from_its_numbers_bit_for_bit(time, widths):
    network = drawn(time, widths)
    again = TimeNetwork.of(NetworkShape.of(network.shape.facts), network.numbers)
    assert network.shape.facts == again.shape.facts == {"time": time, "widths": [FEATURES, *widths]}
    np.testing.assert_array_equal(network.numbers, again.numbers)
    for found, wanted in zip(again.entries(SIGMA), network.entries(SIGMA), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"time": "timestep"},
        {"time": "noon", "widths": [12, 8, 5, 2]},
        {"time": "timestep", "widths": [12, 8, 2]},
        {"time": "timestep", "widths": [12, -8, 5, 2]},
        {"time": "timestep", "widths": [12, 2**40, 2]},
        {"time": "timestep", "widths": [12, True, 2]},
        {"time": "timestep", "widths": "12"},
        {"time": "timestep", "widths": [8, 12, 5, 2]},
        {"time": ["timestep"], "widths": [12, 8, 5, 2]},
        [],
    ],
)
def test_facts_that_do_not_fit_are_one_error(facts):
    with pytest.raises(RecipeError, match="network over time"):
        TimeNetwork.of(NetworkShape.of(facts), drawn().numbers)


def table(network, sigma=SIGMA, bits=8):
    return ActivationTable.of_network(network, sigma, bits)


@times
def test_a_table_is_the_network_for_any_number_of_steps(time):
    network = drawn(time)
    found = table(network)
    for steps in (10, 28, 50):
        sigma = np.linspace(0.02, 1, steps).astype(np.float32)
        step, shift, bits, log = found.at(sigma)
        np.testing.assert_allclose(step, network.entries(sigma)[0], rtol=1e-5)
        np.testing.assert_allclose(shift, network.entries(sigma)[1], rtol=1e-4, atol=1e-6)
        assert set(bits) == {8}
        assert not log.any()


def test_a_table_keeps_its_entries_at_its_levels_and_the_nearest_outside():
    network = drawn()
    found = table(network, SIGMA[5:20])
    np.testing.assert_array_equal(found.at(SIGMA[5:20]).step, network.entries(SIGMA[5:20])[0])
    assert found.at(np.array([0.0])).step == found.step[0]
    assert found.at(np.array([1.0])).step == found.step[-1]


def test_a_table_without_its_network_takes_the_envelope():
    network = drawn()
    found = table(network)
    plain = ActivationTable(found.sigma, found.step, found.shift, found.bits)
    middle = (SIGMA[1:] + SIGMA[:-1]) / 2
    assert (plain.at(middle).step >= found.at(middle).step * (1 - 1e-3)).mean() > 0.5
    assert np.abs(plain.at(middle).step / found.at(middle).step - 1).max() > 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"bits": np.array([8] * 27 + [4], np.uint8)},
        {"shift": np.zeros((28, 3), np.float32)},
        {"log": np.ones(28, bool)},
    ],
)
def test_a_network_stands_only_beside_entries_that_it_can_have_made(change):
    found = table(drawn())
    columns = {name: getattr(found, name) for name in ("sigma", "step", "shift", "bits", "network")}
    with pytest.raises(RecipeError, match="network over time"):
        ActivationTable(**{**columns, **change})
