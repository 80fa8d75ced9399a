"""The verb: what it promises on success, and one clear error on everything else."""

import json

import pytest
from PIL import Image

from mlxquant.pipeline import replay
from mlxquant.pipeline.activation_stats import ActivationStats

from support import command_line
from support.six_steps import draw_in_process, use_tiny_model

VERB = ("collect-layer-activations", "--calib-dir")
run, succeed, fail = command_line.of(*VERB)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    use_tiny_model(monkeypatch)


@pytest.fixture
def calib(tmp_path):
    draw_in_process(tmp_path / "c", 5, 4)
    return tmp_path / "c"


def files(folder):
    return {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}


def test_the_folder_is_as_promised(calib):
    facts, _ = succeed(calib)
    out = calib / "activations"
    written = files(out)
    steps = [f"timestep_stats/step_{step}{end}" for step in (0, 2) for end in (".npz", "_index.json")]
    assert set(written) == {"layer_statistics.json", "ranges.png", *steps}
    assert {k: facts[k] for k in ("layers", "timesteps", "model")} == {
        "layers": 21,
        "timesteps": 2,
        "model": "mmdit-shapes",
    }
    assert facts["range_batch"] == json.loads((out / "layer_statistics.json").read_text())["range_batch"] == 5
    assert facts["disk_bytes"] == sum(path.stat().st_size for name, path in written.items() if name != "ranges.png")
    assert facts["seconds"] > 0
    assert facts["peak_bytes"] > 1e6
    notes = json.loads((out / "layer_statistics.json").read_text())
    assert notes["step_keys"] == ["0", "2"]
    assert notes["sigma_map"]["0"] == 1.0
    assert notes["layers"]["multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"] == {
        "leader": "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2",
        "after": "gelu",
        "width": 128,
    }
    with Image.open(out / "ranges.png") as image:
        assert image.width > 1000


def test_every_flag_counts(calib, tmp_path):
    succeed(
        calib,
        "--output-dir",
        tmp_path / "s",
        "--num-images",
        2,
        "--stride",
        1,
        "--rows",
        4,
        "--range-batch",
        1,
        "--seed",
        3,
        "--model",
        "mmdit-shapes",
    )
    stats = ActivationStats.read(tmp_path / "s" / "layer_statistics.json")
    facts = stats.ledger.facts
    assert {k: facts[k] for k in ("num_images", "stride", "rows", "range_batch", "seed")} == {
        "num_images": 2,
        "stride": 1,
        "rows": 4,
        "range_batch": 1,
        "seed": 3,
    }
    assert stats.ranges(stats.layers[0]).rows.shape == (4, 4, 32)
    assert not (calib / "activations").exists()


def test_other_and_unknown_models_are_refused(calib):
    assert "holds trajectories of mmdit-shapes, --model is sd3-medium" in fail(calib, "--model", "sd3-medium")
    assert not (calib / "activations").exists()


def test_what_is_missing_or_out_of_range_is_one_clear_error(calib, tmp_path):
    assert "run 'mlxquant generate-calibration-data" in fail(tmp_path / "none")
    assert "9 images wanted, it has 5" in fail(calib, "--num-images", 9)
    assert run(calib, "--rows", 0).exit_code == 2
    assert run(calib, "--range-batch", 0).exit_code == 2
    (tmp_path / "file").write_text("")
    assert "part of the path is a file" in fail(calib, "--output-dir", tmp_path / "file" / "a")
    assert not (calib / "activations").exists()


def test_finished_is_finished_unless_forced_or_changed(calib, monkeypatch):
    succeed(calib)
    before = {name: path.read_bytes() for name, path in files(calib / "activations").items()}
    with monkeypatch.context() as patch:
        patch.setattr(replay, "_run", None)
        succeed(calib)
    assert "--force" in fail(calib, "--rows", 4)
    succeed(calib, "--force")
    assert {name: path.read_bytes() for name, path in files(calib / "activations").items()} == before


def test_no_resume_starts_over(calib, monkeypatch):
    draw = replay.draw_ranges
    monkeypatch.setattr(replay, "draw_ranges", lambda curves, path: (_ for _ in ()).throw(KeyboardInterrupt))
    outcome = run(calib)
    assert outcome.exit_code == 130
    assert "Run the same command again" in outcome.stderr
    monkeypatch.setattr(replay, "draw_ranges", draw)
    steps, seen = replay._run, []
    monkeypatch.setattr(replay, "_run", lambda *a: (seen.append(a), steps(*a))[1])
    succeed(calib, "--no-resume")
    assert len(seen) == 2
