"""Groups of neighbouring noise levels, against trying every way to cut."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from mlxquant.methods.inputs.clipping import error
from mlxquant.methods.inputs.timestep_groups import best_groups, group_costs, grouped
from mlxquant.numerics.input_ranges import InputRanges

WEIGHT = np.random.default_rng(9).normal(size=(8, 6))


def ends(seed, count=8):
    rng = np.random.default_rng(seed)
    low = -rng.random(count) * 3
    return low, low + 0.5 + rng.random(count) * 4


def ranges_of(scales, seed=0):
    rows = np.random.default_rng(seed).normal(size=(len(scales), 40, 6)) * np.asarray(scales)[:, None, None]
    rows = rows.astype(np.float32)
    low, high = rows.min(1), rows.max(1)
    return InputRanges(np.linspace(0.1, 1, len(scales)).astype(np.float32), low, high, low, high, rows)


def test_the_cost_is_how_much_the_noise_grows():
    low, high = ends(0)
    costs = group_costs(low, high)
    for i in range(8):
        for j in range(8):
            span = high[i : j + 1].max() - low[i : j + 1].min() if i <= j else 0
            expected = sum((span / (high[t] - low[t])) ** 2 for t in range(i, j + 1)) if i <= j else np.inf
            np.testing.assert_allclose(costs[i, j], expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_the_best_cut_is_found(seed, groups):
    costs = group_costs(*ends(seed))

    def total(cuts):
        edges = [0, *cuts, 8]
        return sum(costs[a, b - 1] for a, b in pairwise(edges))

    best = min(total(cuts) for cuts in combinations(range(1, 8), groups - 1))
    found = best_groups(costs, groups)
    np.testing.assert_allclose(sum(costs[g.start, g.stop - 1] for g in found), best)
    assert [g.start for g in found] + [8] == [0] + [g.stop for g in found]
    assert len(found) <= groups


def test_levels_that_look_alike_share_an_entry_and_others_do_not():
    ranges = ranges_of([1, 1, 1, 10, 10, 0.1, 0.1, 0.1])
    table = grouped(ranges, WEIGHT, 8, groups=3)
    assert len(np.unique(table.step)) == 3
    assert [len(set(table.step[part].tolist())) for part in (slice(0, 3), slice(3, 5), slice(5, 8))] == [1, 1, 1]


def test_as_many_groups_as_levels_are_the_levels_themselves():
    ranges = ranges_of([1, 3, 0.5, 2])
    table, single = grouped(ranges, WEIGHT, 6, groups=9), error(ranges, WEIGHT, 6)
    np.testing.assert_array_equal(table.step, single.step)
    np.testing.assert_array_equal(table.shift, single.shift)


def test_one_group_is_the_static_case():
    ranges = ranges_of([1, 3, 0.5, 2])
    table, static = grouped(ranges, WEIGHT, 6, groups=1), error(ranges.merged(), WEIGHT, 6)
    np.testing.assert_array_equal(table.step, np.repeat(static.step, 4))


def test_dead_levels_are_survived():
    ranges = ranges_of([0, 1, 0, 0, 2, 0])
    table = grouped(ranges, WEIGHT, 8, groups=3)
    assert np.isfinite(table.step).all()
    assert (table.step > 0).all()
    assert (grouped(ranges_of([0, 0, 0]), WEIGHT, 8).step == 1).all()
