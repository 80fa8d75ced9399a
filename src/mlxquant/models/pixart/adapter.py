"""``pixart-alpha`` and ``pixart-sigma``: PixArt as a host, from folders of the diffusers layout.

What is computed is what diffusers' pipelines compute with ``clean_caption=False, use_resolution_binning=False``:
prompts are put in lower case and stripped, and a picture is drawn at the size that was asked for. By default they also
clean a prompt of addresses, markup and CJK letters, where beautifulsoup4 and ftfy are installed, and draw at the
nearest of 33 sizes, to scale and crop the picture afterwards: at the model's own size, a square, that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import AdapterError
from ...files import schema
from ...grids.time import Clock
from ...sampling.conditioning import Conditioning
from ...sampling.parameterizations import Parameterization
from ...sampling.picture_size import LARGEST, PictureSize, plain
from ...sampling.prompts import Prompt, packaged_prompts
from ...sampling.scheduler_config import parameterization_from_config, scheduler_from_config
from ..diffusion import DiffusionAdapter
from ..edges import Edge
from ..parts.loading import fill, in_place
from ..stages import Stage
from .chain import PATCHES, pixart_edges, pixart_role, pixart_stages
from .components import Components
from .config import ALPHA, CONFIG, SIGMA, PixArtConfig
from .network import PixArt

Scheduler = dict[str, Any]  # what scheduler_config.json says
UNUSED = (  # what folders of older releases also have: a caption that drops the text while training, and positions
    "caption_projection.y_embedding",
    "pos_embed.pos_embed",
)


class PixArtAlpha(DiffusionAdapter):
    """PixArt-α, for 512 or for 1024 pixels, whichever ``transformer/config.json`` says.

    Attributes:
        pipeline: The class of diffusers that runs it.
        length: Tokens of a prompt.
        conditioned: Whether its pipeline has a picture's resolution and aspect ratio for a transformer that reads them.
    """

    name = "pixart-alpha"
    STRUCTURE = schema.entries(
        {
            "config": CONFIG,
            "scheduler": schema.table_of(schema.anything),
            "size": schema.either(schema.array_of(schema.whole(1, LARGEST), 2, 2), schema.whole(1, LARGEST)),
            "pixels": schema.whole(1, 64),
            "dtype": schema.floating,
        }
    )
    hub_ids = ALPHA
    cfg = 4.5
    steps = 20
    batch = 2
    samples = 64
    rows = 2
    pipeline: ClassVar[str] = "PixArtAlphaPipeline"
    length: ClassVar[int] = 120
    conditioned: ClassVar[bool] = True

    def __init__(
        self, config: PixArtConfig, scheduler: Scheduler, pixels: int, components: Components, dtype: mx.Dtype
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
        components = Components(place or cls.hub_ids[0], cls.length)
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
            pixels_of(source.config("vae")),
            components,
            dtypes.pop() if len(dtypes) == 1 else mx.float32,
        )
        fill(adapter.module, arrays, adapter.dtype, in_place(source, "transformer"), UNUSED)
        return adapter

    @classmethod
    def blank(cls, description: Mapping[str, Any]) -> Self:
        config, components = PixArtConfig.from_config(description["config"]), Components("", cls.length)
        dtype = getattr(mx, description["dtype"])
        adapter = cls(config, dict(description["scheduler"]), description["pixels"], components, dtype)
        adapter.resize(description["size"])
        return adapter

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
        self.components = Components(place or self.hub_ids[0], self.length)

    @property
    def size(self) -> PictureSize:
        return self.latent_shape[1] * self.pixels, self.latent_shape[0] * self.pixels

    def latent_of(self, width: int, height: int) -> tuple[int, int, int]:
        multiple = self.pixels * self.config.patch_size
        for side in (width, height):
            if side % multiple or side < multiple:
                raise AdapterError(f"{self.name} draws sides of a multiple of {multiple} pixels; {side} is none")
        return height // self.pixels, width // self.pixels, self.config.in_channels

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.components.encoded(prompts)

    def generate(self, *arguments: Any, **options: Any) -> mx.array:
        self.components.source.config("vae")  # missed now, not after the last step
        return super().generate(*arguments, **options)

    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        return np.array(mx.clip(self.components.autoencoder.decode(latent) / 2 + 0.5, 0, 1), np.float32)

    def latents(self, pictures: npt.NDArray[np.float32]) -> mx.array:
        return self.components.autoencoder.encode(mx.array(pictures) * 2 - 1)

    def role(self, path: str) -> str:
        return pixart_role(path)

    def left_out(self) -> dict[str, str]:
        return dict(PATCHES)

    def edges(self) -> tuple[Edge, ...]:
        return pixart_edges(self.config)

    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        return packaged_prompts(self.name, purpose, count, seed)


class PixArtSigma(PixArtAlpha):
    """PixArt-Σ: longer prompts, and no conditions but the time."""

    name = "pixart-sigma"
    hub_ids = SIGMA
    pipeline = "PixArtSigmaPipeline"
    length = 300
    conditioned = False


def pixels_of(vae: Mapping[str, Any]) -> int:
    """Pixels of a picture's side for one of a latent, by the config of a VAE: it halves between levels."""
    return 2 ** (len(vae.get("block_out_channels", ())) - 1)
