"""Stable Diffusion 3 and 3.5 on our own MMDiT, from folders of the diffusers layout and from original single files.

The transformer keeps the precision of its file and computes in float32 between its layers. Text encoders and
autoencoder are loaded when they are first needed, and what they were given is encoded once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Self

import mlx.core as mx

from ...errors import AdapterError, ArtifactError
from ...files import schema
from ...files.parameters import load_parameters
from ...grids.time import Clock
from ...sampling.conditioning import Conditioning
from ...sampling.parameterizations import FLOW
from ...sampling.picture_size import PictureSize, picture_size, plain
from ...sampling.scheduler_config import parameterization_from_config, scheduler_from_config
from ..checkpoints.source import Source
from ..diffusionkit.files import HUB
from ..edges import Edge
from ..latent import SIDES, Components, LatentAdapter
from ..mmdit.chain import PATCHES, mmdit_edges, mmdit_role, mmdit_stages
from ..mmdit.config import CONFIG, MMDiTConfig
from ..mmdit.network import MMDiT
from ..parts.autoencoder import AutoencoderKL
from .names import config_from_diffusers, from_diffusers
from .source import open_sd3
from .text_encoders import encode

PIPELINE = "StableDiffusion3Pipeline"
SIZE = 512  # default of a picture's side
PIXELS = 8  # of a picture's side, for one of a latent
DTYPES = ("float16", "bfloat16", "float32")
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}  # of every SD3 so far


class SD3Components(Components):
    """Three text encoders, of which T5 may be missing, and an autoencoder.

    Args:
        place: The folder, file or hub id that they are loaded from.
        width: Channels of a text token.
    """

    def __init__(self, place: str, width: int):
        super().__init__(place)
        self.width = width

    def at(self, place: str) -> Self:
        return type(self)(place, self.width)

    def _opened(self) -> Source:
        return open_sd3(self.place)

    def _encode(self, prompts: list[str]) -> Conditioning:
        # half precision is slow on the CPU
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.float16
        return encode(self.source, prompts, self.width, dtype)

    def _decoder(self) -> AutoencoderKL:
        found = super()._decoder()
        if found.factor != PIXELS:
            raise ArtifactError(
                f"{self.place}: a latent of its autoencoder is {found.factor} pixels wide, expected {PIXELS} as in"
                " every SD3; it is another model's"
            )
        return found


class SD3Medium(LatentAdapter):
    """SD3-Medium: two billion parameters, no norms of queries and keys.

    Guidance 5 is that of Stability AI's sd3_infer.py, which calls 28 steps "quite decent" and takes 50 by default; 28
    is the default of diffusers, too, whose guidance is 7.
    """

    name = "sd3-medium"
    STRUCTURE = schema.entries(
        {
            "config": CONFIG,
            "size": SIDES,
        },
        {"dtype": schema.one_of(*DTYPES), "scheduler": schema.table_of(schema.anything)},
    )
    hub_ids: ClassVar[tuple[str, ...]] = ("stabilityai/stable-diffusion-3-medium-diffusers", HUB)
    shift = 3.0
    cfg = 5.0

    def __init__(
        self,
        config: MMDiTConfig,
        components: SD3Components,
        size: int | PictureSize,
        dtype: mx.Dtype = mx.float16,
        scheduler: dict[str, Any] = SCHEDULER,
    ):
        """Without weights.

        Args:
            config: Sizes of the transformer.
            components: What stands around it.
            size: Of a picture in pixels.
            dtype: Of the transformer's weights.
            scheduler: What scheduler_config.json says.

        Raises:
            AdapterError: It draws no such size, or the scheduler is not supported, or another family's.
        """
        self.module, self.clock = MMDiT(config), Clock()
        self.module.set_dtype(dtype)
        self.config, self.components, self.dtype = config, components, dtype
        if parameterization_from_config(scheduler).kind != FLOW:
            raise AdapterError(
                f"{self.name} predicts a flow, and its scheduler_config.json ({scheduler.get('_class_name')}) is of a"
                " model that does not; expected FlowMatchEulerDiscreteScheduler, or prediction_type flow_prediction"
            )
        self.sampling, self.scheduler = scheduler, scheduler_from_config(scheduler)
        self.latent_shape = self.latent_of(*picture_size(size))
        self._stages = mmdit_stages(self.module)

    @classmethod
    def fits(cls, source: Source) -> bool:
        """Whether a copy of an SD3 is of this kind; its transformer's config says so."""
        return cls._is(config_from_diffusers(source.config("transformer"), source.place))

    @classmethod
    def _is(cls, config: MMDiTConfig) -> bool:
        return not config.use_qk_norm and not config.dual_attention_layers

    @classmethod
    def pretrained(cls, place: str = "") -> Self:
        """The model with its weights, in the precision that most of their file has.

        Args:
            place: A folder of the diffusers layout, a hub id, or a single file; "" for the usual hub id.

        Raises:
            ArtifactError: A file is missing or damaged, or another model's; it says what to do.
            AdapterError: A package is not installed, or its scheduler is not supported.
        """
        place = place or cls.hub_ids[0]
        components = SD3Components(place, 0)
        source = components.source
        if not source.pipeline.startswith("StableDiffusion3"):
            raise AdapterError(
                f"{place} is of diffusers' {source.pipeline or 'no pipeline'}, and {cls.name} of {PIPELINE}; name the"
                " place alone, and it will be known by that"
            )
        config = config_from_diffusers(source.config("transformer"), place)
        if not cls._is(config):
            raise ArtifactError(
                f"{place}: its transformer is not {cls.name}'s (norms of queries and keys: {config.use_qk_norm}, blocks"
                f" with a second attention: {len(config.dual_attention_layers)}); pass it as --model, without a name"
            )
        components.width = config.token_level_text_embed_dim
        weights = from_diffusers(source.tensors("transformer"), config)
        counts = Counter[mx.Dtype]()  # a file may have a table of positions in another precision
        for value in weights.values():
            counts[value.dtype] += value.size
        dtype = max(counts, key=lambda kind: counts[kind]) if counts else mx.float32
        side = min(SIZE, PIXELS * config.patch_size * config.max_latent_resolution)
        adapter = cls(config, components, side, dtype, source.config("scheduler"))
        load_parameters(adapter.module, weights, f"{place}: the transformer")
        return adapter

    @classmethod
    def blank(cls, description: dict[str, Any]) -> Self:
        config = MMDiTConfig.from_dict(description["config"])
        components = SD3Components(cls.hub_ids[0], config.token_level_text_embed_dim)
        dtype = getattr(mx, description.get("dtype", "float16"))
        return cls(config, components, description["size"], dtype, description.get("scheduler", SCHEDULER))

    def describe(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "size": plain(self.size),
            "dtype": str(self.dtype).rpartition(".")[2],
            "scheduler": self.sampling,
        }

    def latent_of(self, width: int, height: int) -> tuple[int, int, int]:
        multiple = PIXELS * self.config.patch_size
        largest = multiple * self.config.max_latent_resolution
        for side in (width, height):
            if side % multiple or not multiple <= side <= largest:
                raise AdapterError(
                    f"{self.name} draws sides of a multiple of {multiple} pixels, at most {largest}; {side} is none"
                )
        return height // PIXELS, width // PIXELS, self.config.vae_latent_dim

    def role(self, path: str) -> str:
        return mmdit_role(path)

    def left_out(self) -> dict[str, str]:
        return dict(PATCHES)

    def edges(self) -> tuple[Edge, ...]:
        return mmdit_edges(self.config)


