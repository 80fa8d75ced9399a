"""Distances of sets: batches, names, sample sizes and warnings."""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.metrics import sets

RNG = np.random.default_rng(0)
IMAGES, REFERENCE = RNG.random((10, 4, 4, 3)), RNG.random((7, 4, 4, 3))


def encode(images):
    return images.mean(axis=(1, 2))


METRICS = [
    sets.frechet(encode, "means", False),
    sets.kernel_inception(encode, "means"),
    sets.clip_discrepancy(encode, "means"),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_batches_and_sample_sizes(metric):
    whole = metric(IMAGES, REFERENCE)
    assert (whole.samples, whole.reference_samples, whole.features) == (10, 7, "means")
    assert metric((IMAGES[i : i + 3] for i in range(0, 10, 3)), iter([REFERENCE])) == whole
    assert metric.between(encode(IMAGES), encode(REFERENCE)) == whole
    assert np.isfinite(whole.value)


def test_only_inception_with_its_weights_makes_a_fid():
    assert sets.frechet(encode, "Inception", True)(IMAGES, REFERENCE).name == "fid"
    assert sets.frechet(encode, "means", False)(IMAGES, REFERENCE).name == "frechet_distance"


def test_few_pictures_are_warned_of():
    assert "cmmd from 7 pictures, under 2048" in METRICS[2](IMAGES, REFERENCE).warning
    assert sets.SetDistance("fid", 1.0, 2048, 5000, "Inception").warning is None
    assert "2047 pictures" in sets.SetDistance("fid", 1.0, 5000, 2047, "Inception").warning


def test_no_pictures_and_one_picture():
    for metric in METRICS:
        with pytest.raises(NumericsError, match="no pictures"):
            metric([], REFERENCE)
    for metric in METRICS[:2]:
        with pytest.raises(NumericsError, match="found one"):
            metric(IMAGES[:1], REFERENCE)
    assert np.isfinite(METRICS[2](IMAGES[:1], REFERENCE).value)
