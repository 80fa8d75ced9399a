"""Our own host of Stable Diffusion 3 Medium and DiffusionKit's, from the same files: the same picture, but for three
things that DiffusionKit does otherwise than the model was trained.
"""

import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlxquant as mq
from mlxquant.files.parameters import load_parameters
from mlxquant.layers.tree import parameters
from mlxquant.models.catalog import find_model
from mlxquant.models.diffusionkit.files import HUB
from mlxquant.models.sd3.adapter import SD3Medium

pytestmark = pytest.mark.diffusionkit
PROMPTS = ["a cat on a mat", "two red cubes"]


@pytest.fixture(scope="module")
def theirs(sd3_folder):
    return mq.load(f"diffusionkit:{sd3_folder}", size=64)


@pytest.fixture
def ours(sd3_folder, theirs):
    """With the text of DiffusionKit's host, whose T5 reads 512 tokens and not 256."""
    model = mq.load(sd3_folder, size=64)
    model.adapter.components.text = theirs.adapter.components._encode
    return model


def picture(model):
    return np.array(model.generate(PROMPTS[0], seed=5, steps=3, cfg=4.0), np.int32)


class TimeOf(nn.Module):
    """DiffusionKit's embedding of time, whose features are float16: 1000 and 999.6 are the same to it."""

    def __init__(self, embedder):
        super().__init__()
        self.mlp, self._embedder = embedder.mlp, embedder

    def __call__(self, t):
        return self._embedder(t)[:, 0, 0]


def test_its_files_are_read_by_both(sd3_folder, hub_cache, ours):
    assert find_model(str(sd3_folder)) == ("sd3-medium", str(sd3_folder))
    assert find_model(HUB) == ("sd3-medium", HUB)
    assert find_model(f"diffusionkit:{sd3_folder}") == ("sd3-medium-diffusionkit", str(sd3_folder))
    by_id = mq.load(HUB, size=64)
    assert by_id.adapter.fingerprint == ours.adapter.fingerprint
    assert by_id.generate(PROMPTS[0], steps=1).size == (64, 64)


def test_the_same_picture_from_the_same_weights(ours, theirs):
    """The exact GELU and no biases of keys, as DiffusionKit has it, and its time."""
    adapter = ours.adapter
    config = replace(adapter.config, gelu="exact", key_bias=False)
    same = SD3Medium(config, adapter.components, 64, adapter.dtype)
    weights = {name: v for name, v in parameters(adapter.module).items() if not name.endswith("k_proj.bias")}
    load_parameters(same.module, weights, "test")
    same.module.t_embedder = TimeOf(theirs.adapter.module.t_embedder)
    assert np.abs(picture(mq.Model(same)) - picture(theirs)).max() <= 1


def test_what_it_does_otherwise_changes_little(ours, theirs):
    off = np.abs(picture(ours) - picture(theirs))
    assert 0 < off.mean() < 4


def test_the_same_text(sd3_folder, theirs):
    """Of CLIP; T5's tokens see their padding, of which there is more there."""
    ours, other = (model.adapter.encode(PROMPTS) for model in (mq.load(sd3_folder), theirs))
    assert (ours["tokens"].shape, other["tokens"].shape) == ((2, 333, 4096), (2, 589, 4096))
    np.testing.assert_allclose(np.array(ours["tokens"])[:, :77], np.array(other["tokens"])[:, :77], atol=2e-5)
    np.testing.assert_allclose(np.array(ours["pooled"]), np.array(other["pooled"]), atol=2e-5)


def test_a_model_that_diffusionkits_host_quantized_before_is_ours_now(theirs, tmp_path, monkeypatch):
    """Releases up to 0.2.0 called it sd3-medium; its parameters have the same names."""
    monkeypatch.setattr(type(theirs.adapter), "name", "sd3-medium")
    quantized = mq.quantize(theirs, mq.calibrate(theirs, prompts=1, steps=2), "rtn-w4a8")
    folder = quantized.save(tmp_path / "q")
    again = mq.load(folder)
    assert type(again.adapter) is SD3Medium
    again.adapter.components.text = theirs.adapter.components._encode
    again.adapter.module.t_embedder = TimeOf(quantized.adapter.module.t_embedder)
    off = np.abs(picture(again) - picture(quantized))
    assert off.max() <= 8  # what is rounded falls on the other side here and there
    assert off.mean() < 1


def test_ours_is_exported_for_diffusionkit(sd3_folder, tmp_path):
    """From the folder or from the file alone: every tensor of the original comes back."""
    original = mx.load(str(sd3_folder / "sd3_medium.safetensors"))
    (tmp_path / "alone").mkdir()
    shutil.copy(sd3_folder / "sd3_medium.safetensors", tmp_path / "alone" / "any.safetensors")
    for number, place in enumerate((sd3_folder, tmp_path / "alone" / "any.safetensors")):
        facts = mq.export(mq.load(place, size=64), tmp_path / str(number), "diffusionkit")
        assert any("4 biases of keys written, which DiffusionKit leaves out" in note for note in facts["notes"])
        found = mx.load(str(tmp_path / str(number) / "sd3_medium.safetensors"))
        assert found.keys() == original.keys()
        assert all(mx.array_equal(value, original[name]).item() for name, value in found.items())
