"""From statistics to decisions: complete, better where it claims to be, and refused where they do not belong to the
model.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.curvature.sensitivity import Sensitivity
from mlxquant.errors import CalibrationError, RecipeError
from mlxquant.layers.tree import get_module
from mlxquant.methods.inputs.tiers import OutputErrors, lowered, relative_errors
from mlxquant.pipeline.decisions import decide
from mlxquant.pipeline.divisions import try_division
from mlxquant.sweep.folding import divide
from mlxquant.sweep.inputs import LayerInput, Options, decide_input

from support.collected_statistics import Stats, collect
from support.tiny_pictures import tiny_adapter

Q = "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj"
FC2 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"


@pytest.fixture(scope="module")
def plain():
    """The tiny model and what its layers see."""
    adapter = tiny_adapter()
    return adapter, collect(adapter)


@pytest.fixture(scope="module")
def spiky():
    """One channel stands out before q, k and v, and one after the GELU; what reads them counts on it."""
    adapter = tiny_adapter()
    edge = next(edge for edge in adapter.edges() if Q in edge.consumers)
    divisor = np.ones(32, np.float32)
    divisor[5] = 1 / 60
    divide(adapter.module, edge, divisor)
    fc1 = get_module(adapter.module, FC2.replace("fc2", "fc1"))
    fc2, row = get_module(adapter.module, FC2), mx.where(mx.arange(fc1.weight.shape[0]) == 7, 8.0, 1.0)
    fc1.weight, fc1.bias, fc2.weight = fc1.weight * row[:, None], fc1.bias * row, fc2.weight / row
    return adapter, collect(adapter)


@pytest.fixture(scope="module")
def skewed():
    """Half of the channels after one GELU are far from zero."""
    adapter = tiny_adapter()
    fc1 = get_module(adapter.module, FC2.replace("fc2", "fc1"))
    fc1.bias = fc1.bias + mx.where(mx.arange(128) < 64, 8.0, 0.0)
    return adapter, collect(adapter)


def weight(adapter, path):
    return np.array(adapter.layers()[path].weight)


@pytest.mark.parametrize("rule", ["error", "threshold"])
def test_no_layer_is_skipped(plain, rule):
    """A change of names must not skip layers in silence."""
    adapter, stats = plain
    config = decide(stats, adapter, Options(rule=rule))
    expected = {path for path in adapter.layers() if adapter.role(path) in ("attention", "mlp")}
    assert set(config.plain) == set(config.layers) == expected
    for path, table in config.plain.items():
        np.testing.assert_array_equal(table.sigma, stats.sigmas)
        assert set(table.bits.tolist()) <= {4, 6, 8}
        assert config.layers[path]["mean_bits"] == table.bits.mean()
        assert config.layers[path]["always_a8"] == bool((table.bits == 8).all())


@pytest.mark.parametrize("rule", ["error", "threshold"])
def test_nothing_that_was_seen_is_clipped(plain, rule):
    """The maximum clips nothing, nor does what averages over batches where all pictures are one. Of single pictures the
    average does.
    """
    adapter, stats = plain

    def overshoot(options, stats=stats):
        largest = 0.0
        for path, table in decide(stats, adapter, options).plain.items():
            edge, ranges = 2.0 ** (table.bits[:, None].astype(int) - 1), stats.ranges(path)
            top = (ranges.most - table.shift) / table.step[:, None] - (edge - 1)
            bottom = -edge - (ranges.least - table.shift) / table.step[:, None]
            largest = max(largest, float(top.max()), float(bottom.max()))
        return largest

    assert overshoot(Options(rule=rule)) < 0.01  # of a step
    assert overshoot(Options(rule=rule, range="average")) < 0.01
    assert overshoot(Options(rule=rule, range="average"), collect(adapter, range_batch=1)) > 0.5


def test_the_error_rule_keeps_its_budget_or_says_eight(plain):
    adapter, stats = plain
    for budget in (1e-6, 1e-5, 1e-4):
        config = decide(stats, adapter, Options(budget=budget))
        for path, table in config.plain.items():
            ranges, w = stats.ranges(path), weight(adapter, path)
            errors = OutputErrors(ranges, w, stats.sensitivity(path))(table)
            assert ((errors <= budget * 1.001) | (table.bits == 8)).all()
            assert config.layers[path]["error"] == pytest.approx(errors.mean(), rel=1e-3)
            people = float(np.sqrt((relative_errors(ranges, w, table) ** 2).mean()))
            assert config.layers[path]["relative_error"] == pytest.approx(people, rel=1e-3)
    bits = [decide(stats, adapter, Options(budget=budget)).mean_bits for budget in (1e-9, 1e-5, 3e-5, 1)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > 7.8  # what reaches no velocity has four
    assert bits[-1] == 4


def test_bits_go_where_errors_reach_the_velocity(plain):
    """A layer whose errors cost a thousand times as much is given bits, the others are not, and at once for each
    timestep.
    """
    adapter, stats = plain
    factors = np.array([1.0, 1e3, 1.0])[:, None]
    dearer = {**stats.costs.layers, Q: stats.costs.layers[Q] * factors}
    before, after = (
        decide(s, adapter, Options(budget=7e-5))
        for s in (stats, replace(stats, costs=replace(stats.costs, layers=dearer)))
    )
    np.testing.assert_array_equal(after.plain[Q].bits[[0, 2]], before.plain[Q].bits[[0, 2]])
    assert (before.plain[Q].bits[1], after.plain[Q].bits[1]) == (4, 8)
    for path in set(before.plain) - {Q}:
        np.testing.assert_array_equal(after.plain[path].bits, before.plain[path].bits)


def test_the_shift_is_taken_where_it_helps_and_only_there(skewed):
    adapter, stats = skewed
    config, misled = (decide(s, adapter, Options()) for s in (stats, replace(stats, off_centre=30.0)))
    for path, facts in config.layers.items():
        assert ("error_shifted" in facts) == path.endswith("fc2")
        assert facts["shifted"] == (facts.get("error_shifted", 1.0) < facts.get("error_plain", 0.0))
        assert config.plain[path].shift.shape[1] == (weight(adapter, path).shape[1] if facts["shifted"] else 1)
    assert config.layers[FC2]["shifted"]
    assert config.layers[FC2]["error_shifted"] < 0.7 * config.layers[FC2]["error_plain"]
    # one number added to all channels is taken out again by the grid, so it changes nothing
    assert misled.layers[FC2]["error_shifted"] == pytest.approx(config.layers[FC2]["error_shifted"], rel=0.05)


def test_a_shift_that_hurts_is_left_out(plain, monkeypatch):
    adapter, stats = plain
    scrambled = np.random.default_rng(0).normal(size=128).astype(np.float32) * 10
    monkeypatch.setattr(Stats, "shift", lambda self, path: np.tile(scrambled, (3, 1)) if path in self.gelu else None)
    config = decide(stats, adapter, Options())
    assert not any(facts["shifted"] for facts in config.layers.values())
    assert config.layers[FC2]["error_shifted"] > config.layers[FC2]["error_plain"] == config.layers[FC2]["error"]


def test_smoothing_is_found_applied_and_exact(spiky):
    adapter, stats = spiky
    config = decide(stats, adapter, Options())
    assert set(config.smoothquant) == {Q}
    division = config.smoothquant[Q]
    assert division.applied
    assert division.facts["error_after"] < division.facts["error_before"]
    assert division.facts["ratio"] > 5
    assert set(division.layers) == set(division.tables) == {Q.replace("q_proj", f"{name}_proj") for name in "qkv"}
    assert np.argmax(division.divisor) == 5
    # the tables are for the divided input: with the divided weight they are what they claim to be
    ranges = stats.ranges(Q)
    low, high = (getattr(ranges, name) / division.divisor for name in ("least", "most"))
    table = config.tables(smoothed=True)[Q]
    np.testing.assert_allclose(table.step * (2.0**table.bits - 1), high.max(1) - low.min(1), rtol=1e-4)
    assert config.tables()[Q] is config.plain[Q]
    assert (config.plain[Q].step * 2.0 ** config.plain[Q].bits > 2 * table.step * 2.0**table.bits).all()


def test_a_division_does_not_help_what_costs_nothing(spiky):
    adapter, stats = spiky
    free = Sensitivity(stats.costs.sigma, {}, {path: 0 * costs for path, costs in stats.costs.layers.items()})
    division = decide(replace(stats, costs=free), adapter, Options()).smoothquant[Q]
    assert division.facts["error_before"] == division.facts["error_after"] == 0
    assert not division.applied


def test_by_thresholds_smoothing_is_worth_one_tier(spiky):
    adapter, stats = spiky
    config = decide(stats, adapter, Options(rule="threshold"))
    assert config.smoothquant[Q].applied
    for path, table in config.smoothquant[Q].tables.items():
        np.testing.assert_array_equal(table.bits, lowered(config.plain[path].bits))
    assert config.plain[Q].bits.max() == 8


def test_a_division_that_hurts_is_recorded_and_not_applied(plain):
    adapter, stats = plain
    layer = decide_input(LayerInput(stats.ranges(Q), weight(adapter, Q), stats.sensitivity(Q)), None, Options())
    bad = np.geomspace(1e-3, 1e3, 32).astype(np.float32)
    division = try_division({Q: layer}, bad, Options(), {"alpha": 0.5})
    assert not division.applied
    assert division.tables == {}
    assert division.facts["error_after"] > division.facts["error_before"] > 0
    assert division.facts["alpha"] == 0.5


def test_migration_is_tried_when_asked_for(spiky):
    adapter, stats = spiky
    assert decide(stats, adapter, Options()).migration == {}
    config = decide(stats, adapter, Options(migration=True))
    division = config.migration[FC2]
    assert division.divisor[7] == division.facts["largest"] > 1
    assert (
        division.applied
        == (division.facts["error_after"] < division.facts["error_before"])
        == config.layers[FC2]["migration"]
    )
    assert set(config.migrations) == {path for path, facts in config.layers.items() if facts["migration"]}
    assert FC2 in config.migrations
    assert config.tables(migrated=True)[FC2] is not config.plain[FC2]


def test_statistics_of_another_model_are_refused(plain):
    adapter, stats = plain
    with pytest.raises(CalibrationError, match=r"collected from weights feedfeedfeed….*collect them again"):
        decide(replace(stats, source="feed" * 16), adapter, Options())
    with pytest.raises(CalibrationError, match=r"are of 'blocks\.9\.fc3', which this mmdit-shapes does not have"):
        decide(replace(stats, layers=[*stats.layers, "blocks.9.fc3"]), adapter, Options())
    with pytest.raises(CalibrationError, match="no layers"):
        decide(replace(stats, layers=[]), adapter, Options())


@pytest.mark.parametrize(
    "options", [{"budget": 0.0}, {"budget": float("nan")}, {"thresholds": (10.0, 6.0)}, {"thresholds": (0.0, 1.0)}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError, match="found"):
        Options(**options)


def test_a_part_of_an_edge_is_decided_on_but_not_smoothed(spiky):
    adapter, stats = spiky
    config = decide(replace(stats, layers=[Q]), adapter, Options())
    assert set(config.plain) == {Q}
    assert config.smoothquant == {}
