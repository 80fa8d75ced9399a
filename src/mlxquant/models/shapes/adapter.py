"""``mmdit-shapes``, the embedded model: a small SD3 that draws captioned shapes, trained by ``train_shapes`` and
shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import AdapterError
from ...files import schema
from ...files.checked import read_tensors
from ...files.parameters import load_parameters
from ...grids.time import Clock
from ...numerics.arrays import Array
from ...sampling.conditioning import Conditioning
from ...sampling.picture_size import PictureSize
from ...sampling.prompts import Prompt
from ..diffusion import DiffusionAdapter
from ..edges import Edge
from ..mmdit.chain import PATCHES, mmdit_edges, mmdit_role, mmdit_stages
from ..mmdit.config import CONFIG, MMDiTConfig
from ..mmdit.network import MMDiT
from ..stages import Stage
from . import scenes
from .captions import CaptionEncoder, tokenize

WEIGHTS = "mmdit-shapes.safetensors"


class ShapesModel(MMDiT):
    """The transformer under DiffusionKit's names, with the caption encoder beside it under ``text_encoder``."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        self.text_encoder = CaptionEncoder(config.token_level_text_embed_dim, config.pooled_text_embed_dim)


def to_latent(images: mx.array) -> mx.array:
    """Pictures [B,H,W,3] in [0,1] to latents [B,H/2,W/2,12] in [-1,1] by pixel-unshuffle."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // 2, w // 2, 4 * c) * 2 - 1


def to_images(latent: mx.array) -> mx.array:
    """The inverse of ``to_latent``, clipped to [0,1]."""
    b, h, w, c = latent.shape
    x = latent.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return mx.clip(x.reshape(b, 2 * h, 2 * w, c // 4) * 0.5 + 0.5, 0, 1)


class MMDiTShapes(DiffusionAdapter):
    """The adapter of the embedded model. Its text encoder is in the module tree, since its weights are saved with the
    model, but no recipe sees it: it runs once a prompt.
    """

    name = "mmdit-shapes"
    STRUCTURE = schema.entries({"config": CONFIG})
    cfg = 2.0

    def __init__(self, module: ShapesModel):
        self.module: ShapesModel = module
        self.clock = Clock()
        side = scenes.SIDE // 2
        self.latent_shape = (side, side, module.config.vae_latent_dim)
        self._stages = mmdit_stages(module)

    @classmethod
    def pretrained(cls, place: str = "") -> MMDiTShapes:
        """The model with its shipped weights, float32.

        Args:
            place: "", for there is no other.

        Raises:
            AdapterError: Another place.
            ArtifactError: The file is damaged.
        """
        if place:
            raise AdapterError(f"{cls.name} has no weights but those that ship with mlxquant; {place!r} is none of it")
        with as_file(files("mlxquant.assets") / WEIGHTS) as path:
            arrays, header = read_tensors(path, kind="mmdit-shapes", schema=cls.STRUCTURE)
        adapter = cls.blank({"config": header["config"]})
        load_parameters(adapter.module, {k: v.astype(mx.float32) for k, v in arrays.items()}, WEIGHTS)
        return adapter

    @classmethod
    def blank(cls, description: dict[str, Any]) -> MMDiTShapes:
        return cls(ShapesModel(MMDiTConfig.from_dict(description["config"])))

    def describe(self) -> dict[str, Any]:
        return {"config": self.module.config.to_dict()}

    @property
    def size(self) -> PictureSize:
        return scenes.SIDE, scenes.SIDE

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self._stages

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens, pooled = self.module.text_encoder(mx.array([tokenize(p) for p in prompts]))
        return Conditioning(tokens=tokens, pooled=pooled)

    def decode(self, latent: mx.array) -> npt.NDArray[np.float32]:
        return np.array(to_images(latent), np.float32)

    def role(self, path: str) -> str:
        return mmdit_role(path)

    def edges(self) -> tuple[Edge, ...]:
        return mmdit_edges(self.module.config)

    def left_out(self) -> dict[str, str]:
        return {**PATCHES, "text_encoder": "runs once a prompt"}

    def prompts(self, purpose: str, count: int, seed: int = 0) -> list[Prompt]:
        if purpose not in ("calibration", "evaluation"):
            raise AdapterError(f"prompts are for 'calibration' or 'evaluation', not {purpose!r}")
        captions = scenes.captions(held_out=purpose == "evaluation", count=count)
        first = seed + (10_000 if purpose == "evaluation" else 0)
        return [Prompt(first + i, caption) for i, caption in enumerate(captions)]

    def attributes(self, images: Array, prompts: Sequence[str]) -> list[dict[str, bool]]:
        return [scenes.check(image, scenes.parse(prompt)) for image, prompt in zip(images, prompts, strict=True)]
