"""Training sees no held-out caption, resumes exactly, and publishes what the adapter loads."""

import numpy as np
import pytest
from click.testing import CliRunner

from mlxquant.files.checked import read_tensors
from mlxquant.models import train_shapes
from mlxquant.models.mmdit.config import MMDiTConfig
from mlxquant.models.shapes.adapter import WEIGHTS
from mlxquant.models.shapes.scenes import sample_scene
from mlxquant.models.train_shapes import batch

from support.tiny_pictures import TINY


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setattr(train_shapes, "CONFIG", MMDiTConfig.from_dict(TINY))


def train(folder, *options):
    arguments = ["--out", folder, "--steps", 6, "--batch-size", 4, "--save-every", 2, *options]
    return CliRunner().invoke(train_shapes.main, [str(a) for a in arguments])


def test_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    assert train(tmp_path / "whole").exit_code == 0
    save, saved = train_shapes.TrainingRun.save, []

    def save_once(self, trees, **more):
        save(self, trees, **more)
        saved.append(self.step)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_shapes.TrainingRun, "save", save_once)
    outcome = train(tmp_path / "killed")
    assert outcome.exit_code == 130
    assert saved == [2]
    monkeypatch.setattr(train_shapes.TrainingRun, "save", save)
    assert train(tmp_path / "killed").exit_code == 0
    for name in (WEIGHTS, "training.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    _, header = read_tensors(tmp_path / "whole" / WEIGHTS, "mmdit-shapes")
    assert (
        header["command"]
        == "python -m mlxquant.models.train_shapes --steps 6 --batch-size 4 --learning-rate 0.002 --seed 0"
    )
    outcome = train(tmp_path / "whole", "--seed", 1)
    assert outcome.exit_code == 1
    assert "other settings" in outcome.stderr


def test_batches_depend_on_seed_and_step_alone():
    first, again, next_step = batch(0, 5, 4), batch(0, 5, 4), batch(0, 6, 4)
    for a, b, c in zip(first, again, next_step, strict=True):
        np.testing.assert_array_equal(np.array(a), np.array(b))
        assert not np.array_equal(np.array(a), np.array(c))


def test_held_out_captions_are_never_drawn(monkeypatch):
    drawn = []
    draw = train_shapes.draw
    monkeypatch.setattr(train_shapes, "draw", lambda scene, rng: drawn.append(scene) or draw(scene, rng))
    for step in range(20):
        batch(0, step, 32)
    assert len(drawn) == 640
    assert not [scene for scene in drawn if scene.held_out]
    rng = np.random.default_rng(0)
    assert sum(sample_scene(rng).held_out for _ in range(640)) > 40  # it is the filter that keeps them out
