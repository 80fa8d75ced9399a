"""Structural similarity (Wang et al., IEEE TIP 13(4), 2004, eq. 13), a value a picture.

Windows are Gaussian, 11×11 with a standard deviation of 1.5 pixels, and only those that lie inside the picture count;
each colour channel is taken by itself and the three are averaged. This is scikit-image's ``structural_similarity`` with
``gaussian_weights=True, use_sample_covariance=False, data_range=1, channel_axis=-1``. Papers that average over
luminance alone, or use a flat 7×7 window, report other numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError
from .images import Images, checked_pair

RADIUS = 5
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2  # for a data range of 1

_weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
WINDOW = _weights / _weights.sum()


def _mean(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Gaussian means of [H,W,C] over every window inside it: [H-10,W-10,C]."""
    height, width = x.shape[0] - 2 * RADIUS, x.shape[1] - 2 * RADIUS
    rows = sum(w * x[i : i + height] for i, w in enumerate(WINDOW))
    return np.asarray(sum(w * rows[:, i : i + width] for i, w in enumerate(WINDOW)))


def _similarity(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    mx, my = _mean(x), _mean(y)
    vx, vy, covariance = _mean(x * x) - mx * mx, _mean(y * y) - my * my, _mean(x * y) - mx * my
    index = (2 * mx * my + C1) * (2 * covariance + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
    return float(index.mean())


def ssim(images: Images, reference: Images) -> npt.NDArray[np.float64]:
    """Similarity [B], 1 for identical pictures, of images [B,H,W,3] in [0,1] to a reference of the same shape.

    Raises NumericsError on shapes that differ, pictures under 11 pixels, and values that are not finite or not in
    [0,1].
    """
    images, reference = checked_pair(images, reference, "ssim")
    if min(images.shape[1:3]) <= 2 * RADIUS:
        raise NumericsError(
            f"ssim: pictures of {images.shape[1]}×{images.shape[2]} pixels hold no window of 11×11; compare larger ones"
        )
    return np.array(
        [_similarity(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(images, reference, strict=True)]
    )
