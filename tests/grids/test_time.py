"""Noise levels, the clock and the activation tables that read it."""

import numpy as np
import pytest

from mlxquant.errors import AdapterError, RecipeError
from mlxquant.grids.tables import ActivationTable
from mlxquant.grids.time import Clock, log_snr
from mlxquant.sampling.schedules import flow_sigmas


def test_log_snr_is_odd_around_one_half_and_clamped():
    sigma = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(log_snr(sigma), -log_snr(1 - sigma), atol=1e-12)
    np.testing.assert_array_equal(log_snr([0.0, 1.0]), [10, -10])
    np.testing.assert_allclose(log_snr(0.2), np.log(0.8**2 / 0.2**2))  # powers of signal and noise


def test_sigmas_fall_from_one_to_zero():
    for steps in (1, 2, 28, 50):
        sigmas = flow_sigmas(steps, 3.0)
        assert len(sigmas) == steps + 1
        assert sigmas[0] == 1
        assert sigmas[-1] == 0
        assert (np.diff(sigmas) < 0).all()


def test_sigmas_are_those_of_diffusionkit():
    """Its grid, computed as its sampler does: evenly spaced t from 1000 to the shifted smallest t, then shifted."""

    def shifted(t):
        return 3.0 * (t / 1000) / (1 + 2.0 * (t / 1000))

    expected = [shifted(t) for t in np.linspace(1000, 1000 * shifted(1), 10)] + [0.0]
    np.testing.assert_allclose(flow_sigmas(10, 3.0), expected, rtol=1e-12)


def test_no_steps_are_refused():
    with pytest.raises(AdapterError, match="at least 1"):
        flow_sigmas(0)


def test_clock_nests_and_recovers_from_exceptions():
    clock = Clock()
    with clock.at(0.5):
        with pytest.raises(ZeroDivisionError), clock.at([0.1, 0.2]):
            assert clock.sigma.tolist() == pytest.approx([0.1, 0.2])
            _ = 1 / 0
        assert clock.sigma.tolist() == [0.5]
    with pytest.raises(AdapterError, match="no timestep was set"):
        _ = clock.sigma


def make(sigma=(0.0, 0.5, 1.0), step=(1.0, 2.0, 4.0), bits=(8, 8, 8)):
    shift = np.arange(len(sigma), dtype=np.float32)[:, None]
    return ActivationTable(np.float32(sigma), np.float32(step), shift, np.uint8(bits))


def test_calibrated_levels_are_exact_also_in_float32():
    sigma = flow_sigmas(28, 3.0)[:-1][::-1].astype(np.float32)
    table = make(sigma, np.arange(1, 29), [8] * 28)
    step, shift, *_ = table.at((sigma.astype(np.float64) * 1000).astype(np.float32) / np.float32(1000))
    np.testing.assert_array_equal(step, table.step)
    np.testing.assert_array_equal(shift, table.shift)


def span(step, shift, bits):
    edge = 2.0 ** (np.asarray(bits, float) - 1)
    return shift - (edge * step)[:, None], shift + ((edge - 1) * step)[:, None]


@pytest.mark.parametrize("bits", [(8, 8, 8), (8, 4, 4), (4, 8, 6)])
@pytest.mark.parametrize("width", [1, 5])
def test_between_levels_the_range_is_the_envelope_of_the_neighbours(bits, width):
    shift = np.random.default_rng(0).normal(0, 50, (3, width)).astype(np.float32)
    table = ActivationTable(np.float32([0, 0.5, 1]), np.float32([1, 2, 4]), shift, np.uint8(bits))
    for sigma, neighbours in ((0.25, (0, 1)), (0.8, (1, 2))):
        step, moved, wide, _ = table.at(np.float32([sigma]))
        assert wide[0] == max(bits[i] for i in neighbours)
        low, high = span(step, moved, wide)
        for i in neighbours:
            own_low, own_high = span(table.step[[i]], table.shift[[i]], table.bits[[i]])
            assert (low <= own_low + 1e-3).all()
            assert (high >= own_high - 1e-3).all()
        if width == 1:  # and no wider than it must be
            both = [span(table.step[[i]], table.shift[[i]], table.bits[[i]]) for i in neighbours]
            np.testing.assert_allclose(
                [low.min(), high.max()], [min(b[0].min() for b in both), max(b[1].max() for b in both)], rtol=1e-5
            )


def test_outside_the_levels_the_nearest_entry_holds():
    step, shift, *_ = make().at(np.float32([2.0, -1.0]))
    np.testing.assert_array_equal(step, [4, 1])
    np.testing.assert_array_equal(shift[:, 0], [2, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": (0.5, 0.5, 1)}, "must ascend"),
        ({"step": (1, 0, 1)}, "positive"),
        ({"step": (1, np.nan, 1)}, "finite"),
        ({"bits": (8, 5, 8)}, r"found \[5\]"),
        ({"step": (1, 2)}, "lengths differ"),
    ],
)
def test_bad_tables_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        make(**change)
