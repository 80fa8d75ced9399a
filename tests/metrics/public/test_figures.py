"""Figures that need no network equal scikit-image's and SciPy's."""

import numpy as np
import pytest

from mlxquant.metrics.frechet import Gaussian, frechet_distance
from mlxquant.metrics.psnr import psnr
from mlxquant.metrics.ssim import ssim

pytestmark = pytest.mark.metrics

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 41, 29, 3))
REFERENCE = np.clip(IMAGES + 0.1 * RNG.standard_normal(IMAGES.shape), 0, 1)


def test_ssim(public):
    expected = [
        public.metrics.structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
        )
        for x, y in zip(IMAGES, REFERENCE, strict=True)
    ]
    np.testing.assert_allclose(ssim(IMAGES, REFERENCE), expected, rtol=1e-10)


def test_psnr(public):
    expected = [
        public.metrics.peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(IMAGES, REFERENCE, strict=True)
    ]
    np.testing.assert_allclose(psnr(IMAGES, REFERENCE), expected, rtol=1e-12)


def test_frechet_distance(public):
    x, y = RNG.standard_normal((200, 24)) @ RNG.standard_normal((24, 24)), RNG.standard_normal((150, 24)) + 0.3
    (m1, c1), (m2, c2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    expected = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * public.linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(Gaussian.from_covariance(m1, c1), Gaussian.from_covariance(m2, c2)) == pytest.approx(
        expected, rel=1e-9
    )
