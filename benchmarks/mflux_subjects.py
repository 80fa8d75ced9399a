"""The models that ``mflux_peers.py`` draws with, each with its prompts, its calls and its noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import mlxquant as mq  # before mlx, so that MLX gets a fast BLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mflux.models.common.config.config import Config
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition
from mflux.models.z_image.weights.z_image_weight_definition import ZImageWeightDefinition
from mlx.utils import tree_map_with_path

import recorded_flux
import z_image_shapes
from mlxquant.metrics.attributes import shares
from mlxquant.models.shapes import scenes
from mlxquant.numerics.arrays import Array

Call = dict[str, Any]
SEEDS = {"calibration": 0, "evaluation": 10_000}
MARGIN = 3  # pixels between a shape and where a background counts as flat; drawings jitter by less than one


class Subject(Protocol):
    """A transformer of mflux in its pipeline.

    Attributes:
        definition: mflux's definition of the model's components.
        draws: Whether its latents are pictures of what was asked for.
    """

    definition: Any
    draws: bool

    def blank(self) -> nn.Module:
        """A transformer with any weights."""

    def filled(self) -> nn.Module:
        """The transformer with the weights that it has before it is quantized."""

    def prompts(self, purpose: str, count: int) -> list[mq.Prompt]: ...

    def noise(self, prompt: mq.Prompt) -> mx.array:
        """Where drawing begins."""

    def calls(self, prompt: mq.Prompt, latents: mx.array, step: int, steps: int) -> list[Call]:
        """The calls of the transformer in a step."""

    def velocity(self, wrote: Sequence[mx.array]) -> mx.array:
        """What the sampler takes of what these calls return."""


class Shapes:
    """The Z-Image of ``z_image_shapes.py``, guided as ``mmdit-shapes`` is: 1 for the prompt more, as mflux counts.

    Args:
        weights: Of ``train_z_image_shapes.py``; None for random ones.
    """

    definition = ZImageWeightDefinition
    GUIDANCE = 1.0

    def __init__(self, weights: Path | None):
        self.draws = weights is not None
        if weights is not None:
            self.model = z_image_shapes.load(weights)
        else:
            mx.random.seed(0)
            self.model = z_image_shapes.ZImageShapes()
            self.model.update(tree_map_with_path(_noisy, self.model.parameters()))

    def blank(self) -> nn.Module:
        return z_image_shapes.transformer()

    def filled(self) -> nn.Module:
        return self.model.transformer

    def prompts(self, purpose: str, count: int) -> list[mq.Prompt]:
        texts = scenes.captions(held_out=purpose == "evaluation", count=count)
        return [mq.Prompt(SEEDS[purpose] + number, text) for number, text in enumerate(texts)]

    def noise(self, prompt: mq.Prompt) -> mx.array:
        shape = (z_image_shapes.CHANNELS, 1, z_image_shapes.LATENT, z_image_shapes.LATENT)
        return mx.random.normal(shape, key=mx.random.key(prompt.seed))

    def calls(self, prompt: mq.Prompt, latents: mx.array, step: int, steps: int) -> list[Call]:
        sigmas = levels(steps)
        shared = {"timestep": 1 - sigmas[step].reshape(1), "x": latents, "sigmas": sigmas}
        return [{**shared, "cap_feats": self.model.read(text)} for text in (prompt.text, "")]

    def velocity(self, wrote: Sequence[mx.array]) -> mx.array:
        prompted, empty = wrote
        return prompted + self.GUIDANCE * (prompted - empty)

    def pictures(self, latents: Sequence[mx.array]) -> Array:
        """Pictures [B,32,32,3], which may stick out of [0,1]."""
        return z_image_shapes.pixels(mx.stack(list(latents))[:, :, 0].transpose(0, 2, 3, 1))


class FluxPair:
    """FLUX.1 of mflux at its real width, one block of each kind, with random weights."""

    definition = FluxWeightDefinition
    draws = False
    PIXELS = 256

    def blank(self) -> nn.Module:
        return recorded_flux.transformer()

    filled = blank

    def prompts(self, purpose: str, count: int) -> list[mq.Prompt]:
        return [mq.Prompt(SEEDS[purpose] + number, "noise") for number in range(count)]

    def noise(self, prompt: mq.Prompt) -> mx.array:
        tokens = (self.PIXELS // 16) ** 2
        return mx.random.normal((1, tokens, 64), key=mx.random.key(prompt.seed))

    def calls(self, prompt: mq.Prompt, latents: mx.array, step: int, steps: int) -> list[Call]:
        size = {"height": self.PIXELS, "width": self.PIXELS}
        tokens, pooled = mx.random.split(mx.random.key(prompt.seed + 5_000))
        return [
            {
                "t": step,
                "config": Config(ModelConfig.schnell(), num_inference_steps=steps, **size),
                "hidden_states": latents,
                "prompt_embeds": 0.2 * mx.random.normal((1, recorded_flux.TOKENS, 4096), key=tokens),
                "pooled_prompt_embeds": mx.random.normal((1, 768), key=pooled),
            }
        ]

    def velocity(self, wrote: Sequence[mx.array]) -> mx.array:
        return wrote[0]


def levels(steps: int) -> mx.array:
    """Noise levels [steps + 1], evenly from 1 to 0, as mflux's linear scheduler has them without a shift."""
    return mx.linspace(1, 0, steps + 1)


def flat(caption: str) -> Array:
    """Where a picture of a caption has nothing but background, boolean [32,32]."""
    picture = scenes.draw(scenes.parse(caption))
    shape = (picture != picture[0, 0]).any(-1)
    padded = np.pad(shape, MARGIN)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * MARGIN + 1, 2 * MARGIN + 1))
    return np.logical_not(windows.any((-1, -2)))


def deviation(pictures: Array, places: Sequence[Array]) -> list[float]:
    """The standard deviation of each picture [B,H,W,3] over its flat places [H,W], in 255ths: the root of its mean
    square over colours.
    """
    return [
        float(255 * np.sqrt(picture[place].var(axis=0, dtype=np.float64).mean()))
        for picture, place in zip(pictures, places, strict=True)
    ]


def obeyed(pictures: Array, captions: Sequence[str]) -> float:
    """The share of what captions ask for that pictures show."""
    clipped = np.clip(pictures, 0, 1)
    marks = [scenes.check(one, scenes.parse(caption)) for one, caption in zip(clipped, captions, strict=True)]
    share, asked = shares(marks)
    return float(np.average(share, weights=asked))


def _noisy(path: str, value: mx.array) -> mx.array:
    """Gains and tokens that MLX makes all the same get some noise."""
    return value + 0.05 * mx.random.normal(value.shape)
