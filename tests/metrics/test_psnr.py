"""PSNR as published: per image, then averaged by the caller."""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.metrics.psnr import psnr

IMAGES = np.random.default_rng(0).random((3, 8, 8, 3))


def test_known_errors():
    reference = np.zeros((2, 4, 4, 3))
    images = np.stack([np.full((4, 4, 3), 0.1), np.full((4, 4, 3), 1.0)])
    np.testing.assert_allclose(psnr(images, reference), [20, 0], atol=1e-12)


def test_identical_images_reach_the_ceiling():
    np.testing.assert_array_equal(psnr(IMAGES, IMAGES), [100, 100, 100])


def test_bad_images_are_refused():
    with pytest.raises(NumericsError, match="equal shape"):
        psnr(IMAGES, IMAGES[:2])
    with pytest.raises(NumericsError, match="NaN"):
        psnr(IMAGES * np.nan, IMAGES)
