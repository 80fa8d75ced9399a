"""A training run in a folder: trees come back at their step, bit for bit, and only to the run that kept them."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError
from mlxquant.files import training_run
from mlxquant.files.training_run import TrainingRun, changes

TREES = {"model": {"layers": [{"w": mx.array([1.5, -2.0])}, {"w": mx.array([[3.0]])}]}, "average": {"w": mx.array(1)}}
FACTS = {"model": {"width": 4}, "training": {"seed": 0, "shape": (2, 3)}}


def test_trees_come_back_at_their_step(tmp_path):
    run = TrainingRun(tmp_path, FACTS, 7)
    run.save(TREES)
    again = TrainingRun(tmp_path, FACTS)
    found = again.resume()
    assert again.step == 7
    assert sorted(found) == ["average", "model"]
    assert sorted(found["model"]) == ["layers.0.w", "layers.1.w"]
    np.testing.assert_array_equal(np.array(found["model"]["layers.0.w"]), [1.5, -2.0])
    before = run.checkpoint.read_bytes()
    again.save(TREES)
    assert run.checkpoint.read_bytes() == before


def test_a_new_folder_starts_at_nothing(tmp_path):
    run = TrainingRun(tmp_path, FACTS)
    assert (run.resume(), run.step) == ({}, 0)


def test_other_settings_are_named(tmp_path):
    TrainingRun(tmp_path, FACTS, 1).save(TREES)
    with pytest.raises(ArtifactError, match=r"other settings \(training\.seed 0, now 1\); choose another folder"):
        TrainingRun(tmp_path, {**FACTS, "training": {"seed": 1, "shape": (2, 3)}}).resume()
    assert changes({"a": 1}, {"b": 2}) == "a 1, now None, b None, now 2"


def test_it_is_due_by_the_clock(tmp_path, monkeypatch):
    run = TrainingRun(tmp_path, FACTS)
    assert not run.due
    monkeypatch.setattr(training_run, "INTERVAL", 0)
    assert run.due
