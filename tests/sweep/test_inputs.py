"""How one input is quantized: the shift is judged by what errors cost, people read the same number whatever
they cost.
"""

import mlxquant  # noqa: F401  # before mlx

# isort: split
import numpy as np
import pytest

from mlxquant.methods import registry
from mlxquant.numerics.input_ranges import InputRanges
from mlxquant.recipes.recipe import ActivationSpec
from mlxquant.sweep.inputs import (
    LayerInput,
    Options,
    choose_table,
    decide_input,
    errors_by_tier,
    may_shift,
    mean_error,
    tiers_of,
)

SIGMA = np.float32([0.3, 0.8])
GELU = [(None, "gelu")]


def ranges_of(x):
    """Ranges of rows x [R,in] that are seen at both noise levels."""
    low, high = (np.stack([edge] * 2) for edge in (x.min(0), x.max(0)))
    return InputRanges(SIGMA, low, high, low, high, np.stack([x] * 2))


@pytest.fixture
def pair():
    """Two channels that two outputs copy. With 4 bits the second lies on the grid as it is; around ``shift`` the first
    does.
    """
    x = np.stack([np.full(16, 0.5), np.arange(16)], 1).astype(np.float32)
    return ranges_of(x), np.eye(2, dtype=np.float32), np.float32([[-20, 7.5]] * 2)


@pytest.mark.parametrize(("costs", "shifted"), [((1, 0), True), ((0, 1), False), ((0, 0), False)])
def test_the_shift_is_judged_by_what_errors_cost(pair, costs, shifted):
    ranges, weight, shift = pair
    decided = decide_input(LayerInput(ranges, weight, np.float64([costs] * 2)), shift, Options(tiers=(4,)))
    assert decided.facts["shifted"] == shifted
    assert decided.table.shift.shape == ((2, 2) if shifted else (2, 1))
    assert decided.facts["error"] == pytest.approx(0, abs=1e-9)
    if costs != (0, 0):
        assert max(decided.facts["error_plain"], decided.facts["error_shifted"]) > 0.1


def test_costs_change_the_error_and_not_what_people_read():
    ranges, weight = (
        ranges_of(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)),
        np.eye(8, dtype=np.float32)[:4],
    )
    once, ten = (
        decide_input(LayerInput(ranges, weight, np.full((2, 4), c)), None, Options(tiers=(6,))).facts
        for c in (1.0, 10.0)
    )
    assert ten["error"] == pytest.approx(10 * once["error"])
    assert ten["relative_error"] == once["relative_error"] > 0.005
    relative = decide_input(LayerInput(ranges, weight), None, Options(tiers=(6,))).facts
    assert relative["error"] == pytest.approx(relative["relative_error"] ** 2)


def test_only_the_tiers_on_offer_are_taken(pair):
    _, weight, shift = pair
    for tiers in ((4,), (4, 6), (4, 6, 8)):
        for budget, expected in ((1e-30, max(tiers)), (1e6, 4)):
            layer = LayerInput(
                ranges_of(np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)), weight, np.ones((2, 2))
            )
            decided = decide_input(layer, shift, Options(budget=budget, tiers=tiers))
            assert set(decided.table.bits.tolist()) == {expected}
            assert decided.facts["always_a8"] == (expected == 8)


def test_dividing_an_input_leaves_its_outputs_and_costs():
    rng = np.random.default_rng(1)
    layer = LayerInput(
        ranges_of(rng.normal(size=(40, 8)).astype(np.float32)),
        rng.normal(size=(4, 8)).astype(np.float32),
        rng.random((2, 4)),
    )
    divided = layer.divided(np.geomspace(0.1, 10, 8).astype(np.float32))
    np.testing.assert_allclose(
        divided.ranges.rows @ divided.weight.T, layer.ranges.rows @ layer.weight.T, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(divided.costs, layer.costs)
    table = decide_input(layer, None, Options(tiers=(8,))).table
    assert mean_error(layer, table, layer.weight) == pytest.approx(mean_error(layer, table), rel=1e-3)
    assert mean_error(layer, table, layer.weight * 1.1) > 2 * mean_error(layer, table)


def never():
    raise AssertionError("the rounded weight was asked for")


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("sigma", "step", "shift", "bits"))


