"""The table of metrics: every row loads from local files, and says what is missing."""

import hashlib
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.errors import ArtifactError, RecipeError
from mlxquant.metrics import inception, lpips
from mlxquant.metrics.catalog import DEFAULT, METRICS, metric
from mlxquant.metrics.psnr import psnr

from support.random_weights import random_tensors

IMAGES = np.random.default_rng(0).random((3, 36, 40, 3)).astype(np.float32)
REFERENCE = np.random.default_rng(1).random((3, 36, 40, 3)).astype(np.float32)


def test_names_and_keys_are_unique():
    assert all(name == row.name for name, row in METRICS.items())
    assert len({row.key for row in METRICS.values()}) == len({row.title for row in METRICS.values()}) == len(METRICS)
    assert {row.needs for row in METRICS.values()} == {"pairs", "prompts", "alone", "sets"}


def test_unknown_name_lists_the_known():
    with pytest.raises(RecipeError, match="no metric 'fad'; there are psnr, ssim, lpips"):
        metric("fad")


@pytest.mark.parametrize("name", DEFAULT)
def test_defaults_need_nothing(name):
    row = metric(name)
    assert row.weights is None
    assert row.network == ""
    assert row.load()(IMAGES, REFERENCE).shape == (3,)


def test_psnr_is_the_project_s_own():
    assert metric("psnr").load() is psnr


@pytest.mark.parametrize("name", [name for name in METRICS if name not in DEFAULT])
def test_missing_weights_are_one_clear_error(name, tmp_path):
    row = metric(name)
    assert row.network == row.weights.network
    assert row.weights.licence
    with pytest.raises(
        ArtifactError, match=f"{tmp_path}.* is missing; get it with 'hf download {row.weights.repository} "
    ):
        row.load(tmp_path)


def save(path, shapes):
    tensors = random_tensors(shapes)
    mx.save_safetensors(str(path), {name: mx.array(value) for name, value in tensors.items()})
    return tensors


def test_lpips_from_a_file(tmp_path):
    """Only with the published heads."""
    tensors = save(tmp_path / "alexnet.safetensors", lpips.shapes(lpips.ALEX))
    with pytest.raises(
        ArtifactError, match=r"its heads are not those of LPIPS v0\.1; get the published ones with 'hf download"
    ):
        metric("lpips").load(tmp_path)
    heads = hashlib.sha256(b"".join(tensors[f"lin{index}.model.1.weight"].tobytes() for index in range(5))).hexdigest()
    trunk = replace(lpips.ALEX, heads=heads)
    scores = lpips.load(trunk, tmp_path)(IMAGES, REFERENCE)
    assert scores.shape == (3,)
    np.testing.assert_array_equal(scores, lpips.load(trunk, tmp_path / "alexnet.safetensors")(IMAGES, REFERENCE))


def test_inception_from_another_file_makes_no_fid(tmp_path):
    save(tmp_path / "mine.safetensors", inception.shapes())
    networks = []
    for name, expected in (("fid", "frechet_distance"), ("kid", "kid")):
        score = metric(name).load(tmp_path / "mine.safetensors")
        assert (score.name, score.features) == (expected, "Inception-v3 (mine.safetensors)")
        networks.append(inception.load(tmp_path / "mine.safetensors"))
    assert networks[0] is networks[1]  # read once for both
    features = score.encode([IMAGES[:1], REFERENCE[:1]])
    distance = score.between(features, features[::-1])
    assert (distance.samples, distance.reference_samples, distance.name) == (2, 2, "kid")
