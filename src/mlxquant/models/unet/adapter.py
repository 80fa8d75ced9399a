"""``sd15``: Stable Diffusion 1.5 as a host, and what has its pipeline: 1.4, 2.1, fine-tunes.

Weights come from a folder of the diffusers layout, from the hub, or, of Stable Diffusion 1, from an original single
file. The UNet keeps the precision of its file and computes in float32 between its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import mlx.core as mx

from ...errors import AdapterError
from ...grids.time import Clock
from ...sampling.picture_size import PictureSize, picture_size
from ...sampling.scheduler_config import parameterization_from_config, scheduler_from_config
from ..edges import Edge
from ..latent import LatentAdapter, described
from ..parts.autoencoder_files import pixels_of
from ..parts.loading import fill, in_place
from .chain import unet_edges, unet_role, unet_stages
from .components import CLIPComponents
from .config import CONFIG, HUB_IDS, UNetConfig
from .network import UNet

HUB, GONE = HUB_IDS
SIDE = 64  # of latents where the UNet's config does not say


class StableDiffusion(LatentAdapter):
    """A UNet2DCondition and what stands around it. 50 steps and guidance 7.5 are the defaults of diffusers'
    StableDiffusionPipeline, which the model cards of 1.5 and 2.1 leave as they are.
    """

    name = "sd15"
    STRUCTURE = described(CONFIG)
    hub_ids = HUB_IDS
    cfg = 7.5
    steps = 50

    def __init__(
        self,
        config: UNetConfig,
        scheduler: Mapping[str, Any],
        components: CLIPComponents,
        size: int | PictureSize,
        pixels: int = 8,
        dtype: mx.Dtype = mx.float32,
    ):
        """Without weights.

        Args:
            config: Of the UNet.
            scheduler: What scheduler_config.json says.
            components: What stands around the UNet.
            size: Of a picture in pixels.
            pixels: Of a picture's side, for one of a latent.
            dtype: Of the UNet's weights.

        Raises:
            AdapterError: It draws no such size, the UNet reads more than a latent, or the scheduler is not supported.
        """
        if config.in_channels != config.out_channels:
            raise AdapterError(
                f"{self.name}: a UNet that reads {config.in_channels} channels and writes {config.out_channels} is no"
                " text-to-image model's (inpainting reads a picture and a mask, too); expected as many"
            )
        self.config, self.pixels, self.components = config, pixels, components
        self.module, self.clock = UNet(config), Clock()
        self.module.set_dtype(dtype)
        self.dtype, self.sampling = dtype, dict(scheduler)
        self.scheduler = scheduler_from_config(scheduler)
        self.parameterization = parameterization_from_config(scheduler)
        self.latent_shape = self.latent_of(*picture_size(size))
        self._stages, self._edges = unet_stages(self.module), unet_edges(self.module)

    @classmethod
    def pretrained(cls, place: str = "") -> Self:
        """The model with its weights, in the precision in which they are stored.

        Args:
            place: A folder of the diffusers layout, a hub id, or a single file; "" for the usual hub id.

        Raises:
            ArtifactError: A file is missing or damaged; it says how to get it.
            AdapterError: It holds another model, or a config asks for something that is not supported.
        """
        components = CLIPComponents(HUB if place in ("", GONE) else place, 0)
        source = components.source
        config = UNetConfig.from_dict(source.config("unet"), f"{source.place}: unet/config.json")
        components.width = config.cross_attention_dim
        weights = source.tensors("unet")
        dtypes = {value.dtype for value in weights.values()}
        pixels = pixels_of(source, "vae", config.out_channels)
        sides = SIDE if config.sample_size is None else config.sample_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        adapter = cls(
            config,
            source.config("scheduler"),
            components,
            (pixels * width, pixels * height),
            pixels,
            dtypes.pop() if len(dtypes) == 1 else mx.float32,
        )
        fill(adapter.module, weights, adapter.dtype, in_place(source, "unet"))
        return adapter

    @classmethod
    def blank(cls, description: dict[str, Any]) -> Self:
        config = UNetConfig.from_dict(description["config"])
        components = CLIPComponents(HUB, config.cross_attention_dim)
        dtype = getattr(mx, description["dtype"])
        return cls(config, description["scheduler"], components, description["size"], description["pixels"], dtype)

    def latent_of(self, width: int, height: int) -> tuple[int, int, int]:
        for side in (width, height):
            if side % self.pixels or side < self.pixels:
                raise AdapterError(f"{self.name} draws sides of a multiple of {self.pixels} pixels; {side} is none")
        return height // self.pixels, width // self.pixels, self.config.in_channels

    def role(self, path: str) -> str:
        return unet_role(path)

    def edges(self) -> tuple[Edge, ...]:
        return self._edges
