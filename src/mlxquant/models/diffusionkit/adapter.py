"""``sd3-medium-diffusionkit``: Stable Diffusion 3 Medium on DiffusionKit's own modules.

The transformer is DiffusionKit's, with its weights and its embedding of time in float16 and everything else in float32,
as DiffusionKit has it with ``w16`` and without ``a16``. Text encoders and VAE are loaded when they are first needed,
and what they were given is encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import AdapterError
from ...files import schema
from ...grids.time import Clock
from ...sampling.conditioning import Conditioning
from ...sampling.picture_size import LARGEST, PictureSize, picture_size, plain
from ...sampling.prompts import Prompt, packaged_prompts
from ..diffusion import DiffusionAdapter
from ..edges import Edge
from ..mmdit.chain import PATCHES, mmdit_edges, mmdit_role
from ..mmdit.config import CONFIG, MMDiTConfig
from ..prompt_memory import PromptMemory
from ..stages import Stage, State
from .checkpoint import fill, mmdit_weights, vae_decoder
from .files import CHECKPOINT, PIXELS, Files
from .package import build_mmdit, host, modulations
from .pipeline import pipeline
from .text_encoders import TextEncoders

SIZE = 512  # default of a picture's side
SCALE, SHIFT = 1.5305, 0.0609  # of the VAE's latents


class Encoder(Protocol):
    def encode(self, prompts: Sequence[str]) -> list[tuple[mx.array, mx.array]]:
        """Token embeddings [T,E] and pooled embedding [P] of each prompt."""
        ...


class Components:
    """What stands around the transformer: text encoders and VAE. Adapters that differ in the transformer alone share
    one of these.

    Attributes:
        place: The hub id or folder that they are loaded from.
        text: What encodes prompts; None until it is first needed. It may be set to something else.
    """

    def __init__(self, place: str):
        self.place = place
        self.text: Encoder | None = None
        self._decoder: Any = None
        self._memory = PromptMemory()

    def _encode(self, prompts: list[str]) -> Conditioning:
        pairs = (TextEncoders(Files(self.place)) if self.text is None else self.text).encode(prompts)
        tokens, pooled = (mx.stack([pair[side] for pair in pairs]) for side in (0, 1))
        return Conditioning(tokens=tokens, pooled=pooled)

    def encoded(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of prompts, float32; each is encoded once, and the encoders are released in between."""
        found = self._memory.encoded(prompts, self._encode)
        return Conditioning(**{name: value.astype(mx.float32) for name, value in {**found}.items()})

    @property
    def decoder(self) -> Any:
        if self._decoder is None:
            self._decoder = vae_decoder(Files(self.place).path(CHECKPOINT))
        return self._decoder


