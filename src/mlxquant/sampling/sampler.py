"""The one sampler: a scheduler's steps, with a callback. What it follows is guided already, see ``guidance``.

Calibration, generation, evaluation and training-time previews all go through ``sample``; whoever needs the trajectory
passes a callback instead of copying the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .parameterizations import Parameterization
from .walk import Walk


@dataclass(frozen=True)
class SamplerStep:
    """What a callback sees before each step.

    Attributes:
        index: Of the step, from 0.
        sigma: The noise level in [0,1], see ``schedules``.
        latent: What the model reads there [B,H,W,C], about unit variance.
        velocity: The guided prediction, whatever the model predicts: a flow's velocity, or noise, v or the image.
    """

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
    predict: Callable[[mx.array, float], mx.array],
    noise: mx.array,
    walk: Walk,
    parameterization: Parameterization = Parameterization(),  # noqa: B008  # frozen
    callback: Callable[[SamplerStep], None] | None = None,
    seeds: Sequence[int] | None = None,
    image: mx.array | None = None,
) -> mx.array:
    """Walk from noise, or from an image with noise, to an image.

    Args:
        predict: Called with what the model reads [B,H,W,C] and the noise level; returns the guided prediction, without
            a learned variance.
        noise: Standard normal [B,H,W,C].
        walk: A scheduler's steps.
        parameterization: What is predicted.
        callback: Shown each step before it is taken.
        seeds: Of what steps add, one a sample, and so each sample's own whatever it is drawn with; None where they add
            nothing.
        image: Latents that the walk begins with, noised to the level of its first step; None for noise alone.

    Returns:
        The latent [B,H,W,C] at the end of the walk.

    Raises:
        AdapterError: Steps add noise and there are no seeds, or a prediction says nothing at a level of the walk.
    """
    latent = walk.begin(noise, image)
    keys = [mx.random.key(seed % 2**64) for seed in seeds or ()]
    predictions = list[mx.array]()  # the last one first
    for index, level in enumerate(walk.levels[:-1].tolist()):
        shown = walk.read(index, latent)
        prediction = predict(shown, level)
        if callback is not None:
            callback(SamplerStep(index, level, shown, prediction))
        alpha, sigma = float(walk.alphas[index]), float(walk.sigmas[index])
        now = parameterization.convert(prediction, shown, alpha, sigma, walk.kind)
        predictions = [now, *predictions[: walk.memory]]
        fresh: mx.array | None = None
        if walk.fresh[index] and keys:
            pairs = [mx.random.split(key) for key in keys]
            keys = [pair[0] for pair in pairs]
            fresh = mx.stack([mx.random.normal(latent.shape[1:], key=pair[1]) for pair in pairs])
        latent = walk.step(index, latent, predictions, fresh)
        mx.eval(latent)
    return latent
