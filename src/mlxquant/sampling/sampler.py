"""The one sampler: Euler steps along the rectified flow, with classifier-free guidance and a callback.

Calibration, generation, evaluation and training-time previews all go through ``sample``; whoever needs the trajectory
passes a callback instead of copying the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from .conditioning import Conditioning
from .guidance import Velocity, check_weight, guided
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
    velocity: Velocity,
    noise: mx.array,
    sigmas: Sigmas,
    text: Conditioning,
    empty: Conditioning,
    cfg: float,
    callback: Callable[[SamplerStep], None] | None = None,
) -> mx.array:
    """Integrate from noise [B,H,W,C] at sigmas[0] to sigmas[-1] and return the latent.

    ``velocity(latent, tokens, pooled, sigma)`` is the model's prediction of ``noise - image``. ``empty`` is the
    conditioning of the empty prompt, one row for each sample. Raises AdapterError on a negative or non-finite cfg.
    """
    check_weight(cfg)
    latent = noise
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        v = guided(velocity, latent, float(sigma), text, empty, cfg)
        if callback is not None:
            callback(SamplerStep(index, float(sigma), latent, v))
        latent = latent + v * float(following - sigma)
        mx.eval(latent)
    return latent
