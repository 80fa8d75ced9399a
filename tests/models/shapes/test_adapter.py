"""The embedded model keeps the adapter contract, and its weights are what they claim to be."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxquant
from mlxquant.errors import AdapterError, ArtifactError
from mlxquant.files.checked import read_tensors
from mlxquant.models.catalog import pretrained
from mlxquant.models.shapes import adapter as mmdit_shapes
from mlxquant.models.shapes.adapter import MMDiTShapes, to_images, to_latent
from mlxquant.models.shapes.captions import LENGTH, tokenize
from mlxquant.models.train_shapes import CONFIG

from support.adapter_contract import AdapterContract


class TestMMDiTShapes(AdapterContract):
    @classmethod
    def make_adapter(cls):
        return MMDiTShapes.pretrained()

    def whole(self, adapter, latent, conditioning, t):
        return adapter.module(latent, **conditioning, t=t)


def test_unshuffle_is_undone():
    images = mx.random.uniform(shape=(2, 32, 32, 3))
    np.testing.assert_allclose(np.array(to_images(to_latent(images))), np.array(images), atol=1e-6)


def test_pixels_stay_together():
    """A latent pixel holds the 2 x 2 block of image pixels at its place."""
    images = np.zeros((1, 4, 4, 3), np.float32)
    images[0, 2:, :2] = 1
    latent = np.array(to_latent(mx.array(images)))
    assert (latent[0, 1, 0] == 1).all()
    assert (np.delete(latent.reshape(4, 12), 2, axis=0) == -1).all()


def test_unknown_model_lists_the_known_ones():
    with pytest.raises(AdapterError, match="mmdit-shapes"):
        pretrained("sd9")


def test_captions_become_tokens_and_the_empty_prompt_is_padding():
    ids = tokenize("a large red circle at left on white background")
    assert len(ids) == LENGTH
    assert len(set(ids[:9])) == 9
    assert ids[9:] == [0, 0, 0]
    assert tokenize("  ") == [0] * LENGTH
    with pytest.raises(AdapterError, match="cannot draw 'a tabby cat on a table'"):
        tokenize("a tabby cat on a table")


def test_shipped_weights_fit_in_ten_megabytes_and_tell_their_origin():
    path = Path(mlxquant.__file__).parent / "assets" / mmdit_shapes.WEIGHTS
    assert path.stat().st_size <= 10_000_000
    arrays, header = read_tensors(path, "mmdit-shapes")
    assert header["config"] == CONFIG.to_dict()
    assert header["command"].startswith("python -m mlxquant.models.train_shapes --steps")
    assert {"seed", "steps"} <= set(header)
    assert all(value.dtype == mx.float16 for value in arrays.values())


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    path = Path(mlxquant.__file__).parent / "assets" / mmdit_shapes.WEIGHTS
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / mmdit_shapes.WEIGHTS).write_bytes(damaged)
    monkeypatch.setattr(mmdit_shapes, "files", lambda _: tmp_path)
    with pytest.raises(ArtifactError, match="checksum"):
        MMDiTShapes.pretrained()


def test_blank_has_the_parameters_of_the_pretrained_model():
    adapter = MMDiTShapes.pretrained()
    blank = MMDiTShapes.blank(adapter.describe())
    shapes = {name: value.shape for name, value in tree_flatten(adapter.module.parameters())}
    assert {name: value.shape for name, value in tree_flatten(blank.module.parameters())} == shapes
