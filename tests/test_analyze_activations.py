"""The verb: a config, its analysis and its picture from the statistics, equal for equal runs, and one clear error on
everything else.
"""

import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from mlxquant import analyze_activations
from mlxquant.files import checked
from mlxquant.files.checked import file_digest, read_json
from mlxquant.models.shapes.adapter import MMDiTShapes
from mlxquant.pipeline.quant_config import QuantConfig
from mlxquant.sweep.inputs import Options

from support import command_line
from support.collected_statistics import collect
from support.tiny_pictures import tiny_adapter

run = partial(command_line.run, "analyze-activations")
succeed = partial(command_line.succeed, "analyze-activations")
fail = partial(command_line.fail, "analyze-activations")


@pytest.fixture(scope="module")
def stats():
    """What the layers of the tiny model see."""
    return collect(tiny_adapter())


@pytest.fixture
def stats_file(tmp_path, monkeypatch, stats):
    """A command that finds the tiny model and its statistics."""
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))

    class Reader:
        @staticmethod
        def read(path):
            return stats

    monkeypatch.setattr(analyze_activations, "ActivationStats", Reader)
    return tmp_path / "layer_statistics.json"


def test_the_command_writes_what_it_promises(stats_file, stats):
    facts, said = succeed("--stats", stats_file)
    folder = stats_file.parent
    assert sorted(os.listdir(folder)) == [
        "layer_temporal_analysis.json",
        "quant_config.json",
        "quant_config.npz",
        "quant_ranges.png",
    ]
    config = QuantConfig.read(folder / "quant_config.json")
    assert {"output", "mean_bits", "counts", "switchers", "always_a8"} <= set(facts)
    assert (
        sum(facts["counts"].values())
        == facts["layers"] * facts["timesteps"]
        == sum(t.bits.size for t in config.plain.values())
    )
    assert facts["mean_bits"] == config.mean_bits
    assert "attn.q_proj" in said
    assert "velocity" in said
    q = [
        line.split()
        for line in said.splitlines()
        if line.startswith("multimodal_transformer_blocks.*.image_transformer_block.attn.q_proj")
    ]
    kind = [facts for path, facts in config.layers.items() if path.endswith("image_transformer_block.attn.q_proj")]
    for position, name in ((-2, "error"), (-1, "relative_error")):
        assert float(q[0][position]) == pytest.approx(np.mean([facts[name] for facts in kind]), rel=0.02)
    assert config.facts["parents"] == {"layer_statistics.json": "5" * 64}
    assert config.facts["calibration"] == "c" * 64
    assert config.facts["options"]["rule"] == "error"
    assert facts["range_batch"] == config.facts["range_batch"] == 2
    assert config.step_keys == ("step_2", "step_1", "step_0")
    np.testing.assert_array_equal(config.sigmas, stats.sigmas)
    analysis = read_json(folder / "layer_temporal_analysis.json", "temporal-analysis")
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
        assert run("--stats", stats_file).exit_code == 130
    assert sorted(os.listdir(stats_file.parent)) == ["layer_temporal_analysis.json", "quant_ranges.png"]
    assert "is of quant_config.json" in fail("--stats", stats_file, "--output", stats_file.with_name("other.json"))
    succeed("--stats", stats_file)


def test_options_reach_the_decision(stats_file, tmp_path):
    (tmp_path / "a").mkdir()
    arguments = [
        "--rule",
        "threshold",
        "--thresholds",
        "1.5,1e6",
        "--range",
        "average",
        "--alpha",
        "0.25",
        "--migration",
    ]
    facts, _ = succeed("--stats", stats_file, "--output", tmp_path / "a" / "mine.json", *arguments)
    config = QuantConfig.read(tmp_path / "a" / "mine.json")
    expected = Options("threshold", thresholds=(1.5, 1e6), range="average", alpha=0.25, migration=True)
    assert config.facts["options"] == checked.plain(expected.__dict__)
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
    def other(cls, place=""):
        adapter = tiny_adapter()
        adapter.module.final_layer.linear.weight = adapter.module.final_layer.linear.weight + 1
        return adapter

    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(other))
    assert "collect them again from this model" in fail("--stats", stats_file)
    assert os.listdir(stats_file.parent) == []


def test_the_activation_track_from_its_first_step(tmp_path, monkeypatch):
    """Trajectories, statistics, decisions: each command on what the one before wrote."""
    monkeypatch.setattr(MMDiTShapes, "pretrained", classmethod(lambda cls, place="": tiny_adapter()))
    calib = ["--calib-dir", str(tmp_path)]
    for verb, *options in (
        ("generate-calibration-data", *calib, "--model", "mmdit-shapes", "--num-images", "1", "--num-steps", "4"),
        ("collect-layer-activations", *calib, "--num-images", "1", "--stride", "2"),
    ):
        command_line.succeed(verb, *options)
    facts, _ = succeed("--stats", tmp_path / "activations" / "layer_statistics.json")
    config = QuantConfig.read(tmp_path / "activations" / "quant_config.json")
    assert config.facts["calibration"] == file_digest(tmp_path / "manifest.json")
    assert config.facts["parents"] == {
        "layer_statistics.json": file_digest(tmp_path / "activations" / "layer_statistics.json")
    }
    assert config.step_keys == ("2", "0")
    adapter = tiny_adapter()
    assert set(config.plain) == {path for path in adapter.layers() if adapter.role(path) in ("attention", "mlp")}
    assert facts["layers"] == len(config.plain)
