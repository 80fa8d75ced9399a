"""Sinusoidal features of time and of sizes, as diffusers has them."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np


def time_features(
    t: mx.array,
    width: int,
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0,
    scale: float = 1,
    max_period: int = 10000,
) -> mx.array:
    """diffusers' ``get_timestep_embedding`` (arXiv 2006.11239).

    Args:
        t: Timesteps, or other numbers such as a picture's height in pixels [B].
        width: Features of a number; an odd one ends in a zero.
        flip_sin_to_cos: Whether cosines come first, as in all hosts here; not diffusers' default.
        downscale_freq_shift: How much less than half of the width divides the logarithms of frequencies; diffusers'
            default is 1, that of the hosts here 0.
        scale: What angles are multiplied with.
        max_period: Of the slowest frequency, over 2 pi.

    Returns:
        [B,width] float32.
    """
    half = width // 2
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
    exponents = exponents / np.float32(half - downscale_freq_shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)  # a last digit is 1e-4 of an angle of 1000
    angles = scale * (t.astype(mx.float32)[:, None] * mx.array(frequencies)[None])
    parts = [mx.cos(angles), mx.sin(angles)] if flip_sin_to_cos else [mx.sin(angles), mx.cos(angles)]
    if width % 2:
        parts.append(mx.zeros((t.shape[0], 1)))
    return mx.concatenate(parts, axis=-1)
