"""Hosts that draw in latents: a network of ours, and around it text encoders and an autoencoder from a source.

The network is what is quantized, in the precision of its file, and computes in float32 between its layers. What stands
around it is loaded when it is first needed, and shared by adapters that differ in the network alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..files import schema
from ..files.schema import Schema
from ..sampling.conditioning import Conditioning
from ..sampling.picture_size import LARGEST, PictureSize, plain
from ..sampling.prompts import Prompt, packaged_prompts
from .checkpoints.open import open_source
from .checkpoints.source import Source
from .diffusion import DiffusionAdapter
from .parts.autoencoder import AutoencoderKL
from .parts.autoencoder_files import load_autoencoder, pixels_of
from .prompt_memory import PromptMemory
from .stages import Stage


class Components(ABC):
    """Text encoders and autoencoder of one place. An encoder is in memory only while it encodes.

    Attributes:
        place: The folder, file or hub id that they are loaded from.
        text: What encodes prompts: the model's own encoders, or whatever is put here.
    """

    def __init__(self, place: str):
        self.place = place
        self.text: Callable[[list[str]], Conditioning] = self._encode
        self._memory = PromptMemory()

    @abstractmethod
    def at(self, place: str) -> Self:
        """The same of another place."""

    @abstractmethod
    def _encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of prompts by the model's own encoders, a row each."""

    def _opened(self) -> Source:
        """The source that the place is."""
        return open_source(self.place)

    def _decoder(self) -> AutoencoderKL:
        """The autoencoder with its weights."""
        return load_autoencoder(self.source, "vae", mx.float32)

    @cached_property
    def source(self) -> Source:
        """Where they are; raises as ``open_source`` does."""
        return self._opened()

    def encoded(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts, in float32 what is floating; each prompt is encoded once."""
        found = {**self._memory.encoded(prompts, self.text)}
        return Conditioning(**{name: _single(value) for name, value in found.items()})

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        """Raises as ``load_autoencoder`` does."""
        return self._decoder()


def _single(value: mx.array) -> mx.array:
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


SIDES = schema.either(schema.array_of(schema.whole(1, LARGEST), 2, 2), schema.whole(1, LARGEST))


def described(config: Schema) -> Schema:
    """What ``LatentAdapter.describe`` gives, of a network with such a config."""
    return schema.entries(
        {
            "config": config,
            "scheduler": schema.table_of(schema.anything),
            "size": SIDES,
            "pixels": schema.whole(1, 64),
            "dtype": schema.floating,
        }
    )


class LatentAdapter(DiffusionAdapter):
    """What such hosts have in common. A host sets the attributes, and ``latent_shape``.

    Attributes:
        components: What stands around the network.
        pixels: Of a picture's side, for one of a latent.
        dtype: Of the network's weights.
        config: Of the network.
        sampling: What scheduler_config.json says.
    """

    batch = 2
    samples = 64
    rows = 2
    components: Components
    pixels: int = 8
    dtype: mx.Dtype
    config: Any
    sampling: dict[str, Any]
    _stages: tuple[Stage, ...]

    def twin(self) -> Self:
        twin = super().twin()
        twin.components = self.components
        return twin

    def describe(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "scheduler": self.sampling,
            "size": plain(self.size),
            "pixels": self.pixels,
            "dtype": str(self.dtype).rpartition(".")[2],
        }

    @property
    def place(self) -> str:
        return self.components.place

    @place.setter
    def place(self, place: str) -> None:
        self.components = self.components.at(place or self.hub_ids[0])

    @property
    def size(self) -> PictureSize:
        return self.latent_shape[1] * self.pixels, self.latent_shape[0] * self.pixels

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.components.encoded(prompts)

    def generate(self, *arguments: Any, **options: Any) -> mx.array:
        pixels_of(self.components.source, "vae", self.latent_shape[2])  # missed now, not after the last step
        return super().generate(*arguments, **options)

    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        pictures = self.components.autoencoder.decode(latent).astype(mx.float32)
        return np.array(mx.clip(pictures / 2 + 0.5, 0, 1), np.float32)

    def latents(self, pictures: npt.NDArray[np.float32]) -> mx.array:
        return self.components.autoencoder.encode(mx.array(pictures) * 2 - 1).astype(mx.float32)

    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        return packaged_prompts(self.name, purpose, count, seed)
