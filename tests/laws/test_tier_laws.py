"""Laws that every tier rule keeps, over the whole registry."""

import inspect

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.methods.inputs.clipping import extremes
from mlxquant.methods.inputs.tiers import TIERS, mixed, quantized
from mlxquant.methods.registry import members
from mlxquant.sweep.collecting import InputStatistics

RULES = members("tier")
WEIGHT = np.random.default_rng(9).normal(size=(8, 16)).astype(np.float32)


def collect(levels=(0.2, 0.5, 0.9), width=16, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    statistics = InputStatistics(nn.Linear(width, 1), rows=64)
    for i, sigma in enumerate(levels):
        x = rng.standard_t(4, (4, 20, width)) * scale * (i + 1) + 0.5
        statistics.add((mx.array(x.astype(np.float32)),), sigma)
    return statistics.ranges


def tables(ranges, weight=WEIGHT):
    return {bits: extremes(ranges, weight, bits) for bits in TIERS}


def options(rule):
    """Every threshold, budget and ratio of a rule, with its default."""
    parameters = list(inspect.signature(rule.function).parameters.values())
    assert [p.name for p in parameters[:4]] == ["ranges", "weight", "tables", "costs"]
    return {p.name: p.default for p in parameters[4:]}


def costs_of(ranges, seed=3):
    return np.random.default_rng(seed).random((len(ranges.sigma), len(WEIGHT))) / len(WEIGHT)


@pytest.mark.parametrize("rule", RULES, ids=lambda m: m.name)
@pytest.mark.parametrize("levels", [(0.4,), (0.2, 0.5, 0.9)])
def test_bits_are_tiers_one_for_each_timestep(rule, levels):
    ranges = collect(levels)
    bits = rule.function(ranges, WEIGHT, tables(ranges))
    assert bits.shape == (len(levels),)
    assert bits.dtype == np.uint8
    assert set(bits.tolist()) <= set(TIERS)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda m: m.name)
def test_loosening_never_raises_bits_and_every_tier_is_reached(rule, weighed):
    ranges = collect()
    costs = costs_of(ranges) if weighed else None
    seen = []
    for factor in np.geomspace(1e-3, 1e8, 160):
        bits = rule.function(
            ranges, WEIGHT, tables(ranges), costs, **{name: factor * value for name, value in options(rule).items()}
        )
        seen.append(bits)
    assert (np.diff(np.array(seen).astype(int), axis=0) <= 0).all()
    assert set(np.unique(seen)) == set(TIERS)


@pytest.mark.parametrize("rule", RULES, ids=lambda m: m.name)
def test_timesteps_are_decided_one_by_one(rule):
    ranges = collect()
    costs = costs_of(ranges) * [[1e-4], [1e-2], [1e2]]
    whole = rule.function(ranges, WEIGHT, tables(ranges), costs)
    for t in range(3):
        parts = {name: getattr(ranges, name)[t : t + 1] for name in ("sigma", "low", "high", "least", "most", "rows")}
        one = type(ranges)(**parts)
        assert rule.function(one, WEIGHT, tables(one), costs[t : t + 1]) == whole[t]


@pytest.mark.parametrize("rule", RULES, ids=lambda m: m.name)
def test_only_tiers_that_there_are_tables_for_are_taken(rule):
    ranges = collect()
    for tiers in ((4,), (4, 6)):
        some = {tier: table for tier, table in tables(ranges).items() if tier in tiers}
        strict = {name: value * 1e-6 for name, value in options(rule).items()}
        assert set(rule.function(ranges, WEIGHT, some, **strict).tolist()) == {max(tiers)}


@pytest.mark.parametrize("rule", RULES, ids=lambda m: m.name)
def test_dearer_errors_never_get_fewer_bits(rule):
    ranges = collect()
    costs = costs_of(ranges)
    seen = [
        rule.function(ranges, WEIGHT, tables(ranges), costs * factor).astype(int)
        for factor in np.geomspace(1e-5, 1e5, 20)
    ]
    assert (np.diff(seen, axis=0) >= 0).all()


@pytest.mark.parametrize("rule", RULES, ids=lambda m: m.name)
def test_a_mirrored_input_gets_the_same_bits(rule):
    """A percentile of signed values overlooks everything that is negative."""
    ranges = collect()
    mirrored = type(ranges)(ranges.sigma, -ranges.high, -ranges.low, -ranges.most, -ranges.least, -ranges.rows)
    expected = rule.function(ranges, WEIGHT, tables(ranges))
    np.testing.assert_array_equal(rule.function(mirrored, WEIGHT, tables(mirrored)), expected)


@pytest.mark.parametrize("rule", RULES, ids=lambda m: m.name)
def test_dead_inputs_get_the_fewest_bits(rule):
    statistics = InputStatistics(nn.Linear(16, 1))
    statistics.add((mx.zeros((2, 3, 16)),), 0.5)
    ranges = statistics.ranges
    assert rule.function(ranges, WEIGHT, tables(ranges)) == min(TIERS)


def test_a_mixed_table_quantizes_exactly_as_the_chosen_ones():
    ranges = collect()
    choices, bits = tables(ranges), np.array([8, 4, 6])
    table = mixed(choices, bits)
    np.testing.assert_array_equal(table.bits, bits)
    for t, tier in enumerate(bits):
        np.testing.assert_array_equal(quantized(table, t, ranges.rows[t]), quantized(choices[tier], t, ranges.rows[t]))