class SD35Medium(SD3Medium):
    """SD3.5-Medium: norms of queries and keys, and a second attention in its first blocks. 40 steps and guidance 4.5
    are its model card's; Stability AI's sd3_infer.py takes 50 steps of DPM-Solver++ and 5.
    """

    name = "sd3.5-medium"
    hub_ids = ("stabilityai/stable-diffusion-3.5-medium",)
    cfg = 4.5
    steps = 40

    @classmethod
    def _is(cls, config: MMDiTConfig) -> bool:
        return bool(config.dual_attention_layers)


class SD35Large(SD3Medium):
    """SD3.5-Large: eight billion parameters, norms of queries and keys. 28 steps and guidance 3.5 are its model card's;
    Stability AI's sd3_infer.py takes 40 steps of DPM-Solver++ and 4.5.
    """

    name = "sd3.5-large"
    hub_ids = ("stabilityai/stable-diffusion-3.5-large",)
    cfg = 3.5

    @classmethod
    def _is(cls, config: MMDiTConfig) -> bool:
        return config.use_qk_norm and not config.dual_attention_layers


class SD35LargeTurbo(SD35Large):
    """SD3.5-Large-Turbo: distilled to four steps without guidance. Nothing in its files but their numbers tells it from
    SD3.5-Large, so it goes by its name and its hub id alone. 4 steps without guidance (diffusers' 0, a weight of 1
    here) are its model card's, and sd3_infer.py's.
    """

    name = "sd3.5-large-turbo"
    hub_ids = ("stabilityai/stable-diffusion-3.5-large-turbo",)
    cfg = 1.0
    steps = 4

    @classmethod
    def fits(cls, source: Source) -> bool:
        return False
