"""Logarithmic entries beside uniform ones: their levels, what lies between two noise levels, and gradients."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import RecipeError
from mlxquant.grids.reading import Entry, represented
from mlxquant.grids.tables import ActivationTable, nearest_levels
from mlxquant.methods.inputs.tiers import quantized


def make(log, bits=4, step=2.0, shift=-0.17, sigma=(0.1, 0.5, 1.0)):
    count = len(sigma)
    spread = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), count).copy()  # noqa: E731
    shift = np.broadcast_to(np.asarray(shift, np.float32).reshape(-1, 1), (count, 1)).copy()
    return ActivationTable(
        np.float32(sigma), spread(step, np.float32), shift, spread(bits, np.uint8), spread(log, bool)
    )


def levels_of(bits):
    """The levels by definition: 1, and below it floating-point numbers with bits - 4 mantissa bits."""
    parts = 2 ** (bits - 4)
    numbers = [2.0**-octave * (1 + part / parts) for octave in range(18) for part in reversed(range(parts))]
    return np.array([number for number in numbers if number <= 1][: 2**bits])


def drawn(count=20000, seed=0):
    return np.random.default_rng(seed).lognormal(-3, 3, count).astype(np.float32)


def test_at_4_bits_the_levels_are_the_papers():
    x = drawn()
    expected = 2.0 ** -np.clip(np.rint(-np.log2(x.astype(np.float64))), 0, 15)
    np.testing.assert_array_equal(nearest_levels(x, 4), expected)


@pytest.mark.parametrize("bits", [6, 8])
def test_with_more_bits_the_nearest_of_finer_levels_is_taken(bits):
    x, levels = drawn(), levels_of(bits)
    assert len(levels) == 2**bits
    assert 15 < -np.log2(levels[-1]) <= 16
    expected = np.abs(x[:, None].astype(np.float64) - levels).min(1)
    np.testing.assert_array_equal(np.abs(nearest_levels(x, bits) - x.astype(np.float64)), expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_rounding_is_idempotent_monotone_and_keeps_to_its_levels(bits):
    x = np.sort(drawn())
    once = nearest_levels(x, bits)
    np.testing.assert_array_equal(nearest_levels(once, bits), once)
    assert (np.diff(once) >= 0).all()
    assert set(once.tolist()) <= set(levels_of(bits).tolist())
    np.testing.assert_array_equal(
        nearest_levels(np.float32([-1, 0, 1, 9]), bits), np.float32([levels_of(bits)[-1]] * 2 + [1, 1])
    )


def test_a_batch_may_mix_uniform_logarithmic_and_unquantized_samples():
    """As the numpy function that methods measure with has it, sample by sample."""
    table = make(log=(True, False, True), bits=(4, 8, 16), step=(2.0, 0.02, 1.0))
    x = np.random.default_rng(1).normal(0, 1, (3, 5, 7)).astype(np.float32)
    y = np.array(represented(mx.array(x), Entry.of(table, table.sigma).shaped(3)))
    for t in (0, 1):
        np.testing.assert_allclose(y[t], quantized(table, t, x[t]), rtol=1e-6, atol=1e-7)
        assert len(np.unique(y[t])) > 5
    np.testing.assert_array_equal(y[2], x[2])


@pytest.mark.parametrize("log", [True, False])
def test_gradients_pass_straight_through_except_where_x_is_clipped(log):
    table = make(log, step=2.0 if log else 0.125, shift=-0.17 if log else 0.83)
    entry = Entry.of(table, table.sigma[:1])
    x = mx.array([[-1.0], [-0.1], [0.5], [1.5], [9.0]])
    np.testing.assert_array_equal(np.array(mx.grad(lambda v: represented(v, entry).sum())(x))[:, 0], [0, 1, 1, 1, 0])


def test_nan_stays_nan():
    entry = Entry.of(make(True), np.float32([0.5]))
    assert np.isnan(np.array(represented(mx.array([[np.nan, 1.0]]), entry))[0]).tolist() == [True, False]
    assert np.isnan(nearest_levels(np.float32([np.nan, 1.0]), 4)).tolist() == [True, False]


@pytest.mark.parametrize("log", [(True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize("bits", [(4, 8, 6), (8, 8, 8)])
@pytest.mark.parametrize("width", [1, 5])
def test_between_levels_nothing_is_clipped_that_either_neighbour_keeps(log, bits, width):
    shift = np.random.default_rng(0).normal(0, 50, (3, width)).astype(np.float32)
    table = ActivationTable(np.float32([0, 0.5, 1]), np.float32([1, 2, 4]), shift, np.uint8(bits), np.array(log))
    for sigma, neighbours in ((0.2, (0, 1)), (0.3, (1, 0)), (0.8, (2, 1))):
        step, moved, wide, is_log = table.at(np.float32([sigma]))
        assert wide[0] == max(bits[i] for i in neighbours)
        assert is_log[0] == log[neighbours[0]]  # the nearer one's
        between = ActivationTable(np.float32([sigma]), step, moved, wide, is_log)
        for i in neighbours:
            for end in (-1e9, 1e9):
                kept, reach = (
                    quantized(t, entry, np.full(width, end, np.float32)) for t, entry in ((table, i), (between, 0))
                )
                assert (np.sign(end) * (reach - kept) >= -1e-4 * between.span).all()  # a shift is no level, but nearly


def test_calibrated_levels_and_what_is_outside_of_them_are_exact():
    table = make(log=(True, False, True), step=(1, 2, 3))
    step, shift, bits, log = table.at(np.float32([0.05, 0.5, 2.0]))
    np.testing.assert_array_equal(step, [1, 2, 3])
    np.testing.assert_array_equal(log, [True, False, True])
    np.testing.assert_array_equal(shift, table.shift)
    np.testing.assert_array_equal(bits, table.bits)


def test_spans_reach_from_the_smallest_to_the_largest_level():
    table = make(log=(True, False, True), bits=(4, 4, 8), step=(1, 2, 3))
    np.testing.assert_array_equal(table.span, [1, 30, 3])


def test_a_table_without_the_field_is_uniform_and_one_of_another_length_is_refused():
    table = make(False)
    assert not ActivationTable(table.sigma, table.step, table.shift, table.bits).log.any()
    with pytest.raises(RecipeError, match="lengths differ"):
        ActivationTable(table.sigma, table.step, table.shift, table.bits, np.array([True]))


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("log", [False, True])
def test_a_calibrated_level_has_its_own_entry_bit_for_bit(width, log):
    """Computed again from its ends it would differ in the last digit."""
    random = np.random.default_rng(0)
    sigma = np.sort(random.uniform(0, 1, 300)).astype(np.float32)
    step = random.uniform(0.01, 3, 300).astype(np.float32)
    shift = random.normal(size=(300, width)).astype(np.float32)
    table = ActivationTable(sigma, step, shift, np.full(300, 8, np.uint8), np.array(log))
    order = random.permutation(300)
    found = table.at(sigma[order])
    np.testing.assert_array_equal(found.step, step[order])
    np.testing.assert_array_equal(found.shift, shift[order])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": np.float32([0.1, 0.0])}, "every step must be positive and finite"),
        ({"step": np.float32([0.1, np.inf])}, "every step must be positive and finite"),
        ({"sigma": np.float32([0.5, 0.5])}, "sigma must ascend"),
        ({"sigma": np.float32([0.5, 0.4])}, "sigma must ascend"),
        ({"step": np.float32([0.1])}, "lengths differ"),
        ({"bits": np.uint8([8, 7])}, r"bits must be of .*, found \[7\]"),
    ],
)
def test_what_is_no_table_is_refused(change, message):
    entries = {
        "sigma": np.float32([0.4, 0.5]),
        "step": np.float32([0.1, 0.2]),
        "shift": np.zeros((2, 1), np.float32),
        "bits": np.uint8([8, 4]),
    }
    ActivationTable(**entries)
    with pytest.raises(RecipeError, match=message):
        ActivationTable(**(entries | change))
