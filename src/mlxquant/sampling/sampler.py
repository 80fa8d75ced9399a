"""The one sampler: Euler steps along the rectified flow, with a callback. What it follows is guided already, see
``guidance``.

Calibration, generation, evaluation and training-time previews all go through ``sample``; whoever needs the trajectory
passes a callback instead of copying the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .schedules import Sigmas


@dataclass(frozen=True)
class SamplerStep:
    """What a callback sees before each Euler step: the latent [B,H,W,C] at ``sigma`` and the guided velocity there."""

    index: int
    sigma: float
    latent: mx.array
    velocity: mx.array


def seeded_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> mx.array:
    """Standard normal noise [B,H,W,C] float32, one seed a sample, drawn as DiffusionKit draws it (NumPy, channels
    first).
    """
    h, w, c = shape
    draws = [np.random.RandomState(seed % 2**32).standard_normal((c, h, w)).transpose(1, 2, 0) for seed in seeds]
    return mx.array(np.stack(draws).astype(np.float32))


def sample(
    velocity: Callable[[mx.array, float], mx.array],
    noise: mx.array,
    sigmas: Sigmas,
    callback: Callable[[SamplerStep], None] | None = None,
) -> mx.array:
    """Integrate from noise [B,H,W,C] at sigmas[0] to sigmas[-1] and return the latent.

    ``velocity(latent, sigma)`` is the guided prediction of ``noise - image``.
    """
    latent = noise
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        v = velocity(latent, float(sigma))
        if callback is not None:
            callback(SamplerStep(index, float(sigma), latent, v))
        latent = latent + v * float(following - sigma)
        mx.eval(latent)
    return latent
