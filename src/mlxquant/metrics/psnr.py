"""Peak signal-to-noise ratio, the way the literature on quantized diffusion models reports it: per image over [0,1], then the mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import NumericsError

CEILING_DB = 100.0  # stands for identical images, whose ratio is infinite


def psnr(images: npt.NDArray[Any], reference: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Decibels [B] of images [B,H,W,3] in [0,1] against a reference of the same shape, at most 100.

    Raises NumericsError on shapes that differ and on values that are not finite.
    """
    if images.shape != reference.shape or images.ndim != 4:
        raise NumericsError(f"psnr: expected two batches [B,H,W,C] of equal shape, found {images.shape} and {reference.shape}")
    if not (np.isfinite(images).all() and np.isfinite(reference).all()):
        raise NumericsError("psnr: an image holds NaN or infinite values")
    error = ((images.astype(np.float64) - reference.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return np.minimum(-10 * np.log10(np.maximum(error, 10 ** (-CEILING_DB / 10))), CEILING_DB)
