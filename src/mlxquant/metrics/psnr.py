"""Peak signal-to-noise ratio, the way the literature on quantized diffusion models reports it: per image over [0,1],
then the mean.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .images import Images, checked_pair

CEILING_DB = 100.0  # stands for identical images, whose ratio is infinite


def psnr(images: Images, reference: Images) -> npt.NDArray[np.float64]:
    """Decibels [B] of images [B,H,W,3] in [0,1] against a reference of the same shape, at most 100.

    Raises NumericsError on shapes that differ and on values that are not finite or not in [0,1].
    """
    images, reference = checked_pair(images, reference, "psnr")
    error = ((images.astype(np.float64) - reference.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return np.minimum(-10 * np.log10(np.maximum(error, 10 ** (-CEILING_DB / 10))), CEILING_DB)
