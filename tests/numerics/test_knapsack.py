"""The knapsack against brute force, and budgets against the bits that they lead to."""

from itertools import product

import numpy as np
import pytest

from mlxquant.numerics.knapsack import fewest_bits, least_cost, shared_budget


def problem(seed, items=5):
    """Costs that mostly fall with the size, as errors do with bits; sizes ascend in no regular steps."""
    rng = np.random.default_rng(seed)
    options = rng.integers(1, 5, items)
    costs = [
        rng.permutation(n) * 0.01 + 10 * rng.random() * 4.0 ** -np.arange(n) * rng.uniform(0.5, 1.5, n) for n in options
    ]
    sizes = [np.cumsum(rng.integers(1, 40, n)) for n in options]
    return costs, sizes


def total(values, chosen):
    return sum(value[at] for value, at in zip(values, chosen, strict=True))


def best_by_force(costs, sizes, capacity):
    """The least cost over all combinations that fit."""
    everything = product(*(range(len(cost)) for cost in costs))
    return min(total(costs, chosen) for chosen in everything if total(sizes, chosen) <= capacity)


def range_of(sizes):
    return sum(size.min() for size in sizes), sum(size.max() for size in sizes)


@pytest.mark.parametrize("seed", range(40))
def test_it_fits_and_is_at_most_one_step_above_the_optimum(seed):
    costs, sizes = problem(seed)
    least, most = range_of(sizes)
    largest_saving = max(cost[0] - cost.min() for cost in costs)
    found = []
    for capacity in np.linspace(least, most, 9):
        chosen = least_cost(costs, sizes, capacity)
        assert total(sizes, chosen) <= capacity
        best = best_by_force(costs, sizes, capacity)
        assert best - 1e-12 <= total(costs, chosen) <= best + largest_saving
        found.append(total(costs, chosen) - best)
    assert found[-1] == pytest.approx(0, abs=1e-12)  # with room for everything


def test_it_is_nearly_always_the_optimum():
    """The bound above is loose; what the last step costs is mostly nothing."""
    gaps, spread = [], []
    for seed in range(60):
        costs, sizes = problem(seed)
        capacity = np.mean(range_of(sizes))
        best = best_by_force(costs, sizes, capacity)
        gaps.append(total(costs, least_cost(costs, sizes, capacity)) - best)
        spread.append(total(costs, least_cost(costs, sizes, range_of(sizes)[0])) - best)
    assert np.mean(np.array(gaps) < 1e-12) > 0.6
    assert np.sum(gaps) < 0.03 * np.sum(spread)


@pytest.mark.parametrize("seed", range(10))
def test_on_the_hull_it_is_exact(seed):
    """Where a price per byte decides, the capacity that it leads to is met exactly, and nothing of that size is
    better.
    """
    costs, sizes = problem(seed)
    for price in (0.001, 0.01, 0.05, 0.2):
        by_price = [int(np.argmin(cost + price * size)) for cost, size in zip(costs, sizes, strict=True)]
        capacity = total(sizes, by_price)
        assert total(costs, least_cost(costs, sizes, capacity)) == pytest.approx(total(costs, by_price))
        assert total(costs, by_price) == pytest.approx(best_by_force(costs, sizes, capacity))


def test_what_gains_nothing_stays_small_and_ties_go_to_the_first():
    nothing, something = np.zeros(3), np.array([3.0, 1.0, 0.0])
    sizes = [np.array([1, 2, 3])] * 3
    assert least_cost([nothing, something, something], sizes, 6) == [0, 2, 1]
    assert least_cost([nothing, something, something], sizes, 5) == [0, 1, 1]
    assert least_cost([nothing, something, something], sizes, 4) == [0, 1, 0]


def test_an_option_that_is_larger_and_worse_is_never_taken():
    assert least_cost([np.array([2.0, 5.0, 1.0])], [np.array([1, 2, 3])], 2) == [0]


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="take 4, more than 3"):
        least_cost([np.zeros(2), np.zeros(1)], [np.array([1, 9]), np.array([3])], 3)


TIERS = (4, 6, 8)


