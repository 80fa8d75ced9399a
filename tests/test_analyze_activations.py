"""From statistics to decisions: complete, better where it claims to be, and refused where they do not belong to the model."""

import mlxquant as mq  # before mlx

# isort: split
import json
import os
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mlxquant import analyze_activations, artifacts, cli
from mlxquant.decisions import decide
from mlxquant.divisions import try_division
from mlxquant.errors import CalibrationError, RecipeError
from mlxquant.folds import divide
from mlxquant.input_tables import LayerInput, Options, decide_input
from mlxquant.methods.tiers import OutputErrors, lowered, relative_errors
from mlxquant.models.mmdit_shapes import MMDiTShapes
from mlxquant.pipeline.quant_config import QuantConfig
from mlxquant.rewrite import get_module, tapped
from mlxquant.sensitivity import Sensitivity, measure
from mlxquant.statistics import Collector

from conftest import tiny_adapter

Q = "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj"
FC2 = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"


@dataclass
class Stats:
    """What activation statistics are asked for, collected without files; the shift is the centre of the extremes."""

    source: str
    layers: list[str]
    collector: Collector
    costs: Sensitivity
    gelu: set[str]
    model: str = "mmdit-shapes"
    sha256: str = "5" * 64
    calibration: str = "c" * 64
    off_centre: float = 0.0
    step_keys: list[str] = field(default_factory=list)

    @property
    def sigmas(self):
        return self.ranges(self.layers[0]).sigma

    def ranges(self, path):
        return self.collector[path].ranges

    def sensitivity(self, path):
        return self.costs.layers[path]

    def shift(self, path):
        ranges = self.ranges(path)
        return (ranges.least + ranges.most) / 2 + self.off_centre if path in self.gelu else None


def collect(adapter, steps=3):
    calibration = mq.calibrate(mq.Model(adapter), prompts=2, steps=steps)
    edges = adapter.edges()
    layers = [path for edge in edges for path in edge.consumers]
    collector = Collector()
    sigmas, states = calibration.batches(adapter)
    costs = measure(adapter, adapter.stages, sigmas, states, layers)
    with tapped(adapter.module, layers, collector):
        for sigma, state in zip(sigmas, states, strict=True):
            collector.sigma = sigma
            with adapter.clock.at(sigma):
                for stage in adapter.stages:
                    state = stage.run(state)
                mx.eval(state)
    gelu = {path for edge in edges if edge.after == "gelu" for path in edge.consumers}
    keys = [f"step_{i}" for i in reversed(range(steps))]
    return Stats(adapter.fingerprint, layers, collector, costs, gelu, step_keys=keys)


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
    return np.array(adapter.linears()[path].weight)


@pytest.mark.parametrize("rule", ["error", "threshold"])
def test_no_layer_is_skipped(plain, rule):
    """Lesson 11: a change of names once skipped every layer in silence."""
    adapter, stats = plain
    config = decide(stats, adapter, Options(rule=rule))
    expected = {path for path in adapter.linears() if adapter.role(path) in ("attention", "mlp")}
    assert set(config.plain) == set(config.layers) == expected
    for path, table in config.plain.items():
        np.testing.assert_array_equal(table.sigma, stats.sigmas)
        assert set(table.bits.tolist()) <= {4, 6, 8}
        assert config.layers[path]["mean_bits"] == table.bits.mean()
        assert config.layers[path]["always_a8"] == bool((table.bits == 8).all())


@pytest.mark.parametrize("rule", ["error", "threshold"])
def test_nothing_that_was_seen_is_clipped(plain, rule):
    """Lesson 10: clipping ruins pictures, the maximum does not. What averages the extremes clips."""
    adapter, stats = plain

    def overshoot(options):
        largest = 0.0
        for path, table in decide(stats, adapter, options).plain.items():
            edge, ranges = 2.0 ** (table.bits[:, None].astype(int) - 1), stats.ranges(path)
            top = (ranges.most - table.shift) / table.step[:, None] - (edge - 1)
            bottom = -edge - (ranges.least - table.shift) / table.step[:, None]
            largest = max(largest, float(top.max()), float(bottom.max()))
        return largest

    assert overshoot(Options(rule=rule)) < 0.01  # of a step
    assert overshoot(Options(rule=rule, range="average")) > 0.5


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
    """A layer whose errors cost a thousand times as much is given bits, the others are not, and at once for each timestep."""
    adapter, stats = plain
    factors = np.array([1.0, 1e3, 1.0])[:, None]
    dearer = {**stats.costs.layers, Q: stats.costs.layers[Q] * factors}
    before, after = (decide(s, adapter, Options(budget=7e-5)) for s in (stats, replace(stats, costs=replace(stats.costs, layers=dearer))))
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
    assert division.applied == (division.facts["error_after"] < division.facts["error_before"]) == config.layers[FC2]["migration"]
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


