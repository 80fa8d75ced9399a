"""Stable Diffusion 3 and 3.5 on our own MMDiT, from folders of the diffusers layout and from original single files.

The transformer keeps the precision of its file and computes in float32 between its layers. Text encoders and
autoencoder are loaded when they are first needed, and what they were given is encoded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import AdapterError, ArtifactError
from ...files import schema
from ...files.parameters import load_parameters
from ...grids.time import Clock
from ...sampling.conditioning import Conditioning
from ...sampling.picture_size import LARGEST, PictureSize, picture_size, plain
from ...sampling.prompts import Prompt, packaged_prompts
from ...sampling.scheduler_config import scheduler_from_config
from ..checkpoints.source import Source
from ..diffusion import DiffusionAdapter
from ..diffusionkit.files import HUB
from ..edges import Edge
from ..mmdit.chain import PATCHES, mmdit_edges, mmdit_role, mmdit_stages
from ..mmdit.config import CONFIG, MMDiTConfig
from ..mmdit.network import MMDiT
from ..parts.autoencoder import AutoencoderKL, load_autoencoder
from ..prompt_memory import PromptMemory
from ..stages import Stage
from .names import config_from_diffusers, from_diffusers
from .source import open_sd3
from .text_encoders import encode

SIZE = 512  # default of a picture's side
PIXELS = 8  # of a picture's side, for one of a latent
DTYPES = ("float16", "bfloat16", "float32")
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}  # of every SD3 so far

Encode = Callable[[list[str]], Conditioning]


class Components:
    """What stands around the transformer: text encoders and autoencoder. Adapters that differ in the transformer alone
    share one of these.

    Attributes:
        place: The folder, file or hub id that they are loaded from.
        width: Channels of a text token.
        text: What encodes prompts: the model's own encoders, or whatever is put here.
    """

    def __init__(self, place: str, width: int):
        self.place, self.width = place, width
        self.text: Encode = self._encode
        self._memory = PromptMemory()

    @cached_property
    def source(self) -> Source:
        return open_sd3(self.place)

    def _encode(self, prompts: list[str]) -> Conditioning:
        # half precision is slow on the CPU
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.float16
        return encode(self.source, prompts, self.width, dtype)

    def encoded(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts, float32; each is encoded once, and the encoders are released in between."""
        found = self._memory.encoded(prompts, self.text)
        return Conditioning(**{name: value.astype(mx.float32) for name, value in {**found}.items()})

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        found = load_autoencoder(self.source, "vae", mx.float32)
        if found.factor != PIXELS:
            raise ArtifactError(
                f"{self.place}: a latent of its autoencoder is {found.factor} pixels wide, expected {PIXELS} as in"
                " every SD3; it is another model's"
            )
        return found


class SD3Medium(DiffusionAdapter):
    """SD3-Medium: two billion parameters, no norms of queries and keys."""

    name = "sd3-medium"
    STRUCTURE = schema.entries(
        {
            "config": CONFIG,
            "size": schema.either(schema.array_of(schema.whole(1, LARGEST), 2, 2), schema.whole(1, LARGEST)),
        },
        {"dtype": schema.one_of(*DTYPES), "scheduler": schema.table_of(schema.anything)},
    )
    hub_ids: ClassVar[tuple[str, ...]] = ("stabilityai/stable-diffusion-3-medium-diffusers", HUB)
    shift = 3.0
    cfg = 5.0
    batch = 2
    samples = 64
    rows = 2

    def __init__(
        self,
        config: MMDiTConfig,
        components: Components,
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
            AdapterError: It draws no such size, or the scheduler is not supported.
        """
        self.module, self.clock = MMDiT(config), Clock()
        self.module.set_dtype(dtype)
        self.config, self.components, self.dtype = config, components, dtype
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
        components = Components(place, 0)
        source = components.source
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
        components = Components(cls.hub_ids[0], config.token_level_text_embed_dim)
        dtype = getattr(mx, description.get("dtype", "float16"))
        return cls(config, components, description["size"], dtype, description.get("scheduler", SCHEDULER))

    def twin(self) -> Self:
        twin = super().twin()
        twin.components = self.components
        return twin

    def describe(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "size": plain(self.size),
            "dtype": str(self.dtype).rpartition(".")[2],
            "scheduler": self.sampling,
        }

    @property
    def place(self) -> str:
        return self.components.place

    @place.setter
    def place(self, place: str) -> None:
        self.components = Components(place or self.hub_ids[0], self.components.width)

    @property
    def size(self) -> PictureSize:
        return self.latent_shape[1] * PIXELS, self.latent_shape[0] * PIXELS

    def latent_of(self, width: int, height: int) -> tuple[int, int, int]:
        multiple = PIXELS * self.config.patch_size
        largest = multiple * self.config.max_latent_resolution
        for side in (width, height):
            if side % multiple or not multiple <= side <= largest:
                raise AdapterError(
                    f"{self.name} draws sides of a multiple of {multiple} pixels, at most {largest}; {side} is none"
                )
        return height // PIXELS, width // PIXELS, self.config.vae_latent_dim

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.components.encoded(prompts)

    def generate(self, *arguments: Any, **options: Any) -> mx.array:
        self.components.source.config("vae")  # missed now, not after the last step
        return super().generate(*arguments, **options)

    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        pictures = self.components.autoencoder.decode(latent).astype(mx.float32)
        return np.array(mx.clip(pictures / 2 + 0.5, 0, 1), np.float32)

    def latents(self, pictures: npt.NDArray[np.float32]) -> mx.array:
        return self.components.autoencoder.encode(mx.array(pictures) * 2 - 1).astype(mx.float32)

    def role(self, path: str) -> str:
        return mmdit_role(path)

    def left_out(self) -> dict[str, str]:
        return dict(PATCHES)

    def edges(self) -> tuple[Edge, ...]:
        return mmdit_edges(self.config)

    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        return packaged_prompts(self.name, purpose, count, seed)


class SD35Medium(SD3Medium):
    """SD3.5-Medium: norms of queries and keys, and a second attention in its first blocks."""

    name = "sd3.5-medium"
    hub_ids = ("stabilityai/stable-diffusion-3.5-medium",)
    cfg = 4.5
    steps = 40

    @classmethod
    def _is(cls, config: MMDiTConfig) -> bool:
        return bool(config.dual_attention_layers)


class SD35Large(SD3Medium):
    """SD3.5-Large: eight billion parameters, norms of queries and keys."""

    name = "sd3.5-large"
    hub_ids = ("stabilityai/stable-diffusion-3.5-large",)
    cfg = 3.5

    @classmethod
    def _is(cls, config: MMDiTConfig) -> bool:
        return config.use_qk_norm and not config.dual_attention_layers


class SD35LargeTurbo(SD35Large):
    """SD3.5-Large-Turbo: distilled to four steps without guidance. Nothing in its files but their numbers tells it from
    SD3.5-Large, so it goes by its name and its hub id alone.
    """

    name = "sd3.5-large-turbo"
    hub_ids = ("stabilityai/stable-diffusion-3.5-large-turbo",)
    cfg = 1.0
    steps = 4

    @classmethod
    def fits(cls, source: Source) -> bool:
        return False