def test_a_specification_of_bits_alone_is_the_range_method_on_the_rounded_weight(pair):
    ranges, weight, _ = pair
    spec, rounded = ActivationSpec(6, range="error"), 2 * weight
    expected = registry.get("range", "error").function(ranges, rounded, 6)
    assert same(choose_table(LayerInput(ranges, weight), spec, GELU, lambda: rounded), expected)


def test_a_budget_and_a_shift_are_decided_for_the_exact_weight(pair):
    ranges, weight, _ = pair
    seen, middle = LayerInput(ranges, weight), (ranges.least + ranges.most) / 2
    budget = choose_table(seen, ActivationSpec(8, budget=1e-3), GELU, never)
    assert same(budget, decide_input(seen, None, Options(budget=1e-3)).table)
    shifted = choose_table(seen, ActivationSpec(4, shift=True), GELU, never)
    assert same(shifted, decide_input(seen, middle, Options(tiers=(4,))).table)
    plain = choose_table(seen, ActivationSpec(4, shift=True), (), never)
    assert same(plain, decide_input(seen, None, Options(tiers=(4,))).table)


@pytest.mark.parametrize(("after", "shifted"), [("gelu", True), ("", False), ("silu", False), ("relu", False)])
def test_only_what_a_gelu_wrote_is_offered_a_shift(after, shifted):
    """Channels far apart, so that a shift pays wherever it is offered."""
    x = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32) + np.float32([-100, 100])
    seen = LayerInput(ranges_of(x), np.eye(2, dtype=np.float32))
    table = choose_table(seen, ActivationSpec(4, shift=True), [(None, after)], never)
    assert may_shift(after) == shifted == (table.shift.shape == (2, 2))


@pytest.mark.parametrize(
    ("thresholds", "bits"),
    [((6, 10), {4.9: 4, 5.1: 6, 7.9: 6, 8.1: 8}), ((12, 20), {9.9: 4, 10.1: 6, 15.9: 6, 16.1: 8})],
)
def test_a_shifted_input_gets_more_bits_at_five_and_eight(thresholds, bits):
    """By default, and in proportion to other thresholds: what counts is how far it goes from its centre."""
    options, centre = Options("threshold", thresholds=thresholds), np.float32([[-100, 100]] * 2)
    for half, expected in bits.items():
        x = np.linspace(-half, half, 50, dtype=np.float32)[:, None] + centre[0]
        decided = decide_input(LayerInput(ranges_of(x), np.eye(2, dtype=np.float32)), centre, options)
        assert decided.facts["shifted"]
        np.testing.assert_array_equal(decided.table.bits, expected)


def test_one_entry_for_all_noise_levels_sees_them_merged(pair):
    ranges, weight, _ = pair
    costs = np.float64([[1, 2], [3, 6]])
    each = LayerInput.of(ActivationSpec(8), ranges, weight, costs)
    merged = LayerInput.of(ActivationSpec(8, per_timestep=False), ranges, weight, costs)
    assert (len(each.ranges.sigma), len(merged.ranges.sigma)) == (2, 1)
    np.testing.assert_array_equal(merged.costs, [[2, 4]])
    assert LayerInput.of(None, ranges, weight, None).costs is None


def test_errors_fall_from_tier_to_tier_and_a_shift_never_raises_them(pair):
    ranges, weight, _ = pair
    seen = LayerInput(ranges, weight, np.ones((2, 2)))
    plain, offered = (errors_by_tier(seen, ActivationSpec(8, shift=shift), GELU) for shift in (False, True))
    assert plain.shape == (len(tiers_of(ActivationSpec(8))), 2)
    assert (np.diff(plain, axis=0) <= 0).all()
    assert (offered.mean(1) <= plain.mean(1)).all()
    assert tiers_of(ActivationSpec(6)) == (4, 6)