@pytest.mark.parametrize("options", [{"budget": 0.0}, {"budget": float("nan")}, {"thresholds": (10.0, 6.0)}, {"thresholds": (0.0, 1.0)}])
def test_impossible_options_are_refused(options):
    with pytest.raises(RecipeError, match="found"):
        Options(**options)


def test_a_part_of_an_edge_is_decided_on_but_not_smoothed(spiky):
    adapter, stats = spiky
    config = decide(replace(stats, layers=[Q]), adapter, Options())
    assert set(config.plain) == {Q}
    assert config.smoothquant == {}


@pytest.fixture
def stats_file(tmp_path, monkeypatch, plain):
    """A command that finds the tiny model and its statistics."""
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls: tiny_adapter()))

    class Reader:
        @staticmethod
        def read(path):
            return plain[1]

    monkeypatch.setattr(analyze_activations, "ActivationStats", Reader)
    return tmp_path / "layer_statistics.json"


def run(*arguments):
    return CliRunner().invoke(cli.main, ["analyze-activations", *map(str, arguments)])


def succeed(*arguments):
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout.splitlines()[-1]), outcome.stderr


def fail(*arguments):
    outcome = run(*arguments)
    assert outcome.exit_code != 0
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert outcome.stdout == ""
    return outcome.stderr


def test_the_command_writes_what_it_promises(stats_file, plain):
    facts, said = succeed("--stats", stats_file)
    folder = stats_file.parent
    assert sorted(os.listdir(folder)) == ["layer_temporal_analysis.json", "quant_config.json", "quant_config.npz", "quant_ranges.png"]
    config = QuantConfig.read(folder / "quant_config.json")
    assert {"output", "mean_bits", "counts", "switchers", "always_a8"} <= set(facts)
    assert sum(facts["counts"].values()) == facts["layers"] * facts["timesteps"] == sum(t.bits.size for t in config.plain.values())
    assert facts["mean_bits"] == config.mean_bits
    assert "attn.q_proj" in said
    assert "velocity" in said
    q = [
        line.split() for line in said.splitlines() if line.startswith("multimodal_transformer_blocks.*.image_transformer_block.attn.q_proj")
    ]
    kind = [facts for path, facts in config.layers.items() if path.endswith("image_transformer_block.attn.q_proj")]
    for position, name in ((-2, "error"), (-1, "relative_error")):
        assert float(q[0][position]) == pytest.approx(np.mean([facts[name] for facts in kind]), rel=0.02)
    assert config.facts["parents"] == {"layer_statistics.json": "5" * 64}
    assert config.facts["calibration"] == "c" * 64
    assert config.facts["options"]["rule"] == "error"
    assert config.step_keys == ("step_2", "step_1", "step_0")
    np.testing.assert_array_equal(config.sigmas, plain[1].sigmas)
    analysis = artifacts.read_json(folder / "layer_temporal_analysis.json", "temporal-analysis")
    assert (analysis["config"], analysis["parents"]) == ("quant_config.json", config.facts["parents"])
    assert set(analysis["layers"]) == set(config.plain)
    with Image.open(folder / "quant_ranges.png") as image:
        assert np.asarray(image).std() > 5
    assert str(folder) not in (folder / "quant_config.json").read_text()