class SD3Medium(DiffusionAdapter):
    name = "sd3-medium-diffusionkit"
    STRUCTURE = schema.entries(
        {
            "config": CONFIG,
            "size": schema.either(schema.array_of(schema.whole(1, LARGEST), 2, 2), schema.whole(1, LARGEST)),
        }
    )
    shift = 3.0
    cfg = 5.0
    batch = 2
    samples = 64
    rows = 2

    def __init__(self, module: Any, config: MMDiTConfig, clock: Clock, components: Components, size: int | PictureSize):
        self.module = module
        self.clock = clock
        self.config = config
        self.components = components
        self.latent_shape = self.latent_of(*picture_size(size))
        self._stages = _stages(module, config.depth_multimodal)

    @classmethod
    def pretrained(cls, place: str = "") -> SD3Medium:
        """The model with its weights.

        Args:
            place: The hub id that DiffusionKit uses, which "" stands for, or a local folder, see ``files``.

        Raises:
            ArtifactError: A file is missing or damaged; it says how to get it.
            AdapterError: DiffusionKit is not installed.
        """
        checkpoint = Files(place).path(CHECKPOINT)
        config, weights = mmdit_weights(checkpoint)
        adapter = cls._built(config, Components(place), min(SIZE, PIXELS * config.max_latent_resolution))
        fill(adapter.module, weights, mx.float16, str(checkpoint))
        return adapter

    @classmethod
    def _built(cls, config: MMDiTConfig, components: Components, size: int | PictureSize) -> SD3Medium:
        clock = Clock()
        return cls(build_mmdit(config, clock, mx.float16), config, clock, components, size)

    @classmethod
    def blank(cls, description: dict[str, Any]) -> SD3Medium:
        return cls._built(MMDiTConfig.from_dict(description["config"]), Components(""), description["size"])

    def twin(self) -> SD3Medium:
        twin = self._built(self.config, self.components, self.size)
        twin.scheduler = self.scheduler
        return twin

    def describe(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "size": plain(self.size)}

    @property
    def place(self) -> str:
        return self.components.place

    @place.setter
    def place(self, place: str) -> None:
        self.components = Components(place)

    @property
    def size(self) -> PictureSize:
        return self.latent_shape[1] * PIXELS, self.latent_shape[0] * PIXELS

    def latent_of(self, width: int, height: int) -> tuple[int, int, int]:
        for side in (width, height):
            self.check_size(side)
        return height // PIXELS, width // PIXELS, self.config.vae_latent_dim

    def check_size(self, size: int) -> None:
        """Refuse a size that the transformer has no positions for.

        Args:
            size: Pixels of a picture's side.

        Raises:
            AdapterError: It is no multiple of a patch, or too large.
        """
        multiple = PIXELS * self.config.patch_size
        largest = PIXELS * self.config.max_latent_resolution
        if size % multiple or not multiple <= size <= largest:
            raise AdapterError(
                f"{self.name} draws sides of a multiple of {multiple} pixels, at most {largest}; {size} is none"
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return self.components.encoded(prompts)

    def generate(self, *arguments: Any, **options: Any) -> mx.array:
        Files(self.place).path(CHECKPOINT)  # the VAE: missed now, not after the last step
        return super().generate(*arguments, **options)

    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        pictures = []
        for one in latent:
            picture = self.components.decoder((one / SCALE + SHIFT)[None])
            pictures.append(np.array(mx.clip(picture / 2 + 0.5, 0, 1), np.float32))
            mx.clear_cache()
        return np.concatenate(pictures)

    def role(self, path: str) -> str:
        return mmdit_role(path)

    def left_out(self) -> dict[str, str]:
        return dict(PATCHES)

    def edges(self) -> tuple[Edge, ...]:
        return mmdit_edges(self.config)

    def pipeline(self) -> Any:
        """DiffusionKit's ``DiffusionPipeline`` around this model; see ``pipeline``."""
        return pipeline(self)

    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        return packaged_prompts(self.name, purpose, count, seed)


def _stages(model: Any, depth: int) -> tuple[Stage, ...]:
    """The chain of DiffusionKit's MMDiT. States hold the latent [B,H,W,C], image [B,N,D], text [B,T,D] and c [B,D],
    which is what the modulations are computed from; the last block drops the text.
    """

    def embed(state: State) -> State:
        latent, c = state["latent"], model.y_embedder(state["pooled"]) + model.t_embedder(state["t"])[:, 0, 0]
        image = model.x_embedder(latent) + model.x_pos_embedder(latent)
        text = model.context_embedder(state["tokens"])
        return {"latent": latent, "image": image.reshape(len(latent), -1, image.shape[-1]), "text": text, "c": c}

    def block(index: int) -> Stage:
        prefix = f"multimodal_transformer_blocks.{index}"

        def run(state: State) -> State:
            here: Any = model.multimodal_transformer_blocks[index]
            c = state["c"][:, None, None]
            streams = (here.image_transformer_block, here.text_transformer_block)
            with modulations([(stream, stream.adaLN_modulation(c)) for stream in streams]) as now:
                image, text = here(state["image"][:, :, None], state["text"][:, :, None], now)
            kept = {key: value for key, value in state.items() if key != "text"} | {"image": image[:, :, 0]}
            return kept if text is None else kept | {"text": text[:, :, 0]}

        return Stage(prefix, (prefix,), run)

    def head(state: State) -> State:
        last, latent = model.final_layer, state["latent"]
        with modulations([(last, last.adaLN_modulation(state["c"][:, None, None]))]) as now:
            tokens = last(state["image"][:, :, None], now)
        _, height, width, channels = latent.shape
        return {"velocity": host().mmdit.unpatchify(tokens, model.config.patch_size, height, width, channels)}

    embedders = ("x_embedder", "x_pos_embedder", "y_embedder", "t_embedder", "context_embedder")
    return (Stage("embed", embedders, embed), *(block(i) for i in range(depth)), Stage("head", ("final_layer",), head))
