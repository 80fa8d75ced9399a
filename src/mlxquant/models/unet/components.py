"""What stands around the UNet: a CLIP text encoder and an autoencoder, loaded when they are first needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import mlx.core as mx

from ...errors import AdapterError, ArtifactError
from ...sampling.conditioning import Conditioning
from ..checkpoints.open import open_source
from ..checkpoints.source import Source
from ..parts.autoencoder import AutoencoderKL, load_autoencoder
from ..parts.clip import load_clip
from ..parts.tokenizers import clip_tokenizer
from ..prompt_memory import PromptMemory

PIPELINE = "StableDiffusionPipeline"
CHUNK = 8  # prompts that go through the text encoder at once

log = logging.getLogger("mlxquant")


class Components:
    """Text encoder and autoencoder of a source. Adapters that differ in the UNet alone share one of these.

    Args:
        place: The folder, file or hub id that they are loaded from.
        width: Channels of a text token, as the UNet reads them.

    Attributes:
        text: What encodes prompts: the model's own encoder, or whatever is put here.
    """

    def __init__(self, place: str, width: int):
        self.place, self.width = place, width
        self.text: Callable[[list[str]], Conditioning] = self._encode
        self._memory = PromptMemory()

    @cached_property
    def source(self) -> Source:
        """Raises AdapterError where another pipeline's model is there."""
        found = open_source(self.place)
        if found.pipeline != PIPELINE:
            raise AdapterError(
                f"{self.place} holds a model of diffusers' {found.pipeline or 'that names no pipeline'}; expected one"
                f" of {PIPELINE}"
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

    def encoded(self, prompts: Sequence[str]) -> Conditioning:
        """Text tokens [B,77,E] float32; each prompt is encoded once, and the encoder is released in between."""
        return Conditioning(text=self._memory.encoded(prompts, self.text)["text"].astype(mx.float32))

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        return load_autoencoder(self.source, "vae", mx.float32)