def test_equal_runs_give_equal_bytes_and_force_replaces(stats_file):
    succeed("--stats", stats_file, "--rule", "threshold")
    folder = stats_file.parent
    names = os.listdir(folder)
    before = {name: (folder / name).read_bytes() for name in names}
    assert succeed("--stats", stats_file, "--rule", "threshold")[0]["counts"]["4"] > 0  # finished already
    assert "made from other options" in fail("--stats", stats_file)
    assert {name: (folder / name).read_bytes() for name in names} == before
    succeed("--stats", stats_file, "--rule", "threshold", "--force")
    assert {name: (folder / name).read_bytes() for name in names} == before
    succeed("--stats", stats_file, "--force")
    assert (folder / "quant_config.json").read_bytes() != before["quant_config.json"]


def test_a_killed_run_is_repeated_without_force_and_other_configs_keep_their_analysis(stats_file, monkeypatch):
    def killed(self, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(QuantConfig, "write", killed)
        assert CliRunner().invoke(cli.main, ["analyze-activations", "--stats", str(stats_file)]).exit_code == 130
    assert sorted(os.listdir(stats_file.parent)) == ["layer_temporal_analysis.json", "quant_ranges.png"]
    assert "is of quant_config.json" in fail("--stats", stats_file, "--output", stats_file.with_name("other.json"))
    succeed("--stats", stats_file)


def test_options_reach_the_decision(stats_file, tmp_path):
    (tmp_path / "a").mkdir()
    arguments = ["--rule", "threshold", "--thresholds", "1.5,1e6", "--range", "average", "--alpha", "0.25", "--migration"]
    facts, _ = succeed("--stats", stats_file, "--output", tmp_path / "a" / "mine.json", *arguments)
    config = QuantConfig.read(tmp_path / "a" / "mine.json")
    expected = Options("threshold", thresholds=(1.5, 1e6), range="average", alpha=0.25, migration=True)
    assert config.facts["options"] == artifacts.plain(expected.__dict__)
    assert facts["counts"]["6"] > 0
    assert (tmp_path / "a" / "mine.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thresholds", "6"], "expected two numbers"),
        (["--thresholds", "10,6"], "the smaller first"),
        (["--budget", "0"], "positive number"),
        (["--rule", "guess"], "guess"),
        (["--model", "sd9"], "unknown model 'sd9'"),
        (["--output", "config.txt"], "ends in .json"),
        (["--output", "layer_temporal_analysis.json", "--force"], "the name of the temporal analysis"),
    ],
)
def test_bad_arguments_are_one_clear_error(stats_file, arguments, message):
    assert message in fail("--stats", stats_file, *arguments)
    assert os.listdir(stats_file.parent) == []


def test_the_statistics_are_not_overwritten(stats_file):
    assert "not that of the statistics" in fail("--stats", stats_file, "--output", stats_file, "--force")


def test_another_models_statistics_are_one_clear_error(stats_file, monkeypatch):
    def other(cls):
        adapter = tiny_adapter()
        adapter.module.final_layer.linear.weight = adapter.module.final_layer.linear.weight + 1
        return adapter

    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(other))
    assert "collect them again from this model" in fail("--stats", stats_file)
    assert os.listdir(stats_file.parent) == []


def test_the_activation_track_from_its_first_step(tmp_path, monkeypatch):
    """Trajectories, statistics, decisions: each command on what the one before wrote."""
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls: tiny_adapter()))
    calib = ["--calib-dir", str(tmp_path)]
    for verb, *options in (
        ("generate-calibration-data", *calib, "--model", "mmdit-shapes", "--num-images", "1", "--num-steps", "4"),
        ("collect-layer-activations", *calib, "--num-images", "1", "--stride", "2"),
    ):
        outcome = CliRunner().invoke(cli.main, [verb, *options])
        assert outcome.exit_code == 0, outcome.output
    facts, _ = succeed("--stats", tmp_path / "activations" / "layer_statistics.json")
    config = QuantConfig.read(tmp_path / "activations" / "quant_config.json")
    assert config.facts["calibration"] == artifacts.file_digest(tmp_path / "manifest.json")
    assert config.facts["parents"] == {"layer_statistics.json": artifacts.file_digest(tmp_path / "activations" / "layer_statistics.json")}
    assert config.step_keys == ("2", "0")
    adapter = tiny_adapter()
    assert set(config.plain) == {path for path in adapter.linears() if adapter.role(path) in ("attention", "mlp")}
    assert facts["layers"] == len(config.plain)