def inputs(seed, count=6, levels=5):
    """Errors [3,T] that fall sixteenfold with two more bits, give or take, and what share of the work reads
    each input.
    """
    rng = np.random.default_rng(seed)
    base = np.exp(rng.normal(0, 2, (count, 1, levels)))
    shares = rng.uniform(0.2, 1, count)
    return (
        list(base * 16.0 ** -np.arange(3)[:, None] * rng.uniform(0.8, 1.2, (count, 3, levels))),
        shares / shares.sum(),
    )


def average(errors, shares, budget):
    bits = [fewest_bits(error, TIERS, budget * share) for error, share in zip(errors, shares, strict=True)]
    return np.average([at.mean() for at in bits], weights=shares)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wanted", [4, 4.7, 6, 7.9, 8])
def test_the_average_is_met_and_a_smaller_budget_would_miss_it(seed, wanted):
    errors, shares = inputs(seed)
    budget = shared_budget(errors, [TIERS] * len(errors), shares, wanted)
    assert average(errors, shares, budget * (1 + 1e-9)) <= wanted + 1e-9
    if wanted < 8:
        assert average(errors, shares, budget * (1 - 1e-6)) > wanted


@pytest.mark.parametrize("seed", range(5))
def test_budgets_lose_little_against_the_best_assignment(seed):
    """The knapsack with a place for each input and level is the rival, at the same average."""
    errors, shares = inputs(seed)
    budget = shared_budget(errors, [TIERS] * len(errors), shares, 5.5)
    ours, size = 0.0, 0.0
    for error, share in zip(errors, shares, strict=True):
        bits = fewest_bits(error, TIERS, budget * share * (1 + 1e-9))
        ours += error[np.searchsorted(TIERS, bits), np.arange(len(bits))].sum()
        size += share * bits.sum()
    costs = [error[:, t] for error in errors for t in range(error.shape[1])]
    sizes = [
        share * np.array(TIERS) for error, share in zip(errors, shares, strict=True) for _ in range(error.shape[1])
    ]
    best = total(costs, least_cost(costs, sizes, size + 1e-9))
    assert best <= ours + 1e-12
    assert ours < 1.1 * best


def test_inputs_with_fewer_tiers_take_part():
    errors, shares = inputs(0)
    tiers = [(4,), *[TIERS] * (len(errors) - 1)]
    budget = shared_budget([errors[0][:1], *errors[1:]], tiers, shares, 6)
    assert np.isfinite(budget)
    np.testing.assert_array_equal(fewest_bits(errors[0][:1], (4,), 0.0), 4)


def test_an_impossible_average_is_an_error():
    errors, shares = inputs(0)
    with pytest.raises(ValueError, match="less than the fewest"):
        shared_budget(errors, [TIERS] * len(errors), shares, 3.9)


@pytest.mark.parametrize("seed", range(30))
def test_no_room_is_left_for_a_change_that_saves(seed):
    """Steps along the hulls end at the first that does not fit; what is left goes where it saves most."""
    costs, sizes = problem(seed)
    for capacity in np.linspace(*range_of(sizes), 9):
        chosen = least_cost(costs, sizes, capacity)
        room = capacity - total(sizes, chosen)
        for cost, size, at in zip(costs, sizes, chosen, strict=True):
            assert (cost[size - size[at] <= room] >= cost[at]).all()


def test_what_is_left_goes_to_the_change_that_saves_most():
    """The hull step of the first item saves most by size and does not fit; then the third's saves more than the
    second's.
    """
    costs = [np.array([100.0, 0.0]), np.array([3.0, 0.0]), np.array([5.0, 0.0])]
    sizes = [np.array([0, 20]), np.array([0, 5]), np.array([0, 6])]
    assert least_cost(costs, sizes, 10) == [0, 0, 1]
    assert least_cost(costs, [np.array([0, 20]), np.array([0, 1]), np.array([0, 6])], 6) == [0, 0, 1]
    assert least_cost(costs, sizes, 11) == [0, 1, 1]
    assert least_cost(costs, sizes, 20) == [1, 0, 0]


def test_options_between_the_hulls_steps_are_taken_where_they_fit():
    """From 10 to 0 at size 4 the hull goes at once; the option beside it, 7 at size 1, is all that fits in 3."""
    assert least_cost([np.array([10.0, 9.0, 0.0])], [np.array([0, 1, 4])], 3) == [1]
