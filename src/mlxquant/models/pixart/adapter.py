"""``pixart-alpha`` and ``pixart-sigma``: PixArt as a host, from folders of the diffusers layout.

What is computed is what diffusers' pipelines compute with ``clean_caption=False, use_resolution_binning=False``:
prompts are put in lower case and stripped, and a picture is drawn at the size that was asked for. By default they also
clean a prompt of addresses, markup and CJK letters, where beautifulsoup4 and ftfy are installed, and draw at the
nearest of 33 sizes, to scale and crop the picture afterwards: at the model's own size, a square, that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import mlx.core as mx

from ...errors import AdapterError
from ...grids.time import Clock
from ...sampling.parameterizations import Parameterization
from ...sampling.scheduler_config import parameterization_from_config, scheduler_from_config
from ..edges import Edge
from ..latent import LatentAdapter, described
from ..parts.autoencoder_files import pixels_of
from ..parts.loading import fill, in_place
from .chain import PATCHES, pixart_edges, pixart_role, pixart_stages
from .components import PixArtComponents
from .config import ALPHA, CONFIG, SIGMA, PixArtConfig
from .network import PixArt

Scheduler = dict[str, Any]  # what scheduler_config.json says
UNUSED = (  # what folders of older releases also have: a caption that drops the text while training, and positions
    "caption_projection.y_embedding",
    "pos_embed.pos_embed",
)


class PixArtAlpha(LatentAdapter):
    """PixArt-α, for 512 or for 1024 pixels, whichever ``transformer/config.json`` says. 20 steps and guidance 4.5 are
    the defaults of diffusers' PixArtAlphaPipeline, and of PixArtSigmaPipeline.

    Attributes:
        pipeline: The class of diffusers that runs it.
        length: Tokens of a prompt.
        conditioned: Whether its pipeline has a picture's resolution and aspect ratio for a transformer that reads them.
    """

    name = "pixart-alpha"
    STRUCTURE = described(CONFIG)
    hub_ids = ALPHA
    cfg = 4.5
    steps = 20
    pipeline: ClassVar[str] = "PixArtAlphaPipeline"
    length: ClassVar[int] = 120
    conditioned: ClassVar[bool] = True

    def __init__(
        self, config: PixArtConfig, scheduler: Scheduler, pixels: int, components: PixArtComponents, dtype: mx.Dtype
    ):
        """Without weights.

        Args:
            config: Of the transformer.
            scheduler: What scheduler_config.json says.
            pixels: Of a picture's side, for one of a latent.
            components: Text encoder and VAE.
            dtype: Of the transformer's weights; what it computes is float32.

        Raises:
            AdapterError: Config and scheduler ask for something that is not supported.
        """
        if config.use_additional_conditions and not self.conditioned:
            raise AdapterError(
                f"{self.name}: its transformer reads resolution and aspect ratio (use_additional_conditions), and"
                " diffusers' pipeline of this model has none for it"
            )
        self.config, self.pixels, self.components = config, pixels, components
        self.module, self.clock = PixArt(config), Clock()
        self.module.set_dtype(dtype)
        self.dtype, self.sampling = dtype, scheduler
        self.scheduler = scheduler_from_config(scheduler)
        self.parameterization = Parameterization(parameterization_from_config(scheduler).kind, config.learned_variance)
        self.latent_shape = (config.sample_size, config.sample_size, config.in_channels)
        self._stages = pixart_stages(self.module, pixels)

    @classmethod
    def pretrained(cls, place: str = "") -> Self:
        """The model with its weights, in the precision in which they are stored.

        Args:
            place: A folder of the diffusers layout, or a hub id; "" for the one for 1024 pixels.

        Raises:
            ArtifactError: A file is missing or damaged; it says how to get it.
            AdapterError: It is another model's, or a config asks for something that is not supported.
        """
        components = PixArtComponents(place or cls.hub_ids[0], cls.length)
        source = components.source
        if source.pipeline != cls.pipeline:
            raise AdapterError(
                f"{source.place} is of diffusers' {source.pipeline or 'no pipeline'}, and {cls.name} of {cls.pipeline};"
                " name the place alone, and it will be known by that"
            )
        config = PixArtConfig.from_config(source.config("transformer"), f"{source.place}: transformer/config.json")
        arrays = source.tensors("transformer")
        dtypes = {value.dtype for value in arrays.values()}
        adapter = cls(
            config,
            source.config("scheduler"),
            pixels_of(source, "vae", config.in_channels),
            components,
            dtypes.pop() if len(dtypes) == 1 else mx.float32,
        )
        fill(adapter.module, arrays, adapter.dtype, in_place(source, "transformer"), UNUSED)
        return adapter

    @classmethod
    def blank(cls, description: Mapping[str, Any]) -> Self:
        config, components = PixArtConfig.from_config(description["config"]), PixArtComponents("", cls.length)
        dtype = getattr(mx, description["dtype"])
        adapter = cls(config, dict(description["scheduler"]), description["pixels"], components, dtype)
        adapter.resize(description["size"])
        return adapter

    def latent_of(self, width: int, height: int) -> tuple[int, int, int]:
        multiple = self.pixels * self.config.patch_size
        for side in (width, height):
            if side % multiple or side < multiple:
                raise AdapterError(f"{self.name} draws sides of a multiple of {multiple} pixels; {side} is none")
        return height // self.pixels, width // self.pixels, self.config.in_channels

    def role(self, path: str) -> str:
        return pixart_role(path)

    def left_out(self) -> dict[str, str]:
        return dict(PATCHES)

    def edges(self) -> tuple[Edge, ...]:
        return pixart_edges(self.config)


class PixArtSigma(PixArtAlpha):
    """PixArt-Σ: longer prompts, and no conditions but the time."""

    name = "pixart-sigma"
    hub_ids = SIGMA
    pipeline = "PixArtSigmaPipeline"
    length = 300
    conditioned = False
