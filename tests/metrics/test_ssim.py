"""SSIM against its definition, window by window."""

import numpy as np
import pytest

from mlxquant.errors import NumericsError
from mlxquant.metrics.ssim import ssim

RNG = np.random.default_rng(0)
IMAGES = RNG.random((2, 15, 13, 3))
REFERENCE = np.clip(IMAGES + 0.2 * RNG.standard_normal(IMAGES.shape), 0, 1)


def by_definition(x, y):
    """Wang et al. 2004, eq. 13, as written."""
    one = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(one, one) / np.outer(one, one).sum()
    values = []
    for c in range(3):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                a, b = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb, vab = (
                    (window * (a - ma) ** 2).sum(),
                    (window * (b - mb) ** 2).sum(),
                    (window * (a - ma) * (b - mb)).sum(),
                )
                values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


def test_definition():
    np.testing.assert_allclose(
        ssim(IMAGES, REFERENCE), [by_definition(x, y) for x, y in zip(IMAGES, REFERENCE, strict=True)], rtol=1e-10
    )


def test_identical_pictures_are_at_one_and_single_precision_suffices():
    np.testing.assert_allclose(ssim(IMAGES, IMAGES), 1, rtol=1e-12)
    np.testing.assert_allclose(
        ssim(IMAGES.astype(np.float32), REFERENCE.astype(np.float32)), ssim(IMAGES, REFERENCE), rtol=1e-5
    )
    black = np.zeros((1, 12, 12, 3))
    np.testing.assert_allclose(ssim(black, black), 1)


def test_small_or_unequal_pictures_are_refused():
    with pytest.raises(NumericsError, match="10×11 pixels hold no window"):
        ssim(np.zeros((1, 10, 11, 3)), np.zeros((1, 10, 11, 3)))
    with pytest.raises(NumericsError, match="equal shape"):
        ssim(IMAGES, REFERENCE[:, :12])
