"""What stands around the UNet: a CLIP text encoder and an autoencoder, loaded when they are first needed."""

from __future__ import annotations

import logging
from typing import Self

import mlx.core as mx

from ...errors import AdapterError, ArtifactError
from ...sampling.conditioning import Conditioning
from ..checkpoints.source import Source
from ..latent import Components
from ..parts.clip import load_clip
from ..parts.tokenizers import clip_tokenizer

PIPELINE = "StableDiffusionPipeline"
CHUNK = 8  # prompts that go through the text encoder at once

log = logging.getLogger("mlxquant")


class CLIPComponents(Components):
    """A CLIP text encoder and an autoencoder.

    Args:
        place: The folder, file or hub id that they are loaded from.
        width: Channels of a text token, as the UNet reads them.
    """

    def __init__(self, place: str, width: int):
        super().__init__(place)
        self.width = width

    def at(self, place: str) -> Self:
        return type(self)(place, self.width)

    def _opened(self) -> Source:
        """Raises AdapterError where another pipeline's model is there."""
        found = super()._opened()
        if found.pipeline != PIPELINE:
            raise AdapterError(
                f"{self.place} is of diffusers' {found.pipeline or 'no pipeline'}, and sd15 of {PIPELINE}; name the"
                " place alone, and it will be known by that"
            )
        if found.has("safety_checker"):
            log.info("%s: its safety_checker is not run, pictures are as they are drawn", self.place)
        return found

    def _encode(self, prompts: list[str]) -> Conditioning:
        # half precision is slow on the CPU
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.float16
        ids = clip_tokenizer(self.source, "tokenizer")(prompts)
        encoder, found = load_clip(self.source, "text_encoder", dtype), list[mx.array]()
        for start in range(0, len(prompts), CHUNK):
            found.append(encoder(ids[start : start + CHUNK]).last)
            mx.eval(found[-1])
        text = mx.concatenate(found)
        if text.shape[-1] != self.width:
            raise ArtifactError(
                f"{self.place}: its text encoder writes {text.shape[-1]} channels, and the UNet reads {self.width}; one"
                " of the two is another model's"
            )
        return Conditioning(text=text)
